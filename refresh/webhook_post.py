"""Sending: a round over what is due, all endpoints at once, a few messages of each at a time.

    for each endpoint: look its name up → check where that leads → POST to that very address → keep the answer

An endpoint that answers slowly, or not at all, keeps no other one waiting: a round is bounded, and whoever is done gets
more for as long as somebody is still at what they began with. What was not sent by the round's end goes back to the
outbox. Nothing is read of an answer but its status and `Retry-After`; no redirect is followed, no proxy of the
environment used, and nothing decompressed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import httpx

from refresh import webhook_outbox as outbox
from refresh.webhook_outbox import Answer
from refresh.webhook_targets import TargetError, lookup, read_target, require_allowed
from refresh.webhook_text import compose

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable
    from datetime import datetime

    import psycopg

    from refresh.webhook_outbox import Message
    from refresh.webhook_targets import Look, Target

CONNECT_SECONDS = 3.0
ATTEMPT_SECONDS = 10.0
"""From looking the name up to the answer's headers, however the endpoint spreads what it says over time."""
ROUND_SECONDS = 15.0
"""No attempt begins later in a round. So a round ends within 25 s, and a lease is longer."""
DRAIN_SECONDS = 1.0
DRAIN_BYTES = 16_384
"""What is read and thrown away of an answer's body, so that the connection can be used again."""
PARALLEL = 4
"""Messages on their way to one endpoint at a time."""
ERROR_MAX = 300

_OK = range(200, 300)
_REDIRECTS = range(300, 400)
_GONE = 410
_ABOUT_THE_MESSAGE = frozenset({400, 413, 422})
"""An endpoint that answers so may well take another message. Any other failure is the endpoint's."""


@dataclass(frozen=True, slots=True)
class Sender:
    """How messages are sent.

    Attributes:
        allow_private: `WEBHOOKS_ALLOW_PRIVATE`.
        look_up: finds the addresses of a name.
        tls: whom to believe; by default the public authorities, or those that SSL_CERT_FILE names.
    """

    allow_private: bool
    look_up: Look = lookup
    tls: ssl.SSLContext = field(default_factory=httpx.create_ssl_context)


@dataclass(slots=True)
class Round:
    """What came of a round: how many messages were taken, failed, or not tried."""

    counts: Counter[str] = field(default_factory=Counter)
    switched_off: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """Attempts made."""
        return self.counts["delivered"] + self.counts["failed"]


def deliver_round(connection: psycopg.Connection[Any], sender: Sender) -> Round:
    """Send what is due; what becomes of each message is committed as soon as it is known.

    Args:
        connection: in autocommit; no transaction is open while a message is on its way.
        sender: how.
    """
    claimed = outbox.claim(connection)
    done = Round()
    if claimed:
        asyncio.run(_send_all(connection, sender, claimed, done))
    return done


async def _send_all(
    connection: psycopg.Connection[Any], sender: Sender, messages: Iterable[Message], done: Round
) -> None:
    lanes: dict[object, deque[Message]] = {}
    for message in messages:
        lanes.setdefault(message.endpoint_id, deque()).append(message)
    until = time.monotonic() + ROUND_SECONDS
    at_first = set(lanes)
    async with asyncio.TaskGroup() as group:
        for waiting in lanes.values():
            group.create_task(_Lane(connection, sender, waiting, until, at_first, done).run())


class _Lane:
    """One endpoint's messages. All lanes are in one thread, so the connection is nobody else's meanwhile.

    Args:
        connection: in autocommit.
        sender: how messages are sent.
        waiting: what was claimed for the endpoint.
        until: no attempt begins later.
        at_first: endpoints that are at the messages that they began with; each takes itself out.
        done: what comes of the round.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the round's, of which it is a part
        self,
        connection: psycopg.Connection[Any],
        sender: Sender,
        waiting: deque[Message],
        until: float,
        at_first: set[object],
        done: Round,
    ) -> None:
        self._connection = connection
        self._sender = sender
        self._waiting = waiting
        self._until = until
        self._at_first = at_first
        self._done = done
        self._endpoint_id = waiting[0].endpoint_id
        self._url = waiting[0].url
        self._failure: Answer | None = None
        self._addresses: list[str] | None = None

    async def run(self) -> None:
        """Send until all is sent, the time is up, or the endpoint fails."""
        async with httpx.AsyncClient(
            verify=self._sender.tls,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # each attempt has a limit of its own
            limits=httpx.Limits(max_connections=PARALLEL, max_keepalive_connections=PARALLEL),
        ) as client:
            await self._send(client)
            self._at_first.discard(self._endpoint_id)
            # The round goes on for others' sake. With nobody at their first messages it ends, for the worker's.
            while self._at_first and self._may_go_on and self._take_more():
                await self._send(client)
        outbox.release(self._connection, self._waiting)
        self._done.counts["not tried"] += len(self._waiting)
        if self._failure is None:
            outbox.record_health(self._connection, self._endpoint_id, healthy=True)
        elif self._failure.gone:
            outbox.switch_off(self._connection, self._endpoint_id)
            self._done.switched_off.append(str(self._endpoint_id))
        else:
            outbox.record_health(
                self._connection, self._endpoint_id, healthy=False, retry_after=self._failure.retry_after
            )

    @property
    def _may_go_on(self) -> bool:
        return self._failure is None and time.monotonic() < self._until

    def _take_more(self) -> bool:
        """Whether there was more. Its address may be another one by now, and its name lead elsewhere."""
        self._waiting.extend(outbox.claim(self._connection, endpoint_id=self._endpoint_id))
        if self._waiting:
            self._url, self._addresses = self._waiting[0].url, None
        return bool(self._waiting)

    async def _send(self, client: httpx.AsyncClient) -> None:
        await asyncio.gather(*(self._work(client) for _ in range(min(PARALLEL, len(self._waiting)))))

    async def _work(self, client: httpx.AsyncClient) -> None:
        while self._waiting and self._may_go_on:
            message = self._waiting.popleft()
            answer = await self._attempt(client, message)
            outbox.record(self._connection, message, answer)
            self._done.counts["delivered" if answer.error is None else "failed"] += 1
            if answer.its_own and not (self._failure and self._failure.gone):
                self._failure = answer

    async def _attempt(self, client: httpx.AsyncClient, message: Message) -> Answer:
        try:
            headers, body = compose(message)
        except Exception as error:  # noqa: BLE001 - one message must not keep all others from being sent
            return Answer(None, f"it cannot be written: {type(error).__name__}")
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                response = await self._post(client, headers, body)
        except TimeoutError:
            return Answer(None, f"no answer within {ATTEMPT_SECONDS:.0f} s", its_own=True)
        except TargetError as error:
            return Answer(None, str(error)[:ERROR_MAX], its_own=True)
        except (httpx.HTTPError, OSError, ValueError) as error:
            return Answer(None, f"{type(error).__name__}: {error}"[:ERROR_MAX], its_own=True)
        except Exception as error:  # noqa: BLE001 - nor one endpoint; what the text may hold, nobody knows
            return Answer(None, type(error).__name__, its_own=True)
        await _drain(response)
        return _read(response, message.claimed_at)

    async def _post(self, client: httpx.AsyncClient, headers: dict[str, str], body: bytes) -> httpx.Response:
        """POST to one of the addresses that were checked; the others are tried where one cannot be reached."""
        target = read_target(self._url, allow_private=self._sender.allow_private)
        if self._addresses is None:
            addresses = [target.host]
            if target.named:
                addresses = await _look_up(self._sender.look_up, target)
            require_allowed(target, addresses, allow_private=self._sender.allow_private)
            self._addresses = addresses
        # The name stays what it was to the server: in the Host header, and in TLS, whose certificate has to carry it.
        extensions = {"sni_hostname": target.host} if target.named else {}
        headers = {**headers, "Host": target.url.netloc.decode("ascii")}
        unreachable: httpx.HTTPError = httpx.ConnectError("its name leads nowhere")
        for address in self._addresses:
            url = target.url.copy_with(host=address)
            request = client.build_request("POST", url, headers=headers, content=body, extensions=extensions)
            try:
                return await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                unreachable = error
        raise unreachable


async def _look_up(look_up: Look, target: Target) -> list[str]:
    """In a thread that nobody waits for: the system's look-up knows no time limit, and a loop waits for its own."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[str]] = loop.create_future()

    def settle(addresses: list[str], error: Exception | None) -> None:
        if found.done():  # given up
            return
        if error is not None:
            found.set_exception(error)
        else:
            found.set_result(addresses)

    def look() -> None:
        addresses: list[str] = []
        failed = None
        try:
            addresses = look_up(target.host, target.port)
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            failed = error
        with contextlib.suppress(RuntimeError):  # the round has ended meanwhile, and its loop
            loop.call_soon_threadsafe(settle, addresses, failed)

    threading.Thread(target=look, daemon=True).start()
    return await found


async def _drain(response: httpx.Response) -> None:
    """Throw the body away: a short one to its end, a long one or a slow one together with its connection."""
    with contextlib.suppress(httpx.HTTPError, OSError, TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            seen = 0
            async for chunk in response.aiter_raw():
                seen += len(chunk)
                if seen > DRAIN_BYTES:
                    break
    with contextlib.suppress(httpx.HTTPError, OSError):
        await response.aclose()


def _read(response: httpx.Response, now: datetime) -> Answer:
    status = response.status_code
    if status in _OK:
        return Answer(status)
    error = f"answered {status}" + (": redirects are not followed" if status in _REDIRECTS else "")
    return Answer(
        status,
        error,
        retry_after=_seconds(response.headers.get("retry-after"), now),
        its_own=status not in _ABOUT_THE_MESSAGE,
        gone=status == _GONE,
    )


def _seconds(retry_after: str | None, now: datetime) -> float:
    """`Retry-After` in seconds: a number of them, or a date; 0 where it is neither."""
    if retry_after is None:
        return 0
    if retry_after.strip().isdecimal():
        return float(retry_after.strip()[:9])
    try:
        at = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):  # a year of twenty digits
        return 0
    return max(0.0, (at - now).total_seconds()) if at.tzinfo is not None else 0
