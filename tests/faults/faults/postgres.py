"""The database: it restarts, throws everybody out, has no room left, or is busy with a host that locks what we want."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import TYPE_CHECKING

import psycopg
from psycopg import IsolationLevel

from tests.faults.faults.kinds import OPEN, fault
from tests.faults.looking import look

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

REFUSED = "writes refused"
UNSERIALIZABLE = "serialization errors"
_DOWN_SECONDS = (0.0, 3.0)
_STORM_SECONDS = 10.0
_FULL_SECONDS = (8.0, 15.0)
_LOCKED_SECONDS = (3.0, 8.0)
_QUARREL_SECONDS = 12.0
_QUARRELLING = 3
_BUSY_SECONDS = 10.0
_PACE_SECONDS = 0.05
_QUARRELS = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.LockNotAvailable,
)
_NO_ROOM = b"No space left on device"

_TERMINATE = """
SELECT count(*) FILTER (WHERE state <> 'idle' AND terminated) FROM (
    SELECT state, pg_terminate_backend(pid) AS terminated FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND application_name LIKE 'credits%'
) AS s
"""
_WAITING = """
SELECT pid, query_start FROM pg_stat_activity WHERE application_name LIKE 'credits%' AND wait_event_type = 'Lock'
"""
_DUE_SOON = """
SELECT id FROM users WHERE wake_at BETWEEN now() - interval '1 minute' AND now() + make_interval(secs => %s)
ORDER BY id DESC LIMIT %s
"""
_LOCK_USERS = "SELECT FROM users WHERE id = ANY (%s) ORDER BY id FOR UPDATE"
_LOCK_TABLE = "LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE"
_TOUCH = "UPDATE users SET updated_at = updated_at WHERE id = %s"


@fault("postgres-stopped", OPEN)
def stop(arena: Arena, random: Random, hits: Hits) -> None:
    """PostgreSQL shuts down immediately and is started again: it recovers as after a crash."""
    _end(arena, random, hits, arena.postgres.stop_immediately)


@fault("postgres-killed", OPEN)
def kill(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of all of PostgreSQL's processes, as when its machine is gone, and started again."""
    _end(arena, random, hits, lambda: arena.postgres.kill(signal.SIGKILL))


@fault("connections-terminated", OPEN)
def terminate(arena: Arena, random: Random, hits: Hits) -> None:
    """pg_terminate_backend for every connection of the service, several times a second, for ten seconds."""
    deadline = time.monotonic() + _STORM_SECONDS
    with look(arena) as looking, arena.connect() as connection:
        while time.monotonic() < deadline:
            time.sleep(random.uniform(0, 0.5))
            looking.wait_busy(1)
            for (inside,) in connection.execute(_TERMINATE):
                hits.count(OPEN, inside)


@fault("locked", OPEN)
def lock(arena: Arena, random: Random, hits: Hits) -> None:
    """A host keeps the users locked who fall due, then a whole table, for longer than our lock timeout."""
    with arena.connect() as connection:
        for statement in (_LOCK_USERS, _LOCK_TABLE.format(random.choice(("users", "credit_refresh_histories")))):
            seconds = random.uniform(*_LOCKED_SECONDS)
            with connection.transaction():
                if statement is _LOCK_USERS:
                    users = connection.execute(_DUE_SOON, (seconds, 1_000)).fetchall()
                    connection.execute(statement, ([user_id for (user_id,) in users],))
                else:
                    connection.execute(statement)
                hits.count(OPEN, _count_waiting(arena, seconds))


def _count_waiting(arena: Arena, seconds: float) -> int:
    """Statements of the service that were seen to wait for a lock, once each."""
    seen = set()
    deadline = time.monotonic() + seconds
    with arena.connect() as connection:
        while time.monotonic() < deadline:
            seen.update(connection.execute(_WAITING).fetchall())
            time.sleep(_PACE_SECONDS)
    return len(seen)


@fault("quarrel", OPEN, UNSERIALIZABLE)
def quarrel(arena: Arena, random: Random, hits: Hits) -> None:
    """A host locks the users who fall due in the opposite order, one by one, at every isolation level."""
    deadline = time.monotonic() + _QUARREL_SECONDS
    seeds = [random.getrandbits(32) for _ in range(_QUARRELLING)]
    with ThreadPoolExecutor() as pool, look(arena) as looking:
        threads = [pool.submit(_quarrel, arena, Random(seed), deadline) for seed in seeds]  # noqa: S311
        while time.monotonic() < deadline:
            hits.count(OPEN, len(looking.wait_busy(1)))
            time.sleep(_PACE_SECONDS)
        for thread in threads:
            for error in thread.result():
                hits.count(UNSERIALIZABLE if error is psycopg.errors.SerializationFailure else error.__name__)


def _quarrel(arena: Arena, random: Random, deadline: float) -> list[type[psycopg.Error]]:
    """One session of the host's; returns its errors. It changes nobody."""
    errors: list[type[psycopg.Error]] = []
    with arena.connect() as connection:
        connection.execute("SET lock_timeout = '10s'")
        while time.monotonic() < deadline:
            connection.isolation_level = random.choice(list(IsolationLevel))
            try:
                with connection.transaction():
                    users = connection.execute(_DUE_SOON, (2, random.randint(5, 100))).fetchall()
                    time.sleep(random.uniform(0, 2))  # its snapshot grows old meanwhile
                    for (user_id,) in users:
                        connection.execute(_TOUCH, (user_id,))
                        time.sleep(random.uniform(0, 0.01))
            except _QUARRELS as error:
                errors.append(type(error))
    return errors


def _no_disk(arena: Arena) -> str | None:
    return arena.disk_refused


@fault("disk-full", REFUSED, unavailable=_no_disk)
def fill_disk(arena: Arena, random: Random, hits: Hits) -> None:
    """The file system with PostgreSQL's data and log of changes is full; where it shut down, it is started again."""
    assert arena.disk is not None
    before = arena.postgres.log.read_bytes().count(_NO_ROOM)
    arena.disk.fill()
    try:
        time.sleep(random.uniform(*_FULL_SECONDS))
    finally:
        arena.disk.free()
    hits.count(REFUSED, arena.postgres.log.read_bytes().count(_NO_ROOM) - before)
    arena.postgres.start()
    arena.postgres.wait_ready()


def _end(arena: Arena, random: Random, hits: Hits, end: Callable[[], None]) -> None:
    time.sleep(random.uniform(0, 1))
    with look(arena) as looking:
        hits.count(OPEN, len(looking.wait_busy(_BUSY_SECONDS)))
        end()
    time.sleep(random.uniform(*_DOWN_SECONDS))
    arena.postgres.start()
