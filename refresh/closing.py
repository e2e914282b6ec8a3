"""How every statement over a batch ends: users who stay locked go to a new batch, and the row is closed.

The statements differ in what they do to the users whom they have locked (batch.py grants and plans, regrid.py moves
dates). They share the CTE names `batch`, `locked`, `missed`, `deferred` and `counts`.
"""

from __future__ import annotations

DEFERRED_BACKOFF_SECONDS = 5
"""How soon users whom somebody else had locked are tried again, twice as late each time; upkeep's pace comes on top."""
FEW_USERS = 10
"""Up to so many, users who are locked twice in a row get a batch each. A host that locks a million gets no million
batches."""

# A batch of one waits its turn, it holds nothing that a host could want; a batch of many never waits.
LOCK_WAITING = "ORDER BY u.id FOR NO KEY UPDATE"
LOCK_SKIPPING = f"{LOCK_WAITING} SKIP LOCKED"

DEFER = """
-- Users of the batch who were not locked: somebody else has them, or the host has deleted them since the scan. The
-- usual batch has none and does not look.
missed AS MATERIALIZED (
    SELECT id, EXISTS (SELECT FROM users AS u WHERE u.id = m.id) AS is_there
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
