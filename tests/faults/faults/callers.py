"""Those who ask: operators that end in the middle of a command."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from tests.faults.faults.kinds import fault

if TYPE_CHECKING:
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

ASKING = "with a command in hand"
_TIMES = 4
_SECONDS = 10.0
_COMMAND_SECONDS = 0.3
_POLL_SECONDS = 0.01

_IN_HAND = "SELECT operator, id, attempts FROM host.asked WHERE answered_at IS NULL AND operator IS NOT NULL"


@fault("operators-killed", ASKING)
def kill_operators(arena: Arena, random: Random, hits: Hits) -> None:
    """SIGKILL of an operator at any point of a command, several times; it comes back and asks again."""
    by_name = {kept.name: kept for kept in arena.operators}
    deadline = time.monotonic() + _SECONDS
    killed: set[tuple[int, int]] = set()  # what each was asking, for the first or the second time
    with arena.connect() as connection:
        while len(killed) < _TIMES and time.monotonic() < deadline:
            in_hand = {(ask, attempt): name for name, ask, attempt in connection.execute(_IN_HAND) if name in by_name}
            asking = sorted(in_hand.keys() - killed)
            if not asking:
                time.sleep(_POLL_SECONDS)
                continue
            ask = random.choice(asking)
            victim = by_name[in_hand[ask]]
            time.sleep(random.uniform(0, _COMMAND_SECONDS))
            killed.add(ask)
            if victim.signal(signal.SIGKILL) and victim.wait_down():
                still = {tuple(row) for row in connection.execute(_IN_HAND)}
                hits.count(ASKING, (victim.name, *ask) in still)
