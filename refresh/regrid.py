"""The regrid: a plan's users move to the grid that the plan has now, in batches that can be watched like any others.

    open: the users whose date would move → batches      (the door of runs.py)
    per batch, one statement: lock → first boundary at or after the present window's end → users, audit → close

Nothing is granted, and no date moves before the end of the last window granted, from which every change counts: where
an earlier change has moved a date ahead, changing back restores it. Until a user's batch is done they are on the old
date. Doing a batch twice, or after another change of the plan, moves users to where the plan says then. A single user's
plan, day or zone is the trigger keep_to_grid's business, under the same rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from db import one
from refresh import runs
from refresh.closing import CLOSE, DEFER, LOCK_SKIPPING, LOCK_WAITING
from refresh.selection import Chosen

if TYPE_CHECKING:
    from collections.abc import Mapping

    import psycopg

# A user's own day makes a rolling plan monthly for them; without one, a rolling grid begins wherever the present window
# ends.
_BOUNDARY = """
CASE WHEN p.cadence = 'rolling' AND u.credit_refresh_day IS NULL THEN s.since ELSE first_boundary(
    CASE p.cadence WHEN 'rolling' THEN 'monthly' ELSE p.cadence END,
    coalesce(u.credit_refresh_day, p.day_of_month), coalesce(p.time_of_day, '00:00'),
    coalesce(u.timezone, p.timezone), s.since
) END
"""

# The end of a user's last window, whether or not a rollback has taken its credits back since. Each branch is in the
# form of its index, and `rows` says which of its rows are read.
CLOSED_UNTIL = """
(
    SELECT max(c.window_end) FROM (
        (SELECT window_end FROM credit_refresh_histories
        WHERE user_id = u.id AND status = 'refreshed' AND reversed_by_run_id IS NULL AND window_end IS NOT NULL {rows})
        UNION ALL
        (SELECT window_end FROM credit_refresh_histories
        WHERE user_id = u.id AND status = 'refreshed' AND reversed_by_run_id IS NOT NULL AND window_end IS NOT NULL
        {rows})
    ) AS c
)
"""
# Months outside these days are not opened: half a user's history costs as much as all of the months do.
_DAYS_BEFORE = "AND window_start >= u.next_refresh_at - interval '{hours} hours' AND window_start < u.next_refresh_at"
# The usual user is the one whose date is their last window's end: 4 microseconds.
_STAYS = f"""
EXISTS (
    SELECT FROM credit_refresh_histories
    WHERE user_id = u.id AND status = 'refreshed' AND reversed_by_run_id IS NULL AND window_end > g.moves_from
        {_DAYS_BEFORE.format(hours=32 * 24)}
)
"""
_LATEST = "ORDER BY window_start DESC LIMIT 1"
_LAST_END = f"""
coalesce(
    {CLOSED_UNTIL.format(rows=_DAYS_BEFORE.format(hours=64 * 24) + " " + _LATEST)},
    {CLOSED_UNTIL.format(rows=_DAYS_BEFORE.format(hours=400 * 24) + " " + _LATEST)},
    {CLOSED_UNTIL.format(rows=_LATEST)}
)
"""

# Who would get another date. The plan comes as parameters, so that the same question can be asked before it is saved.
# A user without a date has one again when the plan leaves `external`; otherwise they are unscheduled, and stay so.
# Whose date is no boundary of the new grid moves, whatever their history. Of the others those move whom an earlier
# change has moved ahead of a boundary: their last window ended at `moves_from` or before. Who was never refreshed has
# no window to go back to. Over 300,000 users with 3,600,000 windows in 35 partitions it takes 0.3 to 1.2 seconds, and
# 3 where all of them were moved ahead.
_SELECTED = f"""
selected AS (
    SELECT u.id, NULL::text AS whole
    FROM users AS u
    CROSS JOIN (
        SELECT
            %(cadence)s::text AS cadence, %(day_of_month)s::smallint AS day_of_month,
            %(time_of_day)s::time AS time_of_day, %(timezone)s::text AS timezone
    ) AS p
    LEFT JOIN LATERAL refresh_window(
        CASE p.cadence WHEN 'rolling' THEN 'monthly' ELSE p.cadence END, 1,
        coalesce(u.credit_refresh_day, p.day_of_month), coalesce(p.time_of_day, '00:00'),
        coalesce(u.timezone, p.timezone), NULL, u.next_refresh_at - interval '1 microsecond'
    ) AS w ON p.cadence <> 'rolling' OR u.credit_refresh_day IS NOT NULL
    CROSS JOIN LATERAL (
        SELECT
            CASE WHEN p.cadence = 'rolling' AND u.credit_refresh_day IS NULL THEN u.next_refresh_at
                ELSE w.window_end END AS next_refresh_at,
            CASE WHEN p.cadence = 'rolling' AND u.credit_refresh_day IS NULL
                THEN u.next_refresh_at - interval '1 microsecond' ELSE w.window_start END AS moves_from
    ) AS g
    WHERE u.plan_code = %(code)s AND CASE
        WHEN u.next_refresh_at IS NULL THEN %(leaves_external)s
        WHEN g.next_refresh_at IS DISTINCT FROM u.next_refresh_at THEN true
        WHEN u.last_credit_refresh IS NULL THEN false
        WHEN {_STAYS} THEN false
        ELSE {_LAST_END} <= g.moves_from
    END
)
"""  # noqa: S608 - texts of this module alone
_COUNT = f"WITH {_SELECTED} SELECT count(*) FROM selected"  # noqa: S608 - the same

_MOVE = """
WITH batch AS MATERIALIZED (
    SELECT
        b.id, b.run_id, b.seq, b.user_ids, b.attempts, r.requested_by, r.selection ->> 'plan' AS plan_code,
        (r.selection ->> 'leavesExternal')::boolean AS leaves_external
    FROM credit_refresh_batches AS b
    JOIN credit_refresh_runs AS r ON r.id = b.run_id
    WHERE b.id = %(batch_id)s AND b.status IS NOT DISTINCT FROM 'pending' AND r.status = 'running'
        AND r.work = 'regrid'
        AND (SELECT enabled FROM settings)
    FOR UPDATE OF b SKIP LOCKED
),
locked AS MATERIALIZED (
    SELECT u.id, u.plan_code, u.next_refresh_at, u.credit_refresh_day, u.timezone
    FROM users AS u
    WHERE u.id = ANY ((SELECT user_ids FROM batch)::bigint[])
    {lock}
),
-- Whoever has left the plan meanwhile is on their new plan's grid already.
bounds AS MATERIALIZED (
    SELECT u.id, {boundary} AS next_refresh_at
    FROM batch AS b
    JOIN plans AS p ON p.code = b.plan_code
    JOIN locked AS u ON u.plan_code = p.code
    CROSS JOIN LATERAL (
        SELECT CASE
            -- One that a rollback has reopened has a date before its end.
            WHEN u.next_refresh_at IS NOT NULL THEN least(u.next_refresh_at, {closed_until})
            WHEN b.leaves_external THEN greatest(now(), {closed_until})
        END AS since
    ) AS s
),
moved AS (
    UPDATE users AS u SET next_refresh_at = n.next_refresh_at, updated_at = now()
    FROM bounds AS n
    WHERE u.id = n.id AND u.next_refresh_at IS DISTINCT FROM n.next_refresh_at
    RETURNING u.id
),
audit AS (
    INSERT INTO credit_audit_logs (actor, action, run_id, credits, detail)
    SELECT
        b.requested_by, 'regridded', b.run_id, 0,
        jsonb_build_object(
            'batch_id', b.id, 'plan', b.plan_code, 'users_moved', (SELECT count(*) FROM moved)
        )
    FROM batch AS b
),
"""
_COUNTS = """
counts AS (
    SELECT
        m.moved AS refreshed, 0 AS held, 0 AS failed, cardinality(b.user_ids) - m.moved - d.users AS skipped,
        d.users AS deferred, 0 AS credits
    FROM batch AS b
    CROSS JOIN (SELECT count(*) AS moved FROM moved) AS m
    CROSS JOIN (SELECT coalesce(sum(users), 0) AS users FROM deferred) AS d
)
"""


def _move(lock: str) -> str:
    return _MOVE.format(boundary=_BOUNDARY, closed_until=CLOSED_UNTIL.format(rows=""), lock=lock)


REGRID_MANY = _move(LOCK_SKIPPING) + DEFER + _COUNTS + CLOSE
REGRID_ONE = _move(LOCK_WAITING) + DEFER + _COUNTS + CLOSE


def count_moved(connection: psycopg.Connection[Any], plan: Mapping[str, Any], *, leaves_external: bool) -> int:
    """How many users would move if the plan were as `plan` says."""
    (users,) = one(connection.execute(_COUNT, {**plan, "leaves_external": leaves_external}))
    return int(users)


def open_regrid(
    connection: psycopg.Connection[Any],
    plan: Mapping[str, Any],
    *,
    leaves_external: bool,
    requested_by: str,
    batch_size: int,
) -> runs.Opened | None:
    """Open the run that moves a plan's users to its grid, in the transaction that saves the plan.

    It opens while the service is paused, too, and waits: `credits resume` lets it go on.

    Args:
        connection: in a transaction that holds the door (`runs.lock_door()`).
        plan: the plan's values as they are saved, by the names of the columns.
        leaves_external: whether its users had no dates until now.
        requested_by: who asks; the actor of the audit rows.
        batch_size: users in a transaction.

    Returns:
        The run; None when nobody moves.
    """
    request = runs.Request(
        "cli", requested_by, batch_size, kind="regrid", work="regrid", reason=f"plan {plan['code']} changed"
    )
    chosen = Chosen(
        _SELECTED,
        {**plan, "leaves_external": leaves_external},
        {"plan": plan["code"], "leavesExternal": leaves_external},
    )
    return runs.cut(connection, request, chosen)
