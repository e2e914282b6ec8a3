"""How every statement over a batch ends: users who stay locked go to a new batch, and the row is closed.

The statements differ in what they do to the users whom they have locked (batch.py grants and plans, regrid.py moves
dates, …). They share the CTE names `batch`, `locked`, `missed`, `deferred` and `counts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from psycopg import RawCursor

if TYPE_CHECKING:
    from uuid import UUID

    import psycopg

DEFERRED_BACKOFF_SECONDS = 5
"""How soon users whom somebody else had locked are tried again, twice as late each time; upkeep's pace comes on top."""
FEW_USERS = 10
"""Up to so many, users who are locked twice in a row get a batch each. A host that locks a million gets no million
batches."""

# A batch of one waits its turn, it holds nothing that a host could want; a batch of many never waits.
LOCK_WAITING = "ORDER BY u.id FOR NO KEY UPDATE"
LOCK_SKIPPING = f"{LOCK_WAITING} SKIP LOCKED"
# A batch that is all or nothing puts nobody off: it fails where one of its users is locked, and is tried again.
LOCK_ALL = f"{LOCK_WAITING} NOWAIT"

# {is_there}: whether a user `m.id` who was not locked is there at all.
_DEFER = """
-- Users of the batch who were not locked: somebody else has them, or the host has deleted them since the scan. The
-- usual batch has none and does not look.
missed AS MATERIALIZED (
    SELECT id, {is_there} AS is_there
    FROM unnest((SELECT user_ids FROM batch)) AS m (id)
    WHERE (SELECT count(*) FROM locked) < (SELECT cardinality(user_ids) FROM batch)
        AND NOT EXISTS (SELECT FROM locked AS l WHERE l.id = m.id)
),
-- The few who are missed again get a batch each, which waits its turn.
deferred AS (
    INSERT INTO credit_refresh_batches (run_id, seq, user_ids, attempts, next_attempt_at)
    SELECT b.run_id, b.seq, array_agg(m.id), b.attempts + 1,
        now() + make_interval(secs => %(backoff_seconds)s * 2 ^ least(b.attempts, 8))
    FROM batch AS b CROSS JOIN missed AS m
    WHERE m.is_there
    GROUP BY b.run_id, b.seq, b.attempts,
        CASE WHEN b.attempts > 0 AND cardinality(b.user_ids) <= %(few)s THEN m.id END
    RETURNING cardinality(user_ids) AS users
),
"""

DEFER = _DEFER.format(is_there="EXISTS (SELECT FROM users AS u WHERE u.id = m.id)")
# A batch that is all or nothing fails where somebody is locked, so whoever it misses was deleted, perhaps this instant.
DEFER_NOBODY = _DEFER.format(is_there="false")

# ck_credit_refresh_batches_accounted fails the whole statement when a user is not accounted for.
CLOSE = """
UPDATE credit_refresh_batches AS b SET
    status = 'done', finished_at = clock_timestamp(), error = NULL,
    users_refreshed = c.refreshed, users_held = c.held, users_skipped = c.skipped, users_failed = c.failed,
    users_deferred = c.deferred, credits_granted = c.credits
FROM counts AS c
WHERE b.id = (SELECT id FROM batch)
RETURNING b.run_id, b.seq, b.users_refreshed, b.users_held, b.users_skipped, b.users_failed, b.users_deferred,
    b.credits_granted
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch's users, in the order in which `CLOSE` returns it. Credits are the sum of its grants."""

    run_id: UUID
    seq: int
    users_refreshed: int
    users_held: int
    users_skipped: int
    users_failed: int
    users_deferred: int
    credits_granted: int


def close_batch(connection: psycopg.Connection[Any], batch_id: int, statement: str) -> Outcome | None:
    """Do a batch by a statement that ends in `CLOSE`.

    Returns:
        What became of the users; None when somebody else has the batch or had it, or the service is paused.

    Raises:
        psycopg.Error: the statement changed nothing.
    """
    values = (batch_id, DEFERRED_BACKOFF_SECONDS, FEW_USERS)
    row = RawCursor(connection).execute(_numbered(statement), values, prepare=True).fetchone()
    return Outcome(*row) if row else None


@cache
def _numbered(statement: str) -> str:
    """The statement as PostgreSQL reads it. Given names, psycopg looks for them in its 8,000 characters every time."""
    for number, name in enumerate(("batch_id", "backoff_seconds", "few"), 1):
        statement = statement.replace(f"%({name})s", f"${number}")
    return statement.replace("%%", "%")
