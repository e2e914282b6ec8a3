"""The windows ahead: the rule asked several times over in one statement. No date is computed in Python."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row

if TYPE_CHECKING:
    from collections.abc import Mapping

    import psycopg

WINDOWS = 6


@dataclass(frozen=True, slots=True)
class Window:
    """A window ahead, in UTC and in local time.

    Attributes:
        starts_at: when the user is refreshed; of a window that has come, when it began.
        ends_at: when the next one starts.
        wall: starts_at as the clock on the wall shows it.
        utc_offset: how far that clock is from UTC.
        zone: the clock's time zone.
        amount: the target of the refresh.
    """

    starts_at: datetime
    ends_at: datetime
    wall: datetime
    utc_offset: timedelta
    zone: str
    amount: int

    @property
    def local(self) -> datetime:
        """starts_at in local time, with its offset."""
        return self.wall.replace(tzinfo=timezone(self.utc_offset))

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "startsAt": self.starts_at.isoformat(),
            "endsAt": self.ends_at.isoformat(),
            "local": self.local.isoformat(),
            "timezone": self.zone,
            "amount": self.amount,
        }


_DECIDE = """
decide(
    {as_of}, true, false, NULL, {due_at}, 0, g.custom_amount, g.user_day, g.user_zone, true, g.cadence,
    g.interval_days, g.day_of_month, g.time_of_day, g.plan_zone, g.grant_mode, g.amount, g.rollover_cap
)
"""
_WALK = """
WITH RECURSIVE grid AS ({grid}),
walk AS (
    SELECT 1 AS n, d.window_start, d.window_end, d.target
    FROM grid AS g CROSS JOIN LATERAL {first} AS d
    WHERE d.window_end IS NOT NULL
    UNION ALL
    SELECT w.n + 1, d.window_start, d.window_end, d.target
    FROM walk AS w
    CROSS JOIN grid AS g
    CROSS JOIN LATERAL {following} AS d
    WHERE w.n < {windows}
)
SELECT
    w.window_start AS starts_at, w.window_end AS ends_at, w.window_start AT TIME ZONE z.zone AS wall,
    (w.window_start AT TIME ZONE z.zone) - (w.window_start AT TIME ZONE 'UTC') AS utc_offset, z.zone, w.target AS amount
FROM walk AS w
CROSS JOIN grid AS g
CROSS JOIN LATERAL (SELECT coalesce(g.user_zone, g.plan_zone) AS zone) AS z
ORDER BY w.n
"""


def _walk(grid: str) -> str:
    first = _DECIDE.format(as_of="g.as_of", due_at="g.due_at")
    following = _DECIDE.format(as_of="w.window_end", due_at="w.window_end")
    return _WALK.format(grid=grid, first=first, following=following, windows=WINDOWS)


# A held user's windows are those that follow the hold; where it has no end, those that follow a release right now.
_OF_USER = _walk("""
    SELECT
        u.next_refresh_at AS due_at,
        greatest(u.next_refresh_at, now(), CASE WHEN u.credit_refresh_hold THEN u.hold_until END) AS as_of,
        u.custom_credit_amount AS custom_amount, u.credit_refresh_day AS user_day, u.timezone AS user_zone,
        p.cadence, p.interval_days, p.day_of_month, p.time_of_day, p.timezone AS plan_zone, p.grant_mode, p.amount,
        p.rollover_cap
    FROM users AS u JOIN plans AS p ON p.code = u.plan_code
    WHERE u.id = %(user_id)s AND u.active AND p.active AND u.next_refresh_at IS NOT NULL
""")
_OF_PLAN = _walk("""
    SELECT
        now() AS due_at, now() AS as_of, NULL::bigint AS custom_amount, NULL::smallint AS user_day,
        NULL::text AS user_zone, %(cadence)s::text AS cadence, %(interval_days)s::integer AS interval_days,
        %(day_of_month)s::smallint AS day_of_month, %(time_of_day)s::time AS time_of_day,
        %(timezone)s::text AS plan_zone, %(grant_mode)s::text AS grant_mode, %(amount)s::bigint AS amount,
        %(rollover_cap)s::bigint AS rollover_cap
""")


def user_windows(connection: psycopg.Connection[Any], user_id: int) -> list[Window]:
    """A user's next windows, in the user's local time, else the plan's; none where nothing lies ahead."""
    return _read(connection, _OF_USER, {"user_id": user_id})


def plan_windows(connection: psycopg.Connection[Any], plan: Mapping[str, Any]) -> list[Window]:
    """The next windows of a user who starts now on a plan with these values; none when it is external."""
    return _read(connection, _OF_PLAN, plan)


def _read(connection: psycopg.Connection[Any], query: str, parameters: Mapping[str, Any]) -> list[Window]:
    with connection.cursor(row_factory=class_row(Window)) as cursor:
        return cursor.execute(query, parameters).fetchall()
