"""What lies ahead under one set of plans: one statement over the users, which writes nothing.

    users, each with the rule's answer at the instant of their next refresh → groups of one plan and one grid
    → the windows after it, walked once a group → refreshes and credits by day and plan

A million users on daily plans have thirty million windows a month, but share a few grids: only those are walked.

What the next refresh adds depends on what is spent until then, so there are two numbers, and the truth lies between:
the least, where nobody spends anything from now on, and the most, where everybody has spent everything by the instant
of each refresh that lies ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from refresh.regrid import CLOSED_UNTIL

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import date, datetime

    import psycopg

    from refresh.plans import Draft

STATES = ("later", "held", "inactive", "no_plan", "external", "unscheduled", "overflow")
"""Why somebody is not refreshed in the period. `later`: their next refresh, or the end of their hold, is after it."""


@dataclass(frozen=True, slots=True)
class Day:
    """What a day (UTC) brings a plan. A user who is refreshed twice on it counts twice."""

    plan_code: str
    day: date
    refreshes: int
    credits_least: int
    credits_most: int


@dataclass(frozen=True, slots=True)
class Total:
    """A plan's whole period, or everybody's.

    Attributes:
        users: who are refreshed at least once.
        refreshes: how often, all in all.
        credits_least: if nothing is spent from now on.
        credits_most: if everything is spent by each refresh that lies ahead.
    """

    users: int = 0
    refreshes: int = 0
    credits_least: int = 0
    credits_most: int = 0

    def __add__(self, other: Total) -> Total:
        return Total(
            self.users + other.users,
            self.refreshes + other.refreshes,
            self.credits_least + other.credits_least,
            self.credits_most + other.credits_most,
        )

    def __sub__(self, other: Total) -> Total:
        return self + Total(-other.users, -other.refreshes, -other.credits_least, -other.credits_most)

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "users": self.users,
            "refreshes": self.refreshes,
            "creditsLeast": self.credits_least,
            "creditsMost": self.credits_most,
        }


@dataclass(frozen=True, slots=True)
class Outlook:
    """The period under one set of plans.

    Attributes:
        days: in order; none for a day on which a plan refreshes nobody.
        plans: by code; plans that refresh nobody are not there.
        apart: how many users are not refreshed, by the reasons of `STATES`.
    """

    days: list[Day]
    plans: dict[str, Total]
    apart: dict[str, int]

    @property
    def total(self) -> Total:
        """Over all plans."""
        return sum(self.plans.values(), Total())

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            **self.total.facts(),
            "plans": [{"planCode": code, **total.facts()} for code, total in self.plans.items()],
            "days": [
                {
                    "day": day.day.isoformat(),
                    "planCode": day.plan_code,
                    "refreshes": day.refreshes,
                    "creditsLeast": day.credits_least,
                    "creditsMost": day.credits_most,
                }
                for day in self.days
            ],
            "notRefreshed": {_camel(state): self.apart[state] for state in STATES},
        }


_COLUMNS = """
    code, active, amount, grant_mode, rollover_cap, cadence, interval_days, day_of_month, time_of_day, timezone
"""
_PLANS = f"""
WITH RECURSIVE plan AS MATERIALIZED (
    SELECT {_COLUMNS}, false AS moved, false AS leaves_external FROM plans WHERE code <> ALL (%(codes)s::text[])
    UNION ALL
    SELECT {_COLUMNS}, moved, leaves_external
    FROM jsonb_to_recordset(%(changed)s) AS c (
        code text, active boolean, amount bigint, grant_mode text, rollover_cap bigint, cadence text,
        interval_days integer, day_of_month smallint, time_of_day time, timezone text, moved boolean,
        leaves_external boolean
    )
),
"""  # noqa: S608 - a text of this module alone

# OFFSET 0 keeps the planner from copying an expression into each place that names it.
_FIRST = """
-- Nobody before now. A plan that is changed moves its users' dates as refresh/regrid.py would.
dated AS (
    SELECT
        u.plan_code, u.active AS user_active, u.credit_balance, u.custom_credit_amount, u.refresh_shortfall,
        u.credit_refresh_day, u.timezone AS user_zone, p.*, d.due_at, h.endless,
        least(greatest(now(), d.due_at, CASE WHEN u.credit_refresh_hold AND NOT h.endless THEN u.hold_until END),
            %(until)s) AS at,
        CASE WHEN p.cadence = 'rolling' AND u.credit_refresh_day IS NOT NULL THEN 'monthly' ELSE p.cadence END AS grid,
        coalesce(u.custom_credit_amount, p.amount) AS full_amount
    FROM users AS u
    LEFT JOIN plan AS p ON p.code = u.plan_code
    CROSS JOIN LATERAL (
        SELECT u.credit_refresh_hold AND (u.hold_until IS NULL OR u.hold_until = 'infinity') AS endless
    ) AS h
    CROSS JOIN LATERAL (
        SELECT CASE
            WHEN p.moved IS NOT TRUE OR (u.next_refresh_at IS NULL AND NOT p.leaves_external) THEN u.next_refresh_at
            WHEN p.cadence = 'rolling' AND u.credit_refresh_day IS NULL
                THEN s.since
            ELSE first_boundary(
                CASE p.cadence WHEN 'rolling' THEN 'monthly' ELSE p.cadence END,
                coalesce(u.credit_refresh_day, p.day_of_month), coalesce(p.time_of_day, '00:00'),
                coalesce(u.timezone, p.timezone), s.since
            )
        END AS due_at
        FROM (
            SELECT CASE
                WHEN p.moved IS NOT TRUE THEN NULL
                WHEN u.next_refresh_at IS NULL THEN greatest(now(), {closed_until})
                ELSE least(u.next_refresh_at, {closed_until})
            END AS since
        ) AS s
        OFFSET 0
    ) AS d
    OFFSET 0
),
next_refresh AS (
    SELECT
        t.*, d.window_end, d.credits_added, t.credit_balance + d.credits_added AS balance,
        CASE
            WHEN d.verdict NOT IN ('due', 'overflow', 'not_due') THEN d.verdict
            WHEN d.verdict = 'not_due' OR t.at >= %(until)s THEN 'later'
            ELSE d.verdict
        END AS state,
        -- What is due already is granted by the next scan, before much can be spent.
        CASE
            WHEN t.at <= now() THEN d.credits_added
            ELSE credits_to_add(t.grant_mode, d.target, t.rollover_cap, least(t.credit_balance, 0))
        END AS most
    FROM dated AS t
    CROSS JOIN LATERAL decide(
        t.at, t.user_active, t.endless, NULL, t.due_at, t.credit_balance, t.custom_credit_amount,
        t.credit_refresh_day, t.user_zone, t.active, t.cadence, t.interval_days, t.day_of_month, t.time_of_day,
        t.timezone, t.grant_mode, t.amount, t.rollover_cap, t.refresh_shortfall
    ) AS d
    OFFSET 0
),
"""

# The windows that follow depend on the grid alone. A rolling grid steps by whole days, so that the day of a boundary
# says on which days all later ones fall.
#   whole   how many of the windows that follow add the full amount while nothing is spent: all of them under add; under
#           rollover until the balance is above the cap. The window after those adds `rest`, and later ones nothing.
_LATER = """
following AS (
    SELECT
        f.plan_code, f.state, CASE f.state WHEN 'due' THEN (f.at AT TIME ZONE 'UTC')::date END AS day,
        CASE f.state WHEN 'due' THEN f.credits_added END AS least, CASE f.state WHEN 'due' THEN f.most END AS most,
        n.next_at, n.grid, n.grid_day, n.zone, n.full_amount, w.whole,
        CASE
            WHEN f.grant_mode = 'rollover'
                THEN greatest(f.rollover_cap::numeric + f.full_amount - f.balance - w.whole::numeric * f.full_amount, 0)
            WHEN w.whole = 0 THEN coalesce(credits_to_add(f.grant_mode, f.full_amount, 0, f.balance), 0)
        END AS rest
    FROM next_refresh AS f
    LEFT JOIN LATERAL (
        SELECT
            CASE f.grid WHEN 'rolling' THEN date_trunc('day', f.window_end, 'UTC') ELSE f.window_end END AS next_at,
            f.grid, f.full_amount,
            CASE f.grid WHEN 'monthly' THEN coalesce(f.credit_refresh_day, f.day_of_month) END AS grid_day,
            CASE WHEN f.grid <> 'rolling' THEN coalesce(f.user_zone, f.timezone) END AS zone
    ) AS n ON f.state = 'due' AND f.window_end < %(until)s
    LEFT JOIN LATERAL (
        SELECT CASE
            WHEN f.grant_mode = 'add' THEN 1000
            WHEN f.grant_mode = 'rollover' AND f.balance <= f.rollover_cap
                THEN least(floor((f.rollover_cap::numeric - f.balance) / f.full_amount) + 1, 999)::integer
            ELSE 0
        END AS whole
        OFFSET 0
    ) AS w ON n.next_at IS NOT NULL
),
grouped AS MATERIALIZED (
    SELECT
        plan_code, state, day, next_at, grid, grid_day, zone, whole, count(*) AS users, sum(least) AS least,
        sum(most) AS most, sum(full_amount) AS full_amount, sum(rest) AS rest
    FROM following
    GROUP BY plan_code, state, day, next_at, grid, grid_day, zone, whole
),
started AS (
    SELECT plan_code, next_at, grid, grid_day, zone, whole, sum(users) AS users, sum(full_amount) AS full_amount,
        sum(rest) AS rest
    FROM grouped WHERE next_at IS NOT NULL
    GROUP BY plan_code, next_at, grid, grid_day, zone, whole
),
walk AS (
    SELECT
        1 AS place, s.plan_code, s.next_at AS at, s.grid, p.interval_days, s.grid_day,
        coalesce(p.time_of_day, '00:00') AS time_of_day, s.zone, s.whole, s.users, s.full_amount, s.rest
    FROM started AS s JOIN plan AS p ON p.code = s.plan_code
    UNION ALL
    SELECT
        k.place + 1, k.plan_code, w.window_end, k.grid, k.interval_days, k.grid_day, k.time_of_day, k.zone, k.whole,
        k.users, k.full_amount, k.rest
    FROM walk AS k
    CROSS JOIN LATERAL refresh_window(
        k.grid, k.interval_days, k.grid_day, k.time_of_day, k.zone, k.at, k.at
    ) AS w
    WHERE w.window_end < %(until)s
)
SELECT
    plan_code, state, day, sum(users)::bigint, sum(refreshes)::bigint, coalesce(sum(least), 0), coalesce(sum(most), 0)
FROM (
    SELECT plan_code, state, day, users, users AS refreshes, least, most FROM grouped
    UNION ALL
    SELECT
        plan_code, 'due', (at AT TIME ZONE 'UTC')::date, 0, users,
        CASE WHEN place <= whole THEN full_amount WHEN place = whole + 1 THEN rest ELSE 0 END, full_amount
    FROM walk
) AS all_of_them
GROUP BY plan_code, state, day
ORDER BY day, plan_code
"""
_FORECAST = _PLANS + _FIRST.format(closed_until=CLOSED_UNTIL.format(rows="")) + _LATER


def read_outlook(connection: psycopg.Connection[Any], until: datetime, drafts: list[Draft]) -> Outlook:
    """The refreshes from now on and before `until`, the start of a day in UTC, with these plans in place of theirs."""
    changed = [_changed(draft) for draft in drafts]
    parameters = {"until": until, "codes": [draft.after.code for draft in drafts], "changed": Jsonb(changed)}
    days: list[Day] = []
    by_plan: dict[str, Total] = {}
    apart = dict.fromkeys(STATES, 0)
    for code, state, day, users, refreshes, least, most in connection.execute(_FORECAST, parameters):
        if state != "due":
            apart[state] += users
            continue
        days.append(Day(code, day, refreshes, int(least), int(most)))
        by_plan[code] = by_plan.get(code, Total()) + Total(users, refreshes, int(least), int(most))
    return Outlook(days, dict(sorted(by_plan.items())), apart)


def _changed(draft: Draft) -> Mapping[str, Any]:
    values = draft.after.values()
    at = values["time_of_day"]
    return {
        **values,
        "time_of_day": at.isoformat() if at else None,
        # Where nobody moves, each date is on the new grid already.
        "moved": draft.users_moved > 0,
        "leaves_external": draft.leaves_external,
    }


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(word.title() for word in tail)
