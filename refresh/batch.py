"""The batch: refresh at most 100 users in one transaction, which is one statement.

    lock the batch's users → decide (due? how much? which window?) → history, ON CONFLICT DO NOTHING
    → from the rows that came back alone: users and audit → close the batch

Running a batch again, at the same time or a day later, changes nothing: the second run finds the batch row locked or
no longer pending. The rule itself is `decide()` (migrations/sql/), which PostgreSQL inlines here.

Locks. A batch of many users never waits for a lock: users whom somebody else holds at this instant go to a new pending
batch. So it never holds one user while it waits for another, and cannot be part of a deadlock with a host that locks
in whatever order. A batch of one waits its turn, up to `lock_timeout`; it holds nothing that a host could want
(docs/adr/0003-never-wait-holding-a-lock.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refresh.closing import CLOSE, DEFER, DEFER_NOBODY, LOCK_ALL, LOCK_SKIPPING, LOCK_WAITING
from refresh.webhook_events import TELL_USERS

if TYPE_CHECKING:
    import psycopg


# A second delivery finds the row locked, or no longer pending once the first has committed.
TAKE = """
WITH batch AS MATERIALIZED (
    SELECT
        b.id, b.run_id, b.seq, b.user_ids, b.attempts, coalesce(r.as_of, now()) AS as_of, r.window_end, r.requested_by,
        r.reason, r.metadata ->> 'correlationId' AS correlation_id, r.force, r.keep_window, r.amount, r.subject_run_id,
        -- Beat's rows need none.
        CASE WHEN r.source <> 'beat' THEN jsonb_build_object('reason', r.reason) END AS detail
    FROM credit_refresh_batches AS b
    JOIN credit_refresh_runs AS r ON r.id = b.run_id
    -- Not `=`: that would admit the index over pending batches, which begins with the run and is then read whole.
    WHERE b.id = %(batch_id)s AND b.status IS NOT DISTINCT FROM 'pending' AND r.status = 'running'
        AND r.work = '{work}'
        AND r.dry_run = {dry_run} AND (SELECT enabled FROM settings)
    FOR UPDATE OF b SKIP LOCKED
),
-- users alone: joined to the plan here, a user would drop out when the plan changes while we wait.
locked AS MATERIALIZED (
    SELECT
        u.id, u.plan_code, u.credit_balance, u.last_credit_refresh, u.next_refresh_at, u.credit_refresh_hold,
        u.hold_until, u.held_window, u.credit_refresh_day, u.custom_credit_amount, u.timezone, u.active,
        u.refresh_shortfall
    FROM users AS u
    WHERE u.id = ANY ((SELECT user_ids FROM batch)::bigint[])
    {lock}
),
"""
# An apply takes and decides by the same texts, and compares before it grants.
DECIDE = """
    SELECT
        l.id AS user_id, l.plan_code, l.credit_balance, l.last_credit_refresh, l.next_refresh_at,
        l.refresh_shortfall, p.grant_mode, d.verdict, d.window_start,
        -- A billing period ends when Stripe says so: an external plan has no grid.
        coalesce(b.window_end, d.window_end) AS window_end,
        d.first_missed_at, d.windows_passed, d.target, d.credits_added,
        -- The window that falls due under hold leaves one row, however often somebody looks.
        d.verdict = 'held' AND l.next_refresh_at <= b.as_of AND d.window_start IS NOT NULL
            AND l.held_window IS DISTINCT FROM l.next_refresh_at AS newly_held
    FROM batch AS b
    CROSS JOIN locked AS l
    LEFT JOIN plans AS p ON p.code = l.plan_code
    CROSS JOIN LATERAL decide(
        b.as_of, l.active, l.credit_refresh_hold, l.hold_until, l.next_refresh_at, l.credit_balance,
        coalesce(b.amount, l.custom_credit_amount), l.credit_refresh_day, l.timezone,
        p.active, p.cadence, p.interval_days, p.day_of_month, p.time_of_day, p.timezone, p.grant_mode, p.amount,
        p.rollover_cap, l.refresh_shortfall, b.force, b.keep_window
    ) AS d
"""
_DECIDED = f"decided AS MATERIALIZED ({DECIDE}),"

# History first, balance second: what the unique key refuses moves no credits.
GRANT = """
history AS (
    INSERT INTO credit_refresh_histories (
        run_id, user_id, status, window_start, window_end, first_missed_at, windows_passed, plan_code, grant_mode,
        target, old_balance, credits_added, new_balance, previous_next_refresh_at, previous_last_refresh, shortfall,
        reason, error
    )
    SELECT
        b.run_id, d.user_id,
        CASE d.verdict WHEN 'due' THEN 'refreshed' WHEN 'held' THEN 'held' ELSE 'failed' END,
        d.window_start, d.window_end, d.first_missed_at, d.windows_passed, d.plan_code, d.grant_mode, d.target,
        d.credit_balance,
        CASE d.verdict WHEN 'due' THEN d.credits_added ELSE 0 END,
        CASE d.verdict WHEN 'due' THEN d.credit_balance + d.credits_added ELSE d.credit_balance END,
        d.next_refresh_at, d.last_credit_refresh, CASE d.verdict WHEN 'due' THEN d.refresh_shortfall ELSE 0 END,
        b.reason,
        CASE d.verdict WHEN 'overflow' THEN 'the balance would not fit 64 bits' END
    FROM decided AS d CROSS JOIN batch AS b
    WHERE d.verdict IN ('due', 'overflow') OR d.newly_held
    ON CONFLICT DO NOTHING
    RETURNING user_id, status, credits_added
),
moved AS (
    UPDATE users AS u SET
        credit_balance = u.credit_balance + coalesce(h.credits_added, 0),
        last_credit_refresh = CASE WHEN h.status = 'refreshed' THEN now() ELSE u.last_credit_refresh END,
        next_refresh_at = CASE
            -- A forced grant outside any grid has no end, and leaves the date as it is.
            WHEN d.newly_held OR d.window_end IS NULL THEN u.next_refresh_at
            WHEN h.status IS NOT NULL THEN d.window_end
            -- Refused by the key: to the end of what was granted, which another plan may have given another length. A
            -- function that is not inlined: a query here would open every month's partition for every batch.
            ELSE greatest(d.window_end, granted_until(u.id))
        END,
        refresh_shortfall = CASE WHEN h.status = 'refreshed' THEN 0 ELSE u.refresh_shortfall END,
        held_window = CASE WHEN d.newly_held THEN u.next_refresh_at END,
        -- A grant ends the hold that had run out.
        credit_refresh_hold = d.newly_held,
        hold_reason = CASE WHEN d.newly_held THEN u.hold_reason END,
        hold_until = CASE WHEN d.newly_held THEN u.hold_until END,
        updated_at = now()
    FROM decided AS d
    LEFT JOIN history AS h ON h.user_id = d.user_id
    WHERE u.id = d.user_id AND (d.verdict = 'due' OR d.newly_held)
    RETURNING d.verdict, h.status, h.credits_added
),
audit AS (
    INSERT INTO credit_audit_logs (
        actor, action, user_id, run_id, balance_before, balance_after, credits, correlation_id, detail
    )
    SELECT
        b.requested_by,
        CASE
            WHEN h.status = 'failed' THEN 'refresh_failed'
            WHEN d.verdict = 'due' THEN coalesce(h.status, 'already_granted')
            ELSE 'held'
        END,
        d.user_id, b.run_id, d.credit_balance, d.credit_balance + coalesce(h.credits_added, 0),
        coalesce(h.credits_added, 0), b.correlation_id, b.detail
    FROM decided AS d
    CROSS JOIN batch AS b
    LEFT JOIN history AS h ON h.user_id = d.user_id
    WHERE d.verdict = 'due' OR h.user_id IS NOT NULL
),
"""

COUNT = """
counts AS (
    SELECT
        m.refreshed, d.held, d.failed,
        -- Not due any more, without a plan, inactive, refused by the key; or deleted by the host since the scan.
        d.others + m.refused + (SELECT count(*) FROM missed WHERE NOT is_there) AS skipped,
        coalesce((SELECT sum(users) FROM deferred), 0) AS deferred,
        -- A statistic, where two grants of nearly 2^63 must not fail the batch.
        greatest(least(m.credits, 9223372036854775807), -9223372036854775807) AS credits
    FROM (
        SELECT
            count(*) FILTER (WHERE verdict = 'held') AS held,
            count(*) FILTER (WHERE verdict = '{failed}') AS failed,
            count(*) FILTER (WHERE verdict NOT IN ('due', 'held', '{failed}')) AS others
        FROM decided
    ) AS d
    CROSS JOIN (
        SELECT
            count(*) FILTER (WHERE status = 'refreshed') AS refreshed,
            count(*) FILTER (WHERE verdict = 'due' AND status IS NULL) AS refused,
            coalesce(sum(credits_added), 0) AS credits
        FROM moved
    ) AS m
)
"""

# What an apply must find unchanged of a planned row (apply.py), in the names of the history's columns. Instants as
# numbers: their text depends on the session.
DIGEST = """
sha256(convert_to(format('%%s|%%s|%%s|%%s|due|%%s|%%s|%%s', {row}.run_id, {row}.user_id,
    extract(epoch FROM {row}.window_start), extract(epoch FROM {row}.window_end), {row}.plan_code, {row}.grant_mode,
    {row}.target), 'UTF8'))
"""

# A dry run locks nobody and changes no user; beat's plan each user and window once (the unique key says so). A window
# that was granted already is not planned again: the key would refuse it.
_PLAN = """
planned AS MATERIALIZED (
    SELECT d.*, b.run_id, b.reason
    FROM decided AS d CROSS JOIN batch AS b
    WHERE d.verdict = 'due' AND NOT EXISTS (
        SELECT FROM credit_refresh_histories AS h
        WHERE h.user_id = d.user_id AND h.window_start = d.window_start AND h.status = 'refreshed'
            AND h.reversed_by_run_id IS NULL
        OFFSET 0 -- user by user: joined, without statistics, each is looked for among everybody's
    )
),
history AS (
    INSERT INTO credit_refresh_histories (
        run_id, user_id, status, dry_run, window_start, window_end, first_missed_at, windows_passed, plan_code,
        grant_mode, target, old_balance, credits_added, new_balance, previous_next_refresh_at, previous_last_refresh,
        shortfall, reason, digest
    )
    SELECT
        d.run_id, d.user_id, 'planned', true, d.window_start, d.window_end, d.first_missed_at, d.windows_passed,
        d.plan_code, d.grant_mode, d.target, d.credit_balance, d.credits_added, d.credit_balance + d.credits_added,
        d.next_refresh_at, d.last_credit_refresh, d.refresh_shortfall, d.reason, {digest}
    FROM planned AS d
    ON CONFLICT DO NOTHING
    RETURNING credits_added
),
counts AS (
    SELECT
        (SELECT count(*) FROM history) AS refreshed,
        (SELECT count(*) FROM decided WHERE verdict = 'held') AS held,
        (SELECT count(*) FROM decided WHERE verdict = 'overflow') AS failed,
        cardinality(b.user_ids) - (SELECT count(*) FROM history)
            - (SELECT count(*) FROM decided WHERE verdict IN ('held', 'overflow')) AS skipped,
        0 AS deferred,
        greatest(
            least(coalesce((SELECT sum(credits_added) FROM history), 0), 9223372036854775807), -9223372036854775807
        ) AS credits
    FROM batch AS b
),
audit AS (
    INSERT INTO credit_audit_logs (actor, action, run_id, credits, correlation_id, detail)
    SELECT
        b.requested_by, 'planned', b.run_id, 0, b.correlation_id,
        jsonb_build_object('batch_id', b.id, 'users_planned', c.refreshed, 'credits_planned', c.credits)
    FROM counts AS c CROSS JOIN batch AS b
)
"""

_CLOSED = COUNT.format(failed="overflow") + CLOSE


def _granting(lock: str, defer: str, *, tell: str = "") -> str:
    return TAKE.format(work="refresh", dry_run="false", lock=lock) + _DECIDED + GRANT + tell + defer + _CLOSED


GRANT_MANY = _granting(LOCK_SKIPPING, DEFER)
GRANT_ONE = _granting(LOCK_WAITING, DEFER)
GRANT_ALL = _granting(LOCK_ALL, DEFER_NOBODY)

# The same, for when a webhook endpoint wants to know of users.
TELL_MANY = _granting(LOCK_SKIPPING, DEFER, tell=TELL_USERS)
TELL_ONE = _granting(LOCK_WAITING, DEFER, tell=TELL_USERS)
TELL_ALL = _granting(LOCK_ALL, DEFER_NOBODY, tell=TELL_USERS)

PLAN = (
    TAKE.format(work="refresh", dry_run="true", lock="ORDER BY u.id")
    + _DECIDED
    + _PLAN.format(digest=DIGEST.format(row="d"))
    + CLOSE
)


# At DEBUG level alone, for those who read the log user by user.
_GRANTED = """
SELECT u.external_id, h.credits_added
FROM credit_refresh_batches AS b
JOIN credit_refresh_histories AS h ON h.user_id = ANY (b.user_ids) AND h.run_id = b.run_id
JOIN users AS u ON u.id = h.user_id
WHERE b.id = %(batch_id)s AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
ORDER BY h.user_id
"""


def granted_users(connection: psycopg.Connection[Any], batch_id: int) -> list[tuple[str, int]]:
    """The users whom a batch refreshed, with their credits."""
    return connection.execute(_GRANTED, {"batch_id": batch_id}).fetchall()
