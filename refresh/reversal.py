"""A rollback's batch: take back the grants that a run gave to at most 100 users.

    lock the batch and its users → (a younger snapshot) decide over the grant, the balance and the dates as they are now
    → mark the grant, history → from the rows that came back alone: users and audit → close the batch

Two statements in one transaction, unlike a batch that grants: a grant has the unique key behind it, but whether
somebody was refreshed since is a question to other rows, and a statement sees those as they were before it waited for
its locks. Users are locked as everywhere (docs/adr/0003-never-wait-holding-a-lock.md).

What is decided here is docs/runs.md's "Rollback". Opening one is rollback.py's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row

from db import transaction
from refresh.closing import CLOSE, DEFER, DEFERRED_BACKOFF_SECONDS, FEW_USERS, LOCK_SKIPPING, LOCK_WAITING, Outcome

if TYPE_CHECKING:
    import psycopg

# A second delivery finds the row locked, or no longer pending. The dates that a rollback moves back may lie before the
# end of the grant that it takes, which the triggers on users would not have.
_LOCK = """
WITH batch AS MATERIALIZED (
    SELECT b.id, b.user_ids
    FROM credit_refresh_batches AS b
    JOIN credit_refresh_runs AS r ON r.id = b.run_id
    WHERE b.id = %(batch_id)s AND b.status IS NOT DISTINCT FROM 'pending' AND r.status = 'running'
        AND r.work = 'rollback'
        AND r.dry_run = {dry_run} AND (SELECT enabled FROM settings)
    FOR UPDATE OF b SKIP LOCKED
),
locked AS MATERIALIZED (
    SELECT u.id FROM users AS u
    WHERE u.id = ANY ((SELECT user_ids FROM batch)::bigint[])
    {lock}
)
SELECT ARRAY(SELECT id FROM locked), set_config('credits.reopen', 'on', true) FROM batch
"""
_LOCK_MANY = _LOCK.format(dry_run="false", lock=LOCK_SKIPPING)
_LOCK_ONE = _LOCK.format(dry_run="false", lock=LOCK_WAITING)
_LOCK_NOBODY = _LOCK.format(dry_run="true", lock="ORDER BY u.id")

LIVE = "{grant}.status = 'refreshed' AND {grant}.reversed_by_run_id IS NULL"
"""In the form of the unique key over live grants."""

# Of a grant `g`, a balance `u.credit_balance` and what was asked for, `a`: what is taken, negative where it is given
# back, and the shortfall. Without reopening that is what was not there to be taken. With it, it is what the next
# grant's target is lowered by: what was lowered before, and what is still missing. A grant that fills up or resets pays
# off debts, those that --allow-negative makes, too, so they count as missing; and what this grant paid off of a debt
# was nothing that the user had from it. No grant lowers a balance by 2^63, so `take` has a negative.
MONEY = """
LATERAL (
    SELECT
        CASE WHEN a.allow_negative THEN g.credits_added ELSE n.there END AS take,
        least(greatest(CASE
            WHEN a.reopen AND g.grant_mode IN ('fill', 'reset')
                THEN n.missing + g.shortfall + least(g.old_balance, 0)
            ELSE CASE WHEN a.allow_negative THEN 0 ELSE n.missing END + CASE WHEN a.reopen THEN g.shortfall ELSE 0 END
        END, 0), 9223372036854775807)::bigint AS shortfall
    FROM (
        SELECT t.there, g.credits_added::numeric - t.there AS missing
        FROM (SELECT least(g.credits_added, greatest(u.credit_balance, 0)) AS there) AS t
    ) AS n
)
"""
FITS = "u.credit_balance::numeric - m.take BETWEEN -9223372036854775808 AND 9223372036854775807"

_DECIDE = f"""
WITH batch AS MATERIALIZED (
    SELECT
        b.id, b.run_id, b.seq, b.user_ids, b.attempts, r.requested_by, r.reason,
        r.metadata ->> 'correlationId' AS correlation_id,
        jsonb_build_object('reason', r.reason, 'reversedRun', r.subject_run_id) AS detail
    FROM credit_refresh_batches AS b
    JOIN credit_refresh_runs AS r ON r.id = b.run_id
    WHERE b.id = %(batch_id)s
),
asked AS MATERIALIZED (
    SELECT
        r.subject_run_id,
        coalesce((r.selection ->> 'reopen')::boolean, false) AS reopen,
        coalesce((r.selection ->> 'allowNegative')::boolean, false) AS allow_negative
    FROM batch AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
),
locked AS MATERIALIZED (
    SELECT u.id, u.credit_balance, u.last_credit_refresh, u.next_refresh_at, u.refresh_shortfall
    FROM users AS u
    WHERE u.id = ANY (%(locked)s::bigint[])
),
grants AS MATERIALIZED (
    SELECT DISTINCT ON (g.user_id) g.*
    FROM locked AS l
    JOIN credit_refresh_histories AS g ON g.user_id = l.id
    WHERE g.run_id = (SELECT subject_run_id FROM asked) AND {LIVE.format(grant="g")}
    ORDER BY g.user_id, g.id DESC
),
decided AS MATERIALIZED (
    SELECT
        g.id AS grant_id, g.user_id, g.window_start, g.window_end, g.plan_code, g.grant_mode, g.target,
        u.credit_balance, u.last_credit_refresh, u.next_refresh_at,
        CASE
            WHEN o.since THEN 'refreshed_since'
            WHEN {FITS} THEN 'reversed'
            ELSE 'overflow'
        END AS verdict,
        -m.take AS credits_added,
        m.shortfall,
        -- What lowers the next grant's target. A forced grant had made up for what the window before it still owed,
        -- and that window comes back.
        least(u.refresh_shortfall::numeric + CASE
            WHEN a.reopen THEN m.shortfall
            WHEN f.forced THEN g.shortfall
            ELSE 0
        END, 9223372036854775807)::bigint AS refresh_shortfall,
        CASE WHEN u.last_credit_refresh = g.created_at THEN g.previous_last_refresh ELSE u.last_credit_refresh END
            AS back_last_refresh,
        -- A forced grant had restarted the grid; a regular window is given back where that is asked for. Not where the
        -- date has moved on since, and never to before the end of another grant.
        CASE
            WHEN u.next_refresh_at = g.window_end AND (f.forced OR a.reopen)
                THEN CASE
                    WHEN g.previous_next_refresh_at IS NOT NULL THEN greatest(g.previous_next_refresh_at, o.until)
                END
            ELSE u.next_refresh_at
        END AS back_next_refresh_at
    FROM grants AS g
    JOIN locked AS u ON u.id = g.user_id
    CROSS JOIN asked AS a
    CROSS JOIN LATERAL (
        SELECT coalesce(bool_or(h.id > g.id), false) AS since, max(h.window_end) AS until
        FROM credit_refresh_histories AS h
        WHERE h.user_id = g.user_id AND h.id <> g.id AND {LIVE.format(grant="h")}
    ) AS o
    CROSS JOIN LATERAL (
        SELECT g.window_end IS NULL OR g.previous_next_refresh_at IS NULL
            OR g.previous_next_refresh_at > g.window_start AS forced
    ) AS f
    CROSS JOIN {MONEY} AS m
),
"""  # noqa: S608 - texts of this module alone

# The mark comes first: a grant that has one already moves no credits again.
_REVERSE = f"""
marked AS (
    UPDATE credit_refresh_histories AS h SET reversed_by_run_id = (SELECT run_id FROM batch)
    FROM decided AS d
    WHERE d.verdict = 'reversed' AND h.id = d.grant_id AND h.window_start = d.window_start
        AND {LIVE.format(grant="h")}
    RETURNING h.user_id
),
history AS (
    INSERT INTO credit_refresh_histories (
        run_id, user_id, status, window_start, window_end, plan_code, grant_mode, target, old_balance, credits_added,
        new_balance, previous_next_refresh_at, previous_last_refresh, shortfall, reason, error
    )
    SELECT
        b.run_id, d.user_id,
        CASE d.verdict WHEN 'reversed' THEN 'reversed' WHEN 'refreshed_since' THEN 'skipped' ELSE 'failed' END,
        d.window_start, d.window_end, d.plan_code, d.grant_mode, d.target, d.credit_balance,
        CASE d.verdict WHEN 'reversed' THEN d.credits_added ELSE 0 END,
        CASE d.verdict WHEN 'reversed' THEN d.credit_balance + d.credits_added ELSE d.credit_balance END,
        d.next_refresh_at, d.last_credit_refresh, CASE d.verdict WHEN 'reversed' THEN d.shortfall ELSE 0 END,
        CASE d.verdict WHEN 'refreshed_since' THEN 'refreshed_since' ELSE b.reason END,
        CASE d.verdict WHEN 'overflow' THEN 'the balance would not fit 64 bits' END
    FROM decided AS d CROSS JOIN batch AS b
    WHERE d.verdict <> 'reversed' OR d.user_id IN (SELECT user_id FROM marked)
    RETURNING user_id, status, credits_added, shortfall
),
moved AS (
    UPDATE users AS u SET
        credit_balance = u.credit_balance + h.credits_added,
        last_credit_refresh = d.back_last_refresh,
        next_refresh_at = d.back_next_refresh_at,
        refresh_shortfall = d.refresh_shortfall,
        updated_at = now()
    FROM decided AS d JOIN history AS h ON h.user_id = d.user_id
    WHERE u.id = d.user_id AND h.status = 'reversed'
),
audit AS (
    INSERT INTO credit_audit_logs (
        actor, action, user_id, run_id, balance_before, balance_after, credits, correlation_id, detail
    )
    SELECT
        b.requested_by, CASE h.status WHEN 'failed' THEN 'refresh_failed' ELSE h.status END, d.user_id, b.run_id,
        d.credit_balance, d.credit_balance + h.credits_added, h.credits_added, b.correlation_id,
        b.detail || CASE h.status
            WHEN 'reversed' THEN jsonb_build_object('shortfall', h.shortfall)
            WHEN 'skipped' THEN jsonb_build_object('skipped', d.verdict)
            ELSE jsonb_build_object('error', 'the balance would not fit 64 bits')
        END
    FROM history AS h JOIN decided AS d ON d.user_id = h.user_id CROSS JOIN batch AS b
),
reversals AS (SELECT user_id, credits_added FROM history WHERE status = 'reversed'),
"""  # noqa: S608 - texts of this module alone

# A plan changes no user, marks no grant, and shows up in nobody's history. Those who would be left alone are counted.
_PLAN = """
reversals AS (SELECT user_id, credits_added FROM decided WHERE verdict = 'reversed'),
history AS (
    INSERT INTO credit_refresh_histories (
        run_id, user_id, status, dry_run, window_start, window_end, plan_code, grant_mode, target, old_balance,
        credits_added, new_balance, previous_next_refresh_at, previous_last_refresh, shortfall, reason
    )
    SELECT
        b.run_id, d.user_id, 'planned', true, d.window_start, d.window_end, d.plan_code, d.grant_mode, d.target,
        d.credit_balance, d.credits_added, d.credit_balance + d.credits_added, d.next_refresh_at,
        d.last_credit_refresh, d.shortfall, b.reason
    FROM decided AS d CROSS JOIN batch AS b
    WHERE d.verdict = 'reversed'
    ON CONFLICT DO NOTHING -- whoever gives beat's reason as theirs gets no second row for a window
),
audit AS (
    INSERT INTO credit_audit_logs (actor, action, run_id, credits, correlation_id, detail)
    SELECT
        b.requested_by, 'planned', b.run_id, 0, b.correlation_id, b.detail || jsonb_build_object(
            'batch_id', b.id, 'users_planned', (SELECT count(*) FROM reversals),
            'credits_planned', (SELECT coalesce(sum(credits_added), 0) FROM reversals)
        )
    FROM batch AS b
),
"""

# Left alone, without a grant of the run any more, or deleted by the host: skipped.
_COUNT = """
counts AS (
    SELECT
        n.reversed AS refreshed, 0 AS held, n.failed,
        (SELECT count(*) FROM locked) - n.reversed - n.failed + (SELECT count(*) FROM missed WHERE NOT is_there)
            AS skipped,
        coalesce((SELECT sum(users) FROM deferred), 0) AS deferred,
        -- A statistic, where two grants of nearly 2^63 must not fail the batch.
        greatest(
            least(coalesce((SELECT sum(credits_added) FROM reversals), 0), 9223372036854775807), -9223372036854775807
        ) AS credits
    FROM (
        SELECT
            (SELECT count(*) FROM reversals) AS reversed,
            (SELECT count(*) FROM decided WHERE verdict = 'overflow') AS failed
    ) AS n
)
"""

REVERSE = _DECIDE + _REVERSE + DEFER + _COUNT + CLOSE
PLAN = _DECIDE + _PLAN + DEFER + _COUNT + CLOSE


def reverse_batch(connection: psycopg.Connection[Any], batch_id: int, *, dry_run: bool, lone: bool) -> Outcome | None:
    """Take back the grants of a batch's users; users who are locked by somebody else go to a new batch.

    Args:
        connection: in autocommit, or in a transaction.
        batch_id: of a run whose work is `rollback`.
        dry_run: whether that run is one: it records what it would do.
        lone: the batch has one user, and waits for them.

    Returns:
        What became of the users, those taken back as `users_refreshed`, with the credits as a negative sum; None when
        somebody else has the batch or had it, or the service is paused.

    Raises:
        psycopg.Error: nothing was changed.
    """
    lock = _LOCK_NOBODY if dry_run else _LOCK_ONE if lone else _LOCK_MANY
    with transaction(connection):
        taken = connection.execute(lock, {"batch_id": batch_id}, prepare=True).fetchone()
        if taken is None:
            return None
        values = {
            "batch_id": batch_id,
            "locked": taken[0],
            "backoff_seconds": DEFERRED_BACKOFF_SECONDS,
            "few": FEW_USERS,
        }
        with connection.cursor(row_factory=class_row(Outcome)) as cursor:
            return cursor.execute(PLAN if dry_run else REVERSE, values, prepare=True).fetchone()
