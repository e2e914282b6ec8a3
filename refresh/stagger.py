"""Stagger: dates for the users who have none, so that a first refresh of everybody does not come at one instant.

On a rolling plan they are spread evenly over the next interval, in the order of a hash of their external_id: the same
users get the same dates whoever asks, in whatever order they were imported. On a calendar plan, or with a day of their
own, everybody shares the plan's boundaries by design: they get the next one. Nothing is granted.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row

from db import one
from refresh.errors import RefusedError

if TYPE_CHECKING:
    import psycopg


@dataclass(frozen=True, slots=True)
class Day:
    """How many users of a plan are first refreshed on a day, in UTC."""

    plan_code: str
    day: date
    users: int


# `held` is no obstacle: a hold holds the window that falls due. Inactive users and plans are left alone until they are
# active: their dates would only pile up in the scan's index.
_UNSCHEDULED = """
FROM users AS u
WHERE u.next_refresh_at IS NULL AND u.active
    AND EXISTS (
        SELECT FROM plans AS p
        WHERE p.code = u.plan_code AND p.active AND p.cadence <> 'external'
            AND (%(plan)s::text IS NULL OR p.code = %(plan)s::text)
    )
"""
_COUNT = "SELECT count(*)" + _UNSCHEDULED
_KNOWN = "SELECT cadence FROM plans WHERE code = %(plan)s"

# Never waits for a lock: whoever is locked right now stays unscheduled, and is counted as left.
_LOCK = """
WITH locked AS MATERIALIZED (
    SELECT u.id, u.external_id, u.plan_code, u.credit_refresh_day, u.timezone
"""
_DATE = """
    ORDER BY u.id
    FOR NO KEY UPDATE OF u SKIP LOCKED
),
ranked AS (
    SELECT
        l.*, l.credit_refresh_day IS NULL AND p.cadence = 'rolling' AS rolling, p.cadence, p.interval_days,
        p.day_of_month, p.time_of_day, p.timezone AS plan_zone,
        row_number() OVER same AS place, count(*) OVER (PARTITION BY l.plan_code, l.credit_refresh_day IS NULL) AS users
    FROM locked AS l JOIN plans AS p ON p.code = l.plan_code
    WINDOW same AS (
        PARTITION BY l.plan_code, l.credit_refresh_day IS NULL
        ORDER BY hashtextextended(l.external_id, 0), l.external_id
    )
),
dated AS (
    UPDATE users AS u SET
        next_refresh_at = CASE
            -- In hours: a day would be the session's.
            WHEN r.rolling THEN now() + make_interval(hours => 24 * r.interval_days) * ((r.place - 0.5) / r.users)
            ELSE first_boundary(
                CASE r.cadence WHEN 'rolling' THEN 'monthly' ELSE r.cadence END,
                coalesce(r.credit_refresh_day, r.day_of_month), coalesce(r.time_of_day, '00:00'),
                coalesce(r.timezone, r.plan_zone), now()
            )
        END,
        updated_at = now()
    FROM ranked AS r
    WHERE u.id = r.id
    RETURNING u.plan_code, u.next_refresh_at
),
days AS (
    SELECT plan_code, (next_refresh_at AT TIME ZONE 'UTC')::date AS day, count(*) AS users
    FROM dated GROUP BY 1, 2
),
audit AS (
    INSERT INTO credit_audit_logs (actor, action, detail)
    SELECT
        %(actor)s, 'staggered',
        jsonb_build_object(
            'plan', %(plan)s::text, 'users', sum(p.users), 'plans', jsonb_object_agg(p.plan_code, p.users)
        )
    FROM (SELECT plan_code, sum(users) AS users FROM days GROUP BY 1) AS p
    HAVING count(*) > 0
)
SELECT plan_code, day, users FROM days ORDER BY plan_code, day
"""
_STAGGER = _LOCK + _UNSCHEDULED + _DATE


def count_unscheduled(connection: psycopg.Connection[Any], plan: str | None = None) -> int:
    """How many users `stagger_users()` would give a date.

    Raises:
        RefusedError: there is no such plan, or it has no dates to give.
    """
    if plan is not None:
        row = connection.execute(_KNOWN, {"plan": plan}).fetchone()
        if row is None:
            raise RefusedError(f"there is no plan {plan!r}")
        if row[0] == "external":
            raise RefusedError(f"plan {plan!r} is external: its users' dates come from elsewhere")
    (users,) = one(connection.execute(_COUNT, {"plan": plan}))
    return int(users)


def stagger_users(connection: psycopg.Connection[Any], *, actor: str, plan: str | None = None) -> list[Day]:
    """Give every unscheduled user a date: one statement, one audit row.

    Args:
        connection: in a transaction whose statements may take longer than a batch.
        actor: who asks, for the audit log.
        plan: of this plan alone.

    Returns:
        How many users each day has, by plan.
    """
    with connection.cursor(row_factory=class_row(Day)) as cursor:
        return cursor.execute(_STAGGER, {"actor": actor, "plan": plan}).fetchall()
