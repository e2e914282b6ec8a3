"""Messages that come a second time, while their run still has others to do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from celeryconfig import TaskNames
from tests.faults.faults.kinds import fault
from tests.faults.faults.messages import TAKEN, _message, _send

if TYPE_CHECKING:
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

_RUN_SECONDS = 10.0
_POLL_SECONDS = 0.02

# Whoever is locked is put off to another batch, so the run waits for them with all others done.
_LOCK = """
SELECT FROM users WHERE wake_at BETWEEN now() AND now() + interval '4 seconds' AND id % 4 = 0 ORDER BY id FOR UPDATE
"""
_DONE = """
SELECT b.id FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE b.status = 'done' AND b.users_refreshed > 0 AND r.status = 'running' AND r.work = 'refresh' AND NOT r.dry_run
LIMIT 20
"""


@fault("messages-twice", TAKEN)
def ring_twice(arena: Arena, random: Random, hits: Hits) -> None:
    """Messages of batches that are done come again, while their run waits for users whom the host has locked."""
    done: list[int] = []
    with arena.connect() as connection, arena.connect() as host, host.transaction():
        host.execute(_LOCK)
        deadline = time.monotonic() + _RUN_SECONDS
        while not done and time.monotonic() < deadline:
            done = [batch_id for (batch_id,) in connection.execute(_DONE)]
            time.sleep(_POLL_SECONDS)
        _send(arena, random, hits, [_message(random, TaskNames.BATCH, [done]) for _ in range(3) if done])
