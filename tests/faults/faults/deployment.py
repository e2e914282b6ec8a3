"""Deployments: everything restarts, again and again, and never gets to run for long."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from tests.faults.faults.kinds import OPEN, fault
from tests.faults.looking import BATCH, look

if TYPE_CHECKING:
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

_TIMES = 3
_EVERY_SECONDS = 10.0
_GRACE_SECONDS = 5.0


@fault("deployments", OPEN)
def deploy(arena: Arena, random: Random, hits: Hits) -> None:
    """Every ten seconds, three times, all workers and beats are told to stop, and killed where they do not in five."""
    for _ in range(_TIMES):
        began = time.monotonic()
        with look(arena) as looking:
            victim = looking.stop_one(arena.workers, random, query=BATCH, seconds=_EVERY_SECONDS - _GRACE_SECONDS)
        everybody = [*arena.workers, *arena.beats]
        wanted = {kept: kept.restarts + 1 for kept in everybody}
        for kept in everybody:
            kept.signal(signal.SIGTERM)
        if victim is not None:
            hits.count(OPEN)
            victim.signal(signal.SIGCONT)
        deadline = time.monotonic() + _GRACE_SECONDS
        for kept, restarts in wanted.items():
            if not kept.wait_started(restarts, max(0.0, deadline - time.monotonic())):
                kept.signal(signal.SIGKILL)
        time.sleep(max(0.0, began + _EVERY_SECONDS - time.monotonic()))
