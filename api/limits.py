"""How often a caller may ask: a moving window for each, in Redis where the broker is one, else in this process.

Not for defence against floods: whoever has no credentials is turned away before anything is counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
import structlog
from limits import parse
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter
from redis.backoff import NoBackoff
from redis.retry import Retry

import logs

if TYPE_CHECKING:
    from limits import RateLimitItem

REDIS_TIMEOUT_SECONDS = 0.25
REDIS_PAUSE_SECONDS = 5.0
"""After Redis did not answer, nobody waits for it for as long."""
WARN_SECONDS = 60.0
WAIT_MIN_SECONDS = 0.001
"""The window may have moved on between the refusal and the question how long it lasts."""
KEY_PREFIX = "credits:rate"

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.limits")


class Limiter:
    """Counts the requests of each caller, refused ones aside.

    **Availability goes before limits.** A Redis that does not answer lets all requests through: it is waited for a
    quarter of a second, then left alone for five, and a warning is logged once a minute at most. Processes that share
    a Redis share the count; with RabbitMQ as the broker, or without one, each process counts for itself.

    Args:
        rate: `Settings.api_rate_limit`.
        storage_url: `Settings.broker_url`, in all its forms.
    """

    def __init__(self, rate: str, storage_url: str | None) -> None:
        item = parse(rate)
        urls = (storage_url or "").split(";")
        redis_urls = [url for url in urls if url.partition("://")[0] in {"redis", "rediss", "redis+socket"}]
        self._window = _Shared(item, redis_urls) if redis_urls else _Memory(item)

    def hit(self, name: str) -> float | None:
        """Count a request.

        Args:
            name: whose; no secret, for it becomes a key in Redis.

        Returns:
            None: it may go on. Else the seconds after which one may.
        """
        return self._window.hit(name)


class _Memory:
    """The windows of this process.

    Our own, because the library's starts a thread for every hundredth of a second with requests, which goes through
    all callers that there ever were and forgets none.
    """

    def __init__(self, item: RateLimitItem) -> None:
        self._amount = item.amount
        self._seconds = float(item.get_expiry())
        self._windows: dict[str, deque[float]] = {}
        self._swept_at = time.monotonic()
        self._lock = threading.Lock()

    def hit(self, name: str) -> float | None:
        with self._lock:
            now = time.monotonic()
            begins = now - self._seconds
            if self._swept_at < begins:
                self._windows = {caller: window for caller, window in self._windows.items() if window[-1] > begins}
                self._swept_at = now
            window = self._windows.setdefault(name, deque(maxlen=self._amount))
            if len(window) == self._amount and window[0] > begins:
                return max(window[0] - begins, WAIT_MIN_SECONDS)
            window.append(now)  # a full one drops its oldest
            return None


class _Shared:
    """The windows of all processes, in the first Redis of a list that answers."""

    def __init__(self, item: RateLimitItem, urls: list[str]) -> None:
        self._item = item
        self._limiters = [_limiter(url) for url in urls]
        self._current = 0
        self._silent_until = 0.0
        self._warned_at: float | None = None

    def hit(self, name: str) -> float | None:
        now = time.monotonic()
        if now < self._silent_until:
            return None
        current = self._current
        limiter = self._limiters[current]
        try:
            if limiter.hit(self._item, name):
                return None
            wait = limiter.get_window_stats(self._item, name).reset_time - time.time()
        except (redis.RedisError, OSError) as error:
            self._leave_alone(current, now, error)
            return None
        return max(wait, WAIT_MIN_SECONDS)

    def _leave_alone(self, failed: int, now: float, error: Exception) -> None:
        self._current = (failed + 1) % len(self._limiters)
        self._silent_until = now + REDIS_PAUSE_SECONDS
        if self._warned_at is None or now - self._warned_at >= WARN_SECONDS:
            self._warned_at = now
            log.warning(f"{logs.PREFIX} Redis does not answer: requests are not limited", error=str(error))


def _limiter(url: str) -> MovingWindowRateLimiter:
    pool = connections(url)
    return MovingWindowRateLimiter(RedisStorage("redis://", connection_pool=pool, key_prefix=KEY_PREFIX))


def connections(url: str) -> redis.ConnectionPool:
    """Connections to the Redis that Celery finds at the URL: what it reads in its own way is read alike here."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    where: dict[str, object]
    if parts.scheme == "redis+socket":
        database = query.get("virtual_host", "")
        where = {"connection_class": redis.UnixDomainSocketConnection, "path": unquote(parts.path)}
    else:
        database = parts.path
        where = {"host": unquote(parts.hostname or "") or "127.0.0.1", "port": parts.port or 6379}
    if parts.scheme == "rediss":
        where["connection_class"] = redis.SSLConnection
        where |= {name: value for name, value in query.items() if name in _SSL_FILES}
        where["ssl_cert_reqs"] = query.get("ssl_cert_reqs", "required").removeprefix("CERT_").lower()
        where["ssl_check_hostname"] = query.get("ssl_check_hostname", "true").lower() != "false"
    return redis.ConnectionPool(
        **where,
        db=int(database.strip("/") or 0),
        username=unquote(parts.username or "") or None,
        password=unquote(parts.password or "") or None,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        # At once, and once: a pooled connection that Redis has closed meanwhile says nothing of Redis now.
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )


_SSL_FILES = frozenset({"ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"})
