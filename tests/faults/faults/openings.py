"""Runs that are opened at the same instant."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from psycopg.types.json import Jsonb

from tests.faults.faults.kinds import fault

if TYPE_CHECKING:
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

WAITING = "openings that waited"
_LOCKED_SECONDS = 8.0
_ENOUGH = 3
_POLL_SECONDS = 0.05

_LOCK = "LOCK TABLE credit_refresh_batches IN SHARE ROW EXCLUSIVE MODE"
_ASK = "INSERT INTO host.asked (what, key, detail, arguments) VALUES ('bulk', %s, %s, %s)"
# Behind the lock of the table, or behind the door of which the first has the key.
_OPENING = """
SELECT pid FROM pg_stat_activity
WHERE application_name LIKE 'credits%' AND wait_event_type = 'Lock' AND wait_event IN ('relation', 'advisory')
    AND (query LIKE '%INSERT INTO credit_refresh_batches%INSERT INTO credit_refresh_runs%' OR query LIKE '%.open_run%')
"""


@fault("openings-at-once", WAITING)
def open_at_once(arena: Arena, random: Random, hits: Hits) -> None:
    """A table is locked for some seconds, as by a change of it; whoever would open a run waits, and then all do."""
    seen: set[int] = set()
    with arena.connect() as connection, arena.connect() as host, connection.transaction():
        connection.execute(_LOCK)
        deadline = time.monotonic() + _LOCKED_SECONDS
        for _ in arena.operators:
            key = f"at-once-{random.getrandbits(64):016x}"
            arguments = ["bulk-refresh", "--all", "--yes", "--json", "--reason", "at once", "--idempotency-key", key]
            host.execute(_ASK, (key, Jsonb({"force": False}), arguments))
        while len(seen) < _ENOUGH and time.monotonic() < deadline:
            seen.update(pid for (pid,) in host.execute(_OPENING))
            time.sleep(_POLL_SECONDS)
    hits.count(WAITING, len(seen))
