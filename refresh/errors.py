"""What the service refuses: one clear line for people, whichever way the request came in."""


class RefusedError(ValueError):
    """The request cannot be carried out. The text is one line for people."""


class NotFoundError(RefusedError):
    """What the request names is not there."""


class NobodyError(RefusedError):
    """Nobody was found for a request that wants somebody."""


class KeyReusedError(RefusedError):
    """The idempotency key belongs to a request of other content."""
