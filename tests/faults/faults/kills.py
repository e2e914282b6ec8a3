"""Processes that are killed: no handler runs, nothing is said to anybody.

The pool is solo: a worker has no children, so that the whole worker is what there is to kill.
"""

from __future__ import annotations

import signal
import subprocess
from typing import TYPE_CHECKING

import settings
from tests.faults.faults.kinds import GAP, OPEN, fault
from tests.faults.looking import BATCH, CONTROL, UPKEEP, client_ports, look, publishing

if TYPE_CHECKING:
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

_POLL_SECONDS = 0.05
_ATTEMPTS = 5
# What an operator's process asks the broker once its run is committed: whether the queue is there, before it claims the
# batches; and to take them, after that.
_BEFORE_CLAIM = rb"\r\nEXISTS\r\n"
_AFTER_CLAIM = rb"\r\nLPUSH\r\n"

# Of the newest such run, whose process stands still.
_UNPUBLISHED = """
SELECT count(*) FROM credit_refresh_batches AS b
WHERE b.status = 'pending' AND b.attempts = 0 AND (b.published_at IS NULL OR %s) AND b.run_id = (
    SELECT id FROM credit_refresh_runs WHERE reason = 'credits scan' ORDER BY started_at DESC LIMIT 1
)
"""


@fault("worker-killed", OPEN)
def kill_worker(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of a worker inside a batch."""
    with look(arena) as looking:
        victim = looking.stop_one(arena.workers, random, query=BATCH)
    if victim is not None:
        hits.count(OPEN)
    (victim or random.choice(arena.workers)).signal(signal.SIGKILL)


@fault("all-workers-killed", OPEN)
def kill_all_workers(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of all workers at once, one of them inside a batch."""
    with look(arena) as looking:
        if looking.stop_one(arena.workers, random, query=BATCH) is not None:
            hits.count(OPEN)
    for kept in arena.workers:
        kept.signal(signal.SIGKILL)


@fault("beat-killed", "between due and publish")
def kill_beats(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of one beat or both, one of them as it rings."""
    with publishing(arena, arena.beats, CONTROL) as found:
        if found is not None:
            kept, link = found
            kept.signal(signal.SIGKILL)
            link.drop()
            hits.count("between due and publish")
    if random.random() < 0.5:
        for kept in arena.beats:
            kept.signal(signal.SIGKILL)


@fault("scan-killed", GAP)
def kill_scans(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of an operator's `credits scan` and of a worker with beat's scan, each after the commit."""
    if kill_operators_scan(arena, random.choice((_BEFORE_CLAIM, _AFTER_CLAIM))):
        hits.count(GAP)
    with publishing(arena, arena.workers, "batches") as found:
        if found is not None:
            kept, link = found
            kept.signal(signal.SIGKILL)
            link.drop()
            hits.count(GAP)


@fault("upkeep-killed", OPEN, GAP)
def kill_upkeep(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of the worker that does upkeep: inside a statement, and as it publishes what an operator left behind."""
    with look(arena) as looking:
        victim = looking.stop_one(arena.workers, random, query=UPKEEP)
    if victim is not None:
        hits.count(OPEN)
        victim.signal(signal.SIGKILL)
    if not kill_operators_scan(arena, _BEFORE_CLAIM):
        return
    with publishing(arena, arena.workers, "bulk") as found:
        if found is not None:
            kept, link = found
            kept.signal(signal.SIGKILL)
            link.drop()
            hits.count(GAP)


def kill_operators_scan(arena: Arena, message: bytes) -> bool:
    """Kill `credits scan` as it sends a message to the broker, its run committed and its batches not published.

    Returns:
        Whether there were any; False when nobody was due, several times in a row.
    """
    for _ in range(_ATTEMPTS):
        process = subprocess.Popen(
            arena.command("scan", "--json"),
            cwd=settings.CHECKOUT,
            env=arena.environment("operator"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            if _kill(arena, process, message):
                return True
        finally:
            process.kill()
            process.wait()
    return False


def _kill(arena: Arena, process: subprocess.Popen[bytes], message: bytes) -> bool:
    def whose(port: int) -> bool:
        return port in client_ports(process.pid, arena.to_redis)

    with arena.to_redis.trap(message, whose) as trap, arena.connect() as connection:
        # One that finds nobody due publishes nothing, and ends.
        while (link := trap.wait(_POLL_SECONDS)) is None:
            if process.poll() is not None:
                return False
        (unpublished,) = connection.execute(_UNPUBLISHED, (message == _AFTER_CLAIM,)).fetchone() or (0,)
        process.kill()
        link.drop()
    return bool(unpublished)
