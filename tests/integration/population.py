"""Plans of every cadence and mode, and made-up users on them, in every state that the rule knows."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from psycopg.types.json import Jsonb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.integration.world import World

CADENCES = ("rolling", "monthly", "daily", "external")
MODES = ("fill", "reset", "add", "rollover")
PLANS = [f"{cadence}-{mode}" for cadence in CADENCES for mode in MODES]
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Kiritimati", "Pacific/Apia")
LARGEST = 2**63 - 1
LARGE = 2**62

_PLANS = """
INSERT INTO plans (code, name, amount, grant_mode, rollover_cap, cadence, interval_days, day_of_month, time_of_day,
    timezone)
SELECT cadence || '-' || mode, mode, 1000, mode, 300, cadence, 7, 31, (now() AT TIME ZONE 'UTC')::time
    + interval '7 minutes', 'Europe/Berlin'
FROM unnest(%s::text[]) AS cadence CROSS JOIN unnest(%s::text[]) AS mode
UNION ALL SELECT 'retired', 'Retired', 1000, 'fill', NULL, 'rolling', 30, NULL, NULL, 'UTC'
"""
_USERS = """
INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at, credit_refresh_hold, hold_until,
    custom_credit_amount, credit_refresh_day, timezone, active, refresh_shortfall)
SELECT %s || '-' || n, plan, balance, at + due, hold, at + hold_for, custom, day, zone, active, coalesce(shortfall, 0)
FROM jsonb_to_recordset(%s) AS u (
    n integer, plan text, balance bigint, due interval, hold boolean, hold_for interval, custom bigint, day smallint,
    zone text, active boolean, shortfall bigint
)
CROSS JOIN coalesce(%s::timestamptz, now()) AS at
"""

# Never within minutes of now: what is not due when it is looked at must not become due before it is refreshed.
offsets = st.one_of(
    st.sampled_from([timedelta(minutes=-10), timedelta(days=-7, minutes=-5), timedelta(days=-400), timedelta(hours=1)]),
    st.integers(-90 * 24 * 60, -10).map(lambda minutes: timedelta(minutes=minutes)),
    st.none(),
)
ordinary = {
    "plan": st.one_of(st.sampled_from([*PLANS, "retired"]), st.sampled_from(PLANS[:12]), st.none()),
    "balance": st.one_of(st.integers(-2_000, 5_000), st.sampled_from([0, 300, 1_000])),
    "due": offsets,
    "hold": st.sampled_from([False, False, False, True]),
    "hold_for": st.sampled_from([None, None, timedelta(minutes=-10), timedelta(days=2)]),
    "custom": st.sampled_from([None, None, None, 1, 7_777]),
    "day": st.sampled_from([None, None, 1, 15, 29, 31]),
    "zone": st.sampled_from([None, *ZONES]),
    "active": st.sampled_from([True, True, True, True, False]),
    "shortfall": st.sampled_from([0, 0, 0, 250, 5_000]),
}


def users(**other: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    """Made-up users, of whom something is chosen otherwise."""
    return st.fixed_dictionaries({**ordinary, **other})


# Few, and one alone who gets or loses much: the sum of a run's credits has to fit, too. A shortfall might leave nothing
# to overflow.
overflowing = st.one_of(
    users(
        plan=st.sampled_from(["rolling-add", "monthly-add", "daily-add"]),
        balance=st.just(LARGEST),
        shortfall=st.just(0),
    ),
    users(
        plan=st.sampled_from(["rolling-fill", "monthly-reset", "daily-fill"]),
        balance=st.just(-LARGEST - 1),
        shortfall=st.just(0),
    ),
)
large = st.one_of(
    users(balance=st.sampled_from([LARGE, -LARGE])), users(custom=st.just(LARGE)), users(balance=st.just(-1))
)
populations = st.tuples(
    st.lists(users(), min_size=40, max_size=50), st.lists(overflowing, max_size=3), st.lists(large, max_size=1)
).map(lambda parts: [person for part in parts for person in part])


def add_plans(world: World) -> None:
    """One of each cadence and mode, and one that is retired.

    Their hour is such that no boundary falls within minutes of now, in no zone of ZONES.
    """
    world.sql.execute(_PLANS, (list(CADENCES), list(MODES)))
    world.sql.execute("UPDATE plans SET active = false WHERE code = 'retired'")


def add_users(world: World, name: str, people: Sequence[dict[str, Any]], at: object = None) -> None:
    """These users, with their dates counted from `at`, or from now."""
    rows = [{key: str(v) if isinstance(v, timedelta) else v for key, v in person.items()} for person in people]
    numbered = [{"n": n, **row} for n, row in enumerate(rows)]
    world.sql.execute(_USERS, (name, Jsonb(numbered), at))
