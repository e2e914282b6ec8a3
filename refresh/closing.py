"""How every statement over a batch ends: users who stay locked go to a new batch, and the row is closed.

The statements differ in what they do to the users whom they have locked (batch.py grants and plans, regrid.py moves
dates). They share the CTE names `batch`, `locked`, `deferred` and `counts`.
"""

from __future__ import annotations

DEFERRED_RETRY_SECONDS = 5
"""How soon users whom somebody else had locked are tried again; upkeep's pace is what they really wait for."""

# A batch of one waits its turn, it holds nothing that a host could want; a batch of many never waits.
LOCK_WAITING = "ORDER BY u.id FOR NO KEY UPDATE"
LOCK_SKIPPING = f"{LOCK_WAITING} SKIP LOCKED"

DEFER = """
deferred AS (
    INSERT INTO credit_refresh_batches (run_id, seq, user_ids, attempts, next_attempt_at)
    SELECT b.run_id, b.seq, array_agg(u.id), b.attempts + 1, now() + make_interval(secs => %(deferred_seconds)s)
    FROM batch AS b
    JOIN users AS u ON u.id = ANY (b.user_ids)
    -- The usual batch has nobody to defer and does not look.
    WHERE (SELECT count(*) FROM locked) < (SELECT cardinality(user_ids) FROM batch)
        AND NOT EXISTS (SELECT FROM locked AS l WHERE l.id = u.id)
    GROUP BY b.run_id, b.seq, b.attempts
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
