"""Users' own tokens: JWTs that the host app or its identity provider signs, and that are checked here.

With JWT_SECRET, HS256 and nothing else. With JWKS_URL, the algorithm that the published key itself is for, which is
never one with a shared secret. Never both, so nobody signs with a public key as if it were the secret.
"""

from __future__ import annotations

import http.client
import time
from typing import TYPE_CHECKING, Any

import jwt
import structlog

if TYPE_CHECKING:
    from settings import Settings

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.api")

LEEWAY_SECONDS = 30
"""How far the signer's clock may be from ours."""
KEYS_KEPT_SECONDS = 300
"""A key that the signer has withdrawn is believed for as long."""
UNKNOWN_KEY_SECONDS = 10
"""A token that names a key we do not know has them fetched anew, no more often than this."""
FETCH_TIMEOUT_SECONDS = 2.0
FETCH_PAUSE_SECONDS = 5.0
"""After a fetch that failed nobody waits for the next one: requests would hold all threads of the process."""

# Of key pairs alone, whatever a key server publishes.
_ALGORITHMS = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES256K", "ES384", "ES512", "EdDSA"
)  # fmt: skip


class JwksUnavailableError(RuntimeError):
    """The keys cannot be had, so nobody knows whether a token is good. The text is one line and holds no token."""


class NoSignerError(jwt.InvalidTokenError):
    """Neither JWT_SECRET nor JWKS_URL is set."""


class Tokens:
    """Says whose token it is. Without JWT_SECRET and JWKS_URL, nobody's.

    Args:
        settings: jwt_secret or jwks_url, jwt_audience, jwt_issuer.
    """

    def __init__(self, settings: Settings) -> None:
        self._secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret else None
        self._keys = _KeyServer(settings.jwks_url) if settings.jwks_url else None
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer

    def subject(self, token: str) -> str | None:
        """The external id of the user whose valid token this is; None: it is not valid.

        Valid is a token that is signed as the settings say, has not expired, and names `aud` and `sub`, and `iss` where
        JWT_ISSUER is set. `nbf` and `iat` count where the token has them.

        Raises:
            JwksUnavailableError: the keys to check it against cannot be had now.
        """
        try:
            subject = self._claims(token).get("sub")
            # What PostgreSQL cannot store is nobody's id.
            valid = isinstance(subject, str) and subject.strip() and "\0" not in subject and subject.encode()
        except (jwt.PyJWTError, ValueError, RecursionError) as error:  # the latter two: what its parsers let through
            # For whoever sets the signer up. Its name alone: texts may repeat what the token holds.
            log.info("A user's token is not valid", because=type(error).__name__)
            return None
        if not valid:
            log.info("A user's token is not valid", because="its subject is no user's id")
        return subject if valid else None

    def _claims(self, token: str) -> dict[str, Any]:
        key: str | jwt.PyJWK
        algorithms: tuple[str, ...]
        if self._secret is not None:
            key, algorithms = self._secret, ("HS256",)
        elif self._keys is not None:
            header = jwt.get_unverified_header(token)
            # Asked first: a token that cannot be good is not worth a fetch.
            if header.get("alg") not in _ALGORITHMS or not header.get("kid"):
                raise jwt.InvalidAlgorithmError
            key = self._keys.get_signing_key(header["kid"])
            # PyJWT checks with the key's own algorithm and refuses a token that names another one.
            algorithms = _ALGORITHMS
        else:
            raise NoSignerError
        return jwt.decode(
            token,
            key,
            algorithms=algorithms,
            audience=self._audience,
            issuer=self._issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "aud", "sub"], "enforce_minimum_key_length": True},
        )


class _KeyServer(jwt.PyJWKClient):
    """Fetches keys; where that fails, it says so at once for a while instead of trying for each request."""

    def __init__(self, url: str) -> None:
        super().__init__(
            url,
            lifespan=KEYS_KEPT_SECONDS,
            timeout=FETCH_TIMEOUT_SECONDS,
            cooldown_duration=UNKNOWN_KEY_SECONDS,
        )
        self._failed: str | None = None
        self._silent_until = 0.0

    def fetch_data(self) -> Any:
        """Called under the client's lock.

        Raises:
            JwksUnavailableError: nobody answers, or not with keys.
        """
        if self._failed is not None and time.monotonic() < self._silent_until:
            raise JwksUnavailableError(self._failed)
        try:
            fetched = super().fetch_data()
        # PyJWT wraps some of what a server can do wrong, and not a body that ends early or is no JSON.
        except (jwt.PyJWTError, http.client.HTTPException, OSError, ValueError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            self._failed = f"The keys at JWKS_URL cannot be had: {line}"
            self._silent_until = time.monotonic() + FETCH_PAUSE_SECONDS
            raise JwksUnavailableError(self._failed) from error
        self._failed = None
        return fetched
