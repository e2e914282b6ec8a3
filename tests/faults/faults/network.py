"""The wires between the service and its servers: cut, frozen, or one that loses an answer."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

import settings
from tests.faults.faults.kinds import GAP, OPEN, fault
from tests.faults.looking import BATCH, look, publishing
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    import psycopg

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

UNHEARD = "done, and nobody heard"
_SECONDS = (2.0, 15.0)
_CALL_SECONDS = 60.0
_COMMIT_SECONDS = 10.0
_POLL_SECONDS = 0.02
_USERS = 30
_FINAL = (0, 2, 3)
"""Exit codes after which nobody asks again: done, refused, done with failed users."""

_SOME_USERS = "SELECT external_id FROM host.born ORDER BY external_id OFFSET %s LIMIT %s"
_COUNT_USERS = "SELECT count(*) FROM host.born"
# Taken already: operators leave it alone for as long as one asks.
_ASK = """
INSERT INTO host.asked (what, key, detail, arguments, operator, taken_at, attempts)
VALUES ('bulk', %s, %s, %s, 'caller', now(), 2) RETURNING id
"""
_ANSWER = """
UPDATE host.asked SET
    operator = CASE WHEN %(final)s THEN operator END, answered_at = CASE WHEN %(final)s THEN now() END,
    exit_code = %(exit_code)s, answer = %(answer)s::jsonb, said = %(said)s
WHERE id = %(id)s
"""
_BY_KEY = "SELECT FROM credit_refresh_runs WHERE idempotency_key = %s"


@fault("database-cut", OPEN)
def cut_database(arena: Arena, random: Random, hits: Hits) -> None:
    """The wire to the database is cut: both ends are told."""
    _disturb_database(arena, random, hits, arena.to_postgres.cut)


@fault("database-lost", OPEN)
def lose_database(arena: Arena, random: Random, hits: Hits) -> None:
    """The wire to the database is cut, and PostgreSQL is not told: to it the workers are still there."""
    _disturb_database(arena, random, hits, lambda: arena.to_postgres.cut(silently=True))


@fault("database-frozen", OPEN)
def freeze_database(arena: Arena, random: Random, hits: Hits) -> None:
    """Nothing passes between the service and the database, then everything does."""
    _disturb_database(arena, random, hits, arena.to_postgres.freeze)


@fault("broker-cut", GAP)
def cut_broker(arena: Arena, random: Random, hits: Hits) -> None:
    """The wire to the broker is cut as a scan publishes."""
    _disturb_broker(arena, random, hits, arena.to_redis.cut)


@fault("broker-frozen", GAP)
def freeze_broker(arena: Arena, random: Random, hits: Hits) -> None:
    """Nothing passes between the service and the broker, what a scan publishes included, then everything does."""
    _disturb_broker(arena, random, hits, arena.to_redis.freeze)


def _disturb_broker(arena: Arena, random: Random, hits: Hits, disturb: Callable[[], None]) -> None:
    with publishing(arena, arena.workers) as found:
        disturb()
        hits.count(GAP, found is not None)
    time.sleep(random.uniform(*_SECONDS))
    arena.to_redis.restore()


def _disturb_database(arena: Arena, random: Random, hits: Hits, disturb: Callable[[], None]) -> None:
    with look(arena) as looking:
        victim = looking.stop_one(arena.workers, random, query=BATCH)
    disturb()
    if victim is not None:
        hits.count(OPEN)
        victim.signal(signal.SIGCONT)
    time.sleep(random.uniform(*_SECONDS))
    arena.to_postgres.restore()


@fault("answer-lost", UNHEARD)
def lose_answer(arena: Arena, random: Random, hits: Hits) -> None:
    """A bulk refresh succeeds, its caller hears nothing of it, and asks again with the same idempotency key."""
    with Proxy(arena.postgres.socket) as wire, arena.connect() as connection:
        key = f"lost-{random.getrandbits(64):x}"
        users = _some_users(connection, random)
        file = arena.logs / f"{key}.txt"
        file.write_text("".join(f"{user}\n" for user in users))
        arguments = _bulk(file, key)
        asked = (key, Jsonb({"users": users, "force": True}), arguments)
        (ask_id,) = connection.execute(_ASK, asked).fetchone() or (0,)
        if _ask_unheard(arena, connection, wire, arguments, key):
            hits.count(UNHEARD)
        again = arena.call(*arguments, timeout_seconds=_CALL_SECONDS)
        final = again.returncode in _FINAL
        values = {"final": final, "exit_code": again.returncode, "answer": again.stdout or None}
        connection.execute(_ANSWER, {**values, "said": again.stderr[-500:], "id": ask_id})


def _some_users(connection: psycopg.Connection[Any], random: Random) -> list[str]:
    (users,) = connection.execute(_COUNT_USERS).fetchone() or (0,)
    found = connection.execute(_SOME_USERS, (random.randrange(max(1, users - _USERS)), _USERS))
    return [external_id for (external_id,) in found]


def _bulk(file: Path, key: str) -> list[str]:
    asked = ["bulk-refresh", "--users", str(file), "--force", "--yes", "--json"]
    return [*asked, "--reason", "the fault suite", "--idempotency-key", key]


def _ask_unheard(
    arena: Arena, connection: psycopg.Connection[Any], wire: Proxy, arguments: list[str], key: str
) -> bool:
    """Ask over a wire that loses the answer to the commit; returns whether it was committed."""
    process = subprocess.Popen(
        arena.command(*arguments),
        cwd=settings.CHECKOUT,
        env={**arena.environment("operator"), "DATABASE_URL": arena.postgres_url(wire)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return _lose_the_answer(connection, wire, key)
    finally:
        process.kill()
        process.wait()


def _lose_the_answer(connection: psycopg.Connection[Any], wire: Proxy, key: str) -> bool:
    with wire.trap(rb"INSERT INTO credit_refresh_runs") as opening:
        link = opening.wait(_CALL_SECONDS)
        if link is None:
            return False
        with wire.trap(rb"COMMIT") as end:
            link.release()
            if end.wait(_CALL_SECONDS) is None:
                return False
            link.mute()
            link.release()
            deadline = time.monotonic() + _COMMIT_SECONDS
            while not (committed := connection.execute(_BY_KEY, (key,)).rowcount) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            link.drop()
            return committed == 1
