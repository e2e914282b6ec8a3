"""Signals that a process outlives, or answers in its own time."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from refresh.delivery import LOST_AFTER_SECONDS
from tests.faults.faults.kinds import OPEN, fault
from tests.faults.looking import BATCH, look

if TYPE_CHECKING:
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

_STORM_SECONDS = 10.0


@fault("term-storm", OPEN)
def storm(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGTERM to a worker or a beat at random, several times a second, for ten seconds."""
    with look(arena) as looking:
        victim = looking.stop_one(arena.workers, random, query=BATCH)
        if victim is not None:
            hits.count(OPEN)
            victim.signal(signal.SIGTERM)
            victim.signal(signal.SIGCONT)
        deadline = time.monotonic() + _STORM_SECONDS
        while time.monotonic() < deadline:
            victim = random.choice([*arena.workers, *arena.beats])
            if victim.signal(signal.SIGTERM) and victim in looking.inside([victim]):
                hits.count(OPEN)
            time.sleep(random.uniform(0, 0.6))


@fault("worker-stopped", OPEN)
def stop_worker(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGSTOP of a worker inside a batch, for longer than it takes until its messages count as lost.

    There are no acknowledgements and so no visibility timeout (celeryconfig.py); this is what stands in its place.
    """
    with look(arena) as looking:
        victim = looking.stop_one(arena.workers, random, query=BATCH)
    if victim is not None:
        hits.count(OPEN)
    else:
        victim = random.choice(arena.workers)
        victim.signal(signal.SIGSTOP)
    time.sleep(LOST_AFTER_SECONDS + random.uniform(5, 10))
    victim.signal(signal.SIGCONT)
