"""The broker: it dies, forgets, or takes nothing more."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING

from celeryconfig import QueueNames
from tests.faults.faults.kinds import GAP, fault
from tests.faults.looking import publishing, stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

WAITING = "with messages in the queue"
_DOWN_SECONDS = (0.5, 5.0)
_FULL_SECONDS = 10.0
_ATTEMPTS = 5

_UNPUBLISHED = """
SELECT count(DISTINCT b.run_id) FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE r.status = 'running' AND b.status = 'pending' AND b.published_at IS NULL
"""


@fault("redis-killed", GAP)
def kill(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of Redis while a scan publishes; it comes back with its append-only file."""
    _end_while_publishing(arena, hits, arena.redis.stop_immediately)
    time.sleep(random.uniform(*_DOWN_SECONDS))
    arena.redis.start()


@fault("redis-restarted", GAP)
def restart(arena: Arena, random: Random, hits: Hits) -> None:
    """Redis is shut down in order while a scan publishes, and started again."""
    _end_while_publishing(arena, hits, arena.redis.stop)
    time.sleep(random.uniform(*_DOWN_SECONDS))
    arena.redis.start()


@fault("redis-emptied", WAITING)
def kill_without_persistence(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of a Redis that keeps nothing on disk: all messages are gone."""
    with _messages_waiting(arena, hits):
        arena.redis.stop_immediately()
        arena.redis.wipe()
    time.sleep(random.uniform(*_DOWN_SECONDS))
    arena.redis.start()


@fault("redis-flushed", WAITING)
def flush(arena: Arena, random: Random, hits: Hits) -> None:
    """FLUSHALL: messages, bindings and all are gone, and nobody's connection is."""
    for _ in range(random.randint(1, 3)):
        with _messages_waiting(arena, hits):
            arena.redis_admin.flushall()


@fault("redis-full", GAP)
def fill(arena: Arena, random: Random, hits: Hits) -> None:
    """Redis has reached its maxmemory and refuses what would need more (noeviction)."""
    memory = arena.redis_admin.info("memory")
    arena.redis_admin.config_set("maxmemory", max(1, int(memory["used_memory"]) // 2))
    try:
        with contextlib.suppress(subprocess.CalledProcessError):
            arena.credits("scan", "--json")  # beat's message is refused too, so somebody else opens a run
        time.sleep(random.uniform(_FULL_SECONDS / 2, _FULL_SECONDS))
        with arena.connect() as connection:
            for (runs,) in connection.execute(_UNPUBLISHED):
                hits.count(GAP, runs)
    finally:
        arena.redis_admin.config_set("maxmemory", 0)


def _end_while_publishing(arena: Arena, hits: Hits, end: Callable[[], None]) -> None:
    """End the broker while the message of a scan is on its way to it; it never arrives."""
    with publishing(arena, arena.workers) as found:
        end()
        if found is not None:
            _, link = found
            link.drop()
            hits.count(GAP)


@contextlib.contextmanager
def _messages_waiting(arena: Arena, hits: Hits) -> Iterator[None]:
    """Messages wait in a queue: the workers stand still for the block, and an operator scans before it."""
    with stopped(arena.workers):
        for _ in range(_ATTEMPTS):
            arena.credits("scan", "--json")
            if waiting := sum(int(arena.redis_admin.llen(name)) for name in QueueNames.WORK):
                hits.count(WAITING, waiting)
                break
        yield
