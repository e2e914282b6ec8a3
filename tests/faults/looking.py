"""Looking before a fault: which process is inside a transaction at this instant, and stopping it there.

PostgreSQL says which of its backends is at work. The proxy knows which connection of which client port leads to that
backend (its first answers name it), and the kernel which process the port belongs to.
"""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from random import Random

    import psycopg

    from tests.faults.arena import Arena
    from tests.faults.processes import Kept
    from tests.faults.proxy import Link, Proxy

BATCH = r"^\s*WITH batch AS MATERIALIZED"
"""Statements that do a batch."""
UPKEEP = r"stayed locked by another session|^\s*WITH running AS MATERIALIZED"
"""Statements that upkeep alone sends."""

WORK = "batches|bulk"
CONTROL = "control"

_BACKEND_KEY = b"K\x00\x00\x00\x0c"  # of PostgreSQL's protocol: kind and length, followed by the backend's number
_PACE_SECONDS = 0.0005

# A look at itself is none.
_OPEN = """
SELECT pid FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name LIKE 'credits%%'
    AND state IN ('active', 'idle in transaction', 'idle in transaction (aborted)')
    AND (%(query)s::text IS NULL OR query ~ %(query)s::text)
"""


class Look:
    """Who is inside a transaction.

    Args:
        arena: whose processes.
        connection: the suite's own, in autocommit.
    """

    def __init__(self, arena: Arena, connection: psycopg.Connection[Any]) -> None:
        self._arena = arena
        self._connection = connection
        self._clients: dict[int, int] = {}
        """The process behind each backend. Asking the kernel takes as long as a batch."""

    def backends(self, query: str | None = None) -> list[int]:
        """Backends of the service that are in a statement or a transaction; with `query`, in a statement like that."""
        return [pid for (pid,) in self._connection.execute(_OPEN, {"query": query})]

    def wait_busy(self, seconds: float) -> list[int]:
        """The backends that are in a statement or a transaction, as soon as there are any; none after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (busy := self.backends()) and time.monotonic() < deadline:
            time.sleep(_PACE_SECONDS)
        return busy

    def inside(self, among: Iterable[Kept], query: str | None = None) -> list[Kept]:
        """Those processes whose backends are."""
        busy = self.backends(query)
        if not busy:
            return []
        by_pid = {kept.pid: kept for kept in among}
        if any(pid not in self._clients for pid in busy):
            self._clients |= self._ask(by_pid)
        return [by_pid[client] for client in {self._clients.get(pid) for pid in busy} if client in by_pid]

    def _ask(self, pids: Iterable[int]) -> dict[int, int]:
        links = {link.client_port: backend(link) for link in self._arena.to_postgres.links()}
        owners = {port: pid for pid in pids for port in client_ports(pid, self._arena.to_postgres)}
        return {links[port]: pid for port, pid in owners.items() if port in links}

    def stop_one(
        self, among: Sequence[Kept], random: Random, *, query: str | None = None, seconds: float = 20.0
    ) -> Kept | None:
        """Stop one of these processes (SIGSTOP) inside a transaction.

        Looks, stops, and looks again: where the transaction has ended in between, the process goes on.

        Args:
            among: the processes.
            random: how long to let them be before.
            query: what their statement has to match, a regular expression.
            seconds: to try.

        Returns:
            The process that stands still; None when none was hit.
        """
        time.sleep(random.uniform(0, 1))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for kept in self.inside(among, query):
                kept.signal(signal.SIGSTOP)
                if self.inside([kept]):
                    return kept
                kept.signal(signal.SIGCONT)
            time.sleep(_PACE_SECONDS)
        return None


@contextlib.contextmanager
def look(arena: Arena) -> Iterator[Look]:
    """Look, over a connection of its own."""
    with contextlib.closing(arena.connect()) as connection:
        yield Look(arena, connection)


def backend(link: Link) -> int:
    """The backend that a connection leads to; 0 before PostgreSQL has said so."""
    found = link.head.find(_BACKEND_KEY)
    at = found + len(_BACKEND_KEY)
    return int.from_bytes(link.head[at : at + 4]) if found >= 0 else 0


def client_ports(pid: int, proxy: Proxy) -> set[int]:
    """The ports from which a process talks to a proxy."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(pid).net_connections(kind="tcp4")
        return {entry.laddr.port for entry in found if entry.raddr and entry.raddr.port == proxy.port}
    return set()


@contextlib.contextmanager
def publishing(
    arena: Arena, among: Sequence[Kept], queue: str = WORK, seconds: float = 30.0
) -> Iterator[tuple[Kept, Link] | None]:
    """One of these processes as it publishes: its message is on the way and held there, until the block ends.

    Args:
        arena: whose.
        among: the processes; what others publish goes on.
        queue: to which, a regular expression.
        seconds: to wait.
    """
    pattern = rf"LPUSH\r\n\$\d+\r\n({queue})\r\n".encode()
    found: list[Kept] = []

    def whose(port: int) -> bool:
        found[:] = [kept for kept in among if port in client_ports(kept.pid, arena.to_redis)]
        return bool(found)

    with arena.to_redis.trap(pattern, whose) as trap:
        link = trap.wait(seconds)
        yield (found[0], link) if link else None


@contextlib.contextmanager
def stopped(among: Iterable[Kept]) -> Iterator[None]:
    """Processes stand still (SIGSTOP) for the block."""
    standing = [kept for kept in among if kept.signal(signal.SIGSTOP)]
    try:
        yield
    finally:
        for kept in standing:
            kept.signal(signal.SIGCONT)
