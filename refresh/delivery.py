"""Delivery: which batches have to be (re-)published, and what becomes of those that fail.

Redis is a doorbell and its acknowledgements prove nothing (docs/adr/0002-redis-is-a-doorbell.md), so a batch is
delivered when its row says that it is done, and until then this module decides when to ring again. Only upkeep
retries; Celery never does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from refresh.pacing import AHEAD_SECONDS_MAX

if TYPE_CHECKING:
    from uuid import UUID

    import psycopg

# A batch takes milliseconds. What was published longer ago than this and neither waits in the queue nor is locked by a
# worker was lost, or its worker died. Should a live worker have it in hand after all, it is rung for twice and done
# once.
LOST_AFTER_SECONDS = 15
# What was claimed has been pushed, or was given up, after this: a broker's time limits (celeryconfig.py).
PUSH_SECONDS_MAX = 15
# Of a worker that waits for its turn in a paced run, these wait with it: what it has fetched ahead
# (celeryconfig.worker_prefetch_multiplier) and what it has in hand.
FETCHED_MESSAGES = 5
OVERDUE_SECONDS = 600
"""A run whose youngest pending batch was published longer ago than this is rung for again, even if its messages may
still wait in a long queue."""
# 10 s, 20 s, 40 s, … at most an hour between two attempts.
BACKOFF_SECONDS = 10
BACKOFF_MAX_SECONDS = 3_600

CLAIM_LIMIT = 10_000
"""Batches claimed at once: a million users of 100 each; a list of that many ids is a few hundred kilobytes."""

# published_at is NULL until the first ring; next_attempt_at is set while a failed or deferred batch waits its backoff.
# A batch locked by its worker is being done: SKIP LOCKED leaves it alone.
_CLAIM = """
WITH
-- A run is rung for again as a whole, or not at all: the order in which its batches were published tells which of them
-- others have overtaken.
quiet AS MATERIALIZED (
    SELECT r.id
    FROM credit_refresh_runs AS r
    WHERE %(ring_again)s AND r.status = 'running' AND NOT EXISTS (
        SELECT FROM credit_refresh_batches AS y
        WHERE y.run_id = r.id AND y.status = 'pending' AND y.published_at >= now() - make_interval(secs => %(overdue)s)
        OFFSET 0 -- run by run, by the index over pending batches
    )
),
due AS (
    SELECT b.id
    FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
    WHERE b.status = 'pending' AND r.status = 'running' AND (SELECT enabled FROM settings)
        AND (r.slot IS NOT NULL) = %(scheduled)s
        AND (%(paced)s::boolean IS NULL OR (r.max_users_per_second IS NOT NULL) = %(paced)s)
        AND (%(run_id)s::uuid IS NULL OR b.run_id = %(run_id)s::uuid)
        AND b.attempts < %(max_attempts)s
        AND CASE
            WHEN b.next_attempt_at IS NOT NULL THEN b.next_attempt_at <= now()
            -- With messages in the queue ours may be among them: ring again, much later, and call it no attempt. Not
            -- for a paced run whose turns are being taken.
            WHEN b.published_at IS NOT NULL THEN
                b.run_id IN (SELECT id FROM quiet)
                AND greatest(b.published_at, r.paced_until) < now() - make_interval(secs => %(overdue)s)
            ELSE true
        END
    ORDER BY b.id
    LIMIT %(limit)s
    FOR NO KEY UPDATE OF b SKIP LOCKED
)
UPDATE credit_refresh_batches AS b SET
    published_at = now(),
    next_attempt_at = NULL
FROM due
WHERE b.id = due.id
RETURNING b.id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Which batches to publish.

    Attributes:
        scheduled: of beat's runs, or of those that somebody asked for: each has a queue.
        max_attempts: batches that were tried this often are left to `give_up_batches()`.
        run_id: of a run that was just opened; None: of all, for upkeep.
        paced: of runs that have a pace, or of those that have none; None: of both.
        ring_again: those too of runs of which all that is pending was published `OVERDUE_SECONDS` ago and may still
            wait in the queue; upkeep takes them while the queue is short.
        limit: how many at most.
    """

    scheduled: bool
    max_attempts: int
    run_id: UUID | None = None
    paced: bool | None = None
    ring_again: bool = False
    limit: int = CLAIM_LIMIT


def claim_batches(connection: psycopg.Connection[Any], claim: Claim) -> list[int]:
    """Mark batches as published now, oldest first; publish them once this is committed."""
    return sorted(id_ for (id_,) in connection.execute(_CLAIM, {**asdict(claim), "overdue": OVERDUE_SECONDS}))


_UNCLAIM = """
UPDATE credit_refresh_batches AS b SET published_at = NULL
FROM (
    SELECT id FROM credit_refresh_batches
    WHERE id = ANY (%(ids)s) AND status IS NOT DISTINCT FROM 'pending' -- not `=`: see TAKE (batch.py)
    FOR NO KEY UPDATE SKIP LOCKED -- a worker that has one got its message after all
) AS unsent
WHERE b.id = unsent.id
"""


def unclaim_batches(connection: psycopg.Connection[Any], batch_ids: list[int]) -> None:
    """The broker did not take them, or their worker may not work: upkeep rings again, and it was nobody's attempt."""
    connection.execute(_UNCLAIM, {"ids": batch_ids})


_FAIL = """
UPDATE credit_refresh_batches AS b SET
    attempts = b.attempts + 1,
    error = %(error)s,
    next_attempt_at = now()
        + make_interval(secs => least(%(backoff_max)s, %(backoff)s * 2 ^ least(b.attempts, 20)))
FROM (
    SELECT id FROM credit_refresh_batches
    WHERE id = %(batch_id)s AND status IS NOT DISTINCT FROM 'pending' -- the same
    FOR NO KEY UPDATE SKIP LOCKED -- whoever has it now decides what becomes of it
) AS tried
WHERE b.id = tried.id
RETURNING b.attempts
"""


def record_failure(connection: psycopg.Connection[Any], batch_id: int, error: str) -> int:
    """A batch's statement failed, and so changed nothing: note it in a transaction of its own.

    Returns:
        The attempts so far; 0 when somebody else has meanwhile done the batch.
    """
    parameters = {"batch_id": batch_id, "error": error, "backoff": BACKOFF_SECONDS, "backoff_max": BACKOFF_MAX_SECONDS}
    row = connection.execute(_FAIL, parameters).fetchone()
    return row[0] if row else 0


# A worker that dies with a batch leaves no trace but this: published, gone from the queue, still pending. Gone from the
# queue is everything when the queue is empty, and, since a queue is taken from its head, what was put in before a batch
# that is done. That one is trusted if it was published once: of a batch that was tried before nobody knows by which of
# its messages it was done. Batches are published in the order of their ids.
_LOST = """
WITH running AS MATERIALIZED (
    SELECT
        r.id, r.paced_until,
        -- While workers wait for turns, what they have fetched waits with them: five minutes, should a clock that was
        -- set back make it look like more.
        now() - make_interval(secs => %(lost_after)s) - %(fetched)s * least(
            greatest(max(r.paced_until) OVER () - now(), interval '0'), make_interval(secs => %(ahead_seconds_max)s)
        ) AS before,
        (r.slot IS NOT NULL) = %(scheduled)s AS concerned
    FROM credit_refresh_runs AS r
    WHERE r.status = 'running' AND (SELECT enabled FROM settings)
),
frontier AS MATERIALIZED (
    SELECT
        r.id AS run_id, r.paced_until, r.before, f.published_at, f.id,
        -- Of all runs in the queue, for those of which nothing later is there to overtake. Publishers of two runs may
        -- push in another order than they have claimed, within some seconds.
        max(f.published_at) OVER () - make_interval(secs => %(push)s) AS published_for_certain
    FROM running AS r
    LEFT JOIN LATERAL (
        SELECT d.published_at, d.id
        FROM credit_refresh_batches AS d
        WHERE d.run_id = r.id AND d.status = 'done' AND d.attempts = 0 AND d.finished_at < r.before
            AND d.published_at IS NOT NULL
        ORDER BY d.published_at DESC, d.id DESC
        LIMIT 1
    ) AS f ON true
    WHERE r.concerned
)
UPDATE credit_refresh_batches AS b SET
    attempts = b.attempts + 1,
    -- The first time at once; a worker that dies again and again must not use up all attempts in a minute.
    next_attempt_at = now() + CASE WHEN b.attempts = 0 THEN interval '0'
        ELSE make_interval(secs => least(%(backoff_max)s, %(backoff)s * 2 ^ least(b.attempts - 1, 20))) END,
    error = 'its worker died, or its message was lost'
FROM (
    SELECT b.id
    FROM credit_refresh_batches AS b JOIN frontier AS f ON f.run_id = b.run_id
    WHERE b.status = 'pending' AND b.next_attempt_at IS NULL AND (
        -- While turns are taken, the run's last batches wait in workers' hands.
        %(queue_empty)s AND b.published_at < f.before AND coalesce(f.paced_until < f.before, true)
        OR (b.published_at, b.id) < (f.published_at, f.id)
        OR b.published_at < f.published_for_certain AND coalesce(f.paced_until < f.before, true)
    )
    FOR NO KEY UPDATE OF b SKIP LOCKED
) AS lost
WHERE b.id = lost.id
RETURNING b.id
"""


def record_losses(connection: psycopg.Connection[Any], *, scheduled: bool, queue_empty: bool = True) -> int:
    """Count an attempt for each batch that was published, is not being done and waits in no queue.

    Args:
        connection: in autocommit.
        scheduled: of beat's runs, or of those that somebody asked for: each has a queue.
        queue_empty: whether that queue was empty before this was called; if not, only those batches were lost for
            certain that others of their run have overtaken, or of another run that was published well after theirs.

    Returns:
        How many were lost; they are claimed again at once, and those that were lost before after a backoff.
    """
    parameters = {
        "scheduled": scheduled,
        "queue_empty": queue_empty,
        "lost_after": LOST_AFTER_SECONDS,
        "fetched": FETCHED_MESSAGES,
        "ahead_seconds_max": AHEAD_SECONDS_MAX,
        "push": PUSH_SECONDS_MAX,
        "backoff": BACKOFF_SECONDS,
        "backoff_max": BACKOFF_MAX_SECONDS,
    }
    return connection.execute(_LOST, parameters).rowcount


_GIVE_UP = """
UPDATE credit_refresh_batches AS b SET
    status = 'failed', finished_at = clock_timestamp(), next_attempt_at = NULL,
    error = coalesce(b.error, 'its users stayed locked by another session')
FROM (
    SELECT id FROM credit_refresh_batches
    WHERE status = 'pending' AND attempts >= %(max_attempts)s
        AND (next_attempt_at IS NOT NULL OR published_at IS NULL)
    FOR NO KEY UPDATE SKIP LOCKED
) AS spent
WHERE b.id = spent.id
RETURNING b.id, b.run_id, b.error
"""


def give_up_batches(connection: psycopg.Connection[Any], *, max_attempts: int) -> list[tuple[int, UUID, str]]:
    """Fail the batches that were tried `max_attempts` times. Their users are due again at the next scan.

    Returns:
        Each batch's id, run and error.
    """
    return connection.execute(_GIVE_UP, {"max_attempts": max_attempts}).fetchall()


MESSAGE_IDS_MAX = 16
MESSAGES_ENOUGH = 50
"""Messages that keep a handful of workers evenly busy to a run's end."""
QUEUE_DEEP_MESSAGES = 10_000
"""Messages in a queue, about 10 MB of Redis, beyond which publishing waits for upkeep. With 16 batches of 100 users
each, it is what two workers do in seven minutes."""


def message_ids_max(*, paced: bool) -> int:
    """How many batches a message carries at most.

    Of a paced run one: a worker takes from its queues in turn, message by message, and each of these batches waits.
    """
    return 1 if paced else MESSAGE_IDS_MAX


def messages(batch_ids: list[int], *, paced: bool = False) -> list[list[int]]:
    """Cut claimed batches into messages: one id each while there are few, several when there are many.

    A message costs a worker about 0.7 ms, a batch of 100 users about 1.5 ms. So a small run spreads over all workers
    at once, and a large one pays for its messages once in `MESSAGE_IDS_MAX` batches.
    """
    size = max(1, min(message_ids_max(paced=paced), len(batch_ids) // MESSAGES_ENOUGH))
    return [batch_ids[i : i + size] for i in range(0, len(batch_ids), size)]
