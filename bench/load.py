"""Loads in a closed loop: on each connection the next call goes out when the last one's answer is there.

Over HTTP, by a client that costs the machine little: one process, an asyncio protocol that writes finished bytes and
looks for the end of the answer. And the same calls without HTTP, on as many connections to the database. Both in a
process of their own, timed in there.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from db import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import psycopg

Result = TypeVar("Result")

_HEAD_ENDS = b"\r\n\r\n"
_LENGTH = b"content-length: "


@dataclass(frozen=True, slots=True)
class Load:
    """What calls took.

    Attributes:
        seconds: from the first call to the last answer.
        latencies: of each call, in seconds.
        cpu_seconds: of the process that called.
    """

    seconds: float
    latencies: list[float]
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Calls."""
        return len(self.latencies) / self.seconds

    def percentile_ms(self, percent: int) -> float:
        """The latency that so many percent of the calls did not exceed."""
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1] * 1e3


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request, and what its answer, a 200, has to hold."""

    request: bytes
    answer_has: bytes


def apart(work: Callable[..., Result], *arguments: object) -> Result:
    """Do something in a new process, whose start is over before it begins."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def request(method: str, path: str, token: str | None = None) -> bytes:
    """A request without a body."""
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    length = "Content-Length: 0\r\n" if method == "POST" else ""
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}{length}\r\n".encode()


def call_http(port: int, calls: Sequence[Call], connections: int) -> Load:
    """Call a server on loopback.

    Raises:
        SystemExit: an answer is not what it has to be.
    """
    return asyncio.run(_call_http(port, calls, connections))


async def _call_http(port: int, calls: Sequence[Call], connections: int) -> Load:
    loop = asyncio.get_running_loop()
    left, latencies = iter(calls), list[float]()
    clients = [_Client(left, latencies, loop.create_future()) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    began, cpu = time.perf_counter(), time.process_time()
    for client in clients:
        client.call()
    wrong = await asyncio.gather(*(client.over for client in clients))
    load = Load(time.perf_counter() - began, latencies, time.process_time() - cpu)
    for client in clients:
        client.transport.abort()
    for answer in filter(None, wrong):
        raise SystemExit(f"the API's answer was wrong: {answer.decode(errors='replace')}")
    return load


class _Client(asyncio.Protocol):
    """One connection. `over` gives an answer that was wrong, or None."""

    def __init__(self, left: Iterator[Call], latencies: list[float], over: asyncio.Future[bytes | None]) -> None:
        self.over = over
        self.transport: Any = None
        self._left = left
        self._latencies = latencies
        self._called: Call | None = None
        self._called_at = 0.0
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def call(self) -> None:
        """Send the next one; without one, it is over."""
        self._called = next(self._left, None)
        if self._called is None:
            self.over.set_result(None)
            return
        self._called_at = time.perf_counter()
        self.transport.write(self._called.request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(_HEAD_ENDS)
        if not end:
            return
        before, length, after = head.lower().partition(_LENGTH)
        if not length or len(body) < int(after.partition(b"\r\n")[0]):
            return
        self._latencies.append(time.perf_counter() - self._called_at)
        if not before.startswith(b"http/1.1 200 ") or self._called is None or self._called.answer_has not in body:
            self.over.set_result(self._answer)
            return
        self._answer = b""
        self.call()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(self._answer or repr(exc).encode())


def call_database(
    url: str, call: Callable[[psycopg.Connection[Any], int], None], numbers: Sequence[int], connections: int
) -> Load:
    """Call a function for each number, on connections with a thread each.

    Args:
        url: the database.
        call: raises where something is wrong.
        numbers: one for each call.
        connections: to the database.
    """
    left, latencies, failed = iter(numbers), list[float](), list[BaseException]()
    together = threading.Barrier(connections + 1)

    def loop() -> None:
        with Database(url, "credits").statements() as connection:
            together.wait()
            try:
                for number in left:
                    began = time.perf_counter()
                    call(connection, number)
                    latencies.append(time.perf_counter() - began)
            except BaseException as error:  # noqa: BLE001 - raised again below
                failed.append(error)
            together.wait()

    threads = [threading.Thread(target=loop) for _ in range(connections)]
    for thread in threads:
        thread.start()
    together.wait()
    began, cpu = time.perf_counter(), time.process_time()
    together.wait()
    load = Load(time.perf_counter() - began, latencies, time.process_time() - cpu)
    for thread in threads:
        thread.join()
    for error in failed:
        raise error
    return load
