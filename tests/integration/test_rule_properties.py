"""The SQL rule against the oracle over made-up users, and what holds of it without one.

`make test` tries 2,000 users, `make test-long` a hundred times as many. The hard ones are forced: zones and the
instants at which their clocks change, 29 February, ends of months and years, and `as_of` on a boundary or a microsecond
beside it.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, time, timedelta, tzinfo
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.integration.rule import SESSIONS, Question, Rule, sessions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster

EXAMPLES = max(2_000, settings.default.max_examples if settings.default else 0)
LARGEST = 2**63 - 1
SMALLEST = -(2**63)
MICROSECOND = timedelta(microseconds=1)
MIDNIGHT = time(0)
WALKED_WINDOWS = 24

CLOCK_CHANGES = {
    "Europe/Berlin": ("2026-03-29T01:00Z", "2026-10-25T01:00Z"),
    "America/New_York": ("2026-03-08T07:00Z", "2026-11-01T06:00Z"),
    "America/St_Johns": ("2011-03-13T03:31Z", "2010-11-07T02:31Z", "2026-03-08T05:30Z"),
    "America/Nuuk": ("2026-03-29T01:00Z", "2026-10-25T01:00Z"),
    "America/Santiago": ("2026-09-06T04:00Z", "2026-04-05T03:00Z"),
    "America/Havana": ("2026-03-08T05:00Z", "2026-11-01T05:00Z"),
    "Australia/Lord_Howe": ("2026-10-03T15:30Z", "2026-04-04T15:00Z"),
    "Pacific/Auckland": ("2026-09-26T14:00Z", "2026-04-04T14:00Z"),
    "Pacific/Apia": ("2011-12-30T10:00Z", "2012-04-01T14:00Z"),
    "Pacific/Fakaofo": ("2011-12-30T11:00Z",),
    "Africa/Cairo": ("2026-04-23T22:00Z", "2026-10-29T21:00Z"),
    "Africa/Casablanca": ("2026-02-15T02:00Z", "2026-03-22T02:00Z"),
    "Asia/Tehran": ("2021-03-21T20:30Z", "2021-09-21T19:30Z"),
    "Asia/Kathmandu": ("2028-02-28T18:15Z",),
    "Pacific/Kiritimati": ("2026-12-31T10:00Z",),
    "Etc/GMT+12": ("2026-12-31T12:00Z",),
    "UTC": ("2024-02-29T00:00Z", "2100-02-28T00:00Z", "2026-12-31T00:00Z"),
    "CET": ("2026-03-29T01:00Z",),
}

UNLIKE_IN_PYTHON = {"America/Ojinaga"}
"""Python reads the newest form of this zone's file otherwise from 30 October to 6 November 2022: there its last
explicit change precedes the year from which its rule for all later years holds."""

zones = st.sampled_from(sorted(CLOCK_CHANGES))
hard_instants = st.sampled_from(
    sorted({datetime.fromisoformat(text) for texts in CLOCK_CHANGES.values() for text in texts})
)
nearby = st.one_of(
    st.integers(-1, 1).map(lambda n: n * MICROSECOND),
    st.integers(-96, 96).map(lambda n: timedelta(minutes=30 * n)),
    st.timedeltas(timedelta(days=-70), timedelta(days=70)),
)
instants = st.one_of(
    st.builds(lambda at, delta: at + delta, hard_instants, nearby),
    st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - UTC is added
)
elapsed = st.one_of(
    st.integers(0, 1).map(lambda n: n * MICROSECOND),
    st.timedeltas(timedelta(0), timedelta(days=3)),
    st.timedeltas(timedelta(0), timedelta(days=100)),
    st.timedeltas(timedelta(0), timedelta(days=1_000)),
    st.timedeltas(timedelta(0), timedelta(days=12 * 366)),
)
too_early = st.one_of(st.just(-MICROSECOND), st.timedeltas(timedelta(days=-1_000), timedelta(0)))
beside_boundary = st.one_of(st.none(), st.integers(-1, 1).map(lambda n: n * MICROSECOND))
"""How far from the end of the window `as_of` is moved to; None: not moved."""

days = st.one_of(st.sampled_from((1, 28, 29, 30, 31)), st.integers(1, 31))
times = st.one_of(
    st.sampled_from([time(hour, minute) for hour in (0, 1, 2, 3, 23) for minute in (0, 15, 30)]),
    st.sampled_from((time(0, 0, 0, 1), time(0, 0, 30), time(12), time(23, 59, 59, 999_999))),
    st.times(),
)
intervals = st.one_of(st.sampled_from((1, 7, 30, 365, 3_660)), st.integers(1, 3_660))
balances = st.one_of(
    st.integers(-10_000, 10_000),
    st.integers(SMALLEST, SMALLEST + 3),
    st.integers(LARGEST - 3, LARGEST),
    st.integers(SMALLEST, LARGEST),
)
targets = st.one_of(st.integers(1, 10_000), st.integers(LARGEST - 3, LARGEST), st.integers(1, LARGEST))
caps = st.one_of(st.integers(0, 10_000), st.integers(LARGEST - 3, LARGEST), st.integers(0, LARGEST))
modes = st.sampled_from(("fill", "reset", "add", "rollover"))
shortfalls = st.one_of(st.just(0), st.integers(0, 10_000), st.integers(LARGEST - 3, LARGEST), st.integers(0, LARGEST))
asked = st.builds(oracle.Asked, force=st.booleans(), keep_window=st.booleans(), amount=st.none() | targets)


@st.composite
def plans(draw: st.DrawFn) -> oracle.Plan:
    """A plan as the database admits it; its zone is the test's to set."""
    cadence = draw(st.sampled_from(("rolling", "monthly", "daily") * 3 + ("external",)))
    mode = draw(modes)
    return oracle.Plan(
        amount=draw(targets),
        grant_mode=mode,
        rollover_cap=draw(caps) if mode == "rollover" else draw(st.none() | caps),
        cadence=cadence,
        interval_days=draw(intervals),
        day_of_month=draw(days) if cadence == "monthly" else draw(st.none() | days),
        time_of_day=draw(times) if cadence == "daily" else draw(st.none() | times),
        active=draw(st.integers(0, 9)) > 0,
    )


@st.composite
def users(draw: st.DrawFn) -> oracle.User:
    """A user as the database admits them; their zone is the test's to set."""
    held = draw(st.integers(0, 4)) == 0
    return oracle.User(
        balance=draw(balances),
        next_refresh_at=draw(instants) if draw(st.integers(0, 19)) > 0 else None,
        held=held,
        hold_until=draw(st.none() | instants) if held else None,
        refresh_day=draw(days) if draw(st.booleans()) else None,
        custom_amount=draw(targets) if draw(st.integers(0, 3)) == 0 else None,
        active=draw(st.integers(0, 19)) > 0,
        shortfall=draw(shortfalls),
    )


def grids(cadences: tuple[str, ...] = ("rolling", "monthly", "daily")) -> st.SearchStrategy[oracle.Grid]:
    return st.builds(oracle.Grid, st.sampled_from(cadences), intervals, days, times, st.just(UTC))


@pytest.fixture(scope="module")
def rules(cluster: Cluster) -> Iterator[list[Rule]]:
    with sessions(cluster) as opened:
        yield opened


sessions_asked = st.integers(0, len(SESSIONS) - 1)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    sessions_asked,
    users(),
    plans() | st.none(),
    zones,
    st.none() | zones,
    elapsed | too_early,
    beside_boundary,
    instants,
    st.just(oracle.SCAN) | asked,
)
def test_sql_and_oracle_decide_alike(  # noqa: PLR0913, PLR0917 - one for each thing drawn
    rules: list[Rule],
    session: int,
    user: oracle.User,
    plan: oracle.Plan | None,
    plan_zone: str,
    user_zone: str | None,
    waited: timedelta,
    moved: timedelta | None,
    otherwise: datetime,
    run: oracle.Asked,
) -> None:
    rule = rules[session]
    user = replace(user, timezone=rule.zone(user_zone) if user_zone else None)
    plan = replace(plan, timezone=rule.zone(plan_zone)) if plan else None
    due = user.next_refresh_at
    as_of = due + waited if due else otherwise
    if plan and due and due <= as_of and moved is not None and (grid := oracle.grid_of(user, plan)):
        end = oracle.window(grid, due, as_of).end
        assert end is not None
        as_of = end + moved
    decision = rule.decide(user, plan, as_of, run)
    assert decision == oracle.decide(user, plan, as_of, run)
    if decision.verdict == "due":
        assert decision.window is not None
        start, end = decision.window.start, decision.window.end
        # A grant's window has begun, and no date moves back: least of all by force.
        assert start <= as_of
        assert end is None or (end > as_of and (due is None or end >= due))
        assert run.force or (end is not None and due is not None and due <= start)
        # Without force, and for whoever is due anyway, the run may ask for what it likes.
        if due is not None and due <= as_of and plan is not None and plan.cadence != "external":
            assert decision.window == rule.decide(user, plan, as_of).window


@settings(max_examples=EXAMPLES // 4, deadline=None)
@given(sessions_asked, grids(), zones, instants, elapsed)
def test_windows_tile_time(  # noqa: PLR0913, PLR0917 - one for each thing drawn
    rules: list[Rule], session: int, grid: oracle.Grid, zone: str, due: datetime, waited: timedelta
) -> None:
    rule, as_of = rules[session], due + waited
    grid = replace(grid, timezone=rule.zone(zone))
    walked = rule.walk(grid, due, as_of, steps=WALKED_WINDOWS)
    assert len(walked) == WALKED_WINDOWS
    ends = [window.end for window in walked if window.end is not None]
    assert due <= walked[0].start <= as_of < ends[0]
    for before, after, end in zip(ends, walked[1:], ends[1:], strict=False):
        assert before == after.start < end
        assert after.passed == 0
    # Whoever was not refreshed in between has the same windows: from their first instant to their last.
    first = rule.windows([(grid, due, window.start) for window in walked])
    last = rule.windows([(grid, due, end - MICROSECOND) for end in ends])
    assert first == last
    assert [(window.start, window.end) for window in first] == [(window.start, window.end) for window in walked]
    assert first[0].passed == walked[0].passed
    assert all(before.passed < after.passed for before, after in pairwise(first))


@settings(max_examples=EXAMPLES, deadline=None)
@given(sessions_asked, modes, targets, caps, balances)
def test_credits(rules: list[Rule], session: int, mode: str, target: int, cap: int, balance: int) -> None:  # noqa: PLR0913, PLR0917
    added = rules[session].credits(mode, target, cap, balance)
    assert added == oracle.credits(mode, target, cap, balance)
    if added is None:
        assert max(abs(balance), target, cap) > LARGEST // 2
        return
    afterwards = balance + added
    assert SMALLEST <= min(added, afterwards) <= max(added, afterwards) <= LARGEST
    if mode == "fill":
        assert added >= 0
        assert afterwards == balance or (afterwards == target > balance)
    elif mode == "reset":
        assert afterwards == target
    elif mode == "add":
        assert added == target
    else:
        assert added <= target
        assert afterwards <= cap + target
        assert (added == target) == (balance <= cap)


def test_every_zone_reads_alike_around_its_clock_changes(rules: list[Rule]) -> None:
    for session, rule in enumerate(rules):
        names = [name for name in rule.zone_names if name not in UNLIKE_IN_PYTHON]
        assert len(names) > 400
        # Each session takes its share.
        asked = [
            question
            for name in names[session :: len(rules)]
            for changed in clock_changes(rule.zone(name))
            for question in questions_around(changed, rule.zone(name))
        ]
        assert len(asked) > 5_000
        wrong = [
            (question, found, wanted)
            for question, found in zip(asked, rule.windows(asked), strict=True)
            if found != (wanted := oracle.window(*question))
        ]
        assert wrong == []


def test_every_clock_change_of_the_hard_zones_is_met_on_the_microsecond(rules: list[Rule]) -> None:
    for rule in rules:
        asked = [
            question
            for name, changes in CLOCK_CHANGES.items()
            for changed in changes
            for question in questions_around(datetime.fromisoformat(changed), rule.zone(name))
        ]
        assert rule.windows(asked) == [oracle.window(*question) for question in asked]


def clock_changes(zone: tzinfo) -> Iterator[datetime]:
    """Noon of the days of 2026 at whose end a zone's offset is another than at their beginning."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    while at.year == 2026:
        after = at + timedelta(days=1)
        if at.astimezone(zone).utcoffset() != after.astimezone(zone).utcoffset():
            yield at + timedelta(hours=12)
        at = after


def questions_around(changed: datetime, zone: tzinfo) -> Iterator[Question]:
    """Daily and monthly grids whose boundaries fall in the hours about an instant, asked about beside each of them."""
    due = changed - timedelta(days=3)
    local_day = changed.astimezone(zone).day
    for time_of_day in (MIDNIGHT, time(0, 30), time(1, 30), time(1, 45), time(2, 0), time(2, 30), time(23, 30)):
        for grid in (
            oracle.Grid("daily", 30, None, time_of_day, zone),
            oracle.Grid("monthly", 30, local_day, time_of_day, zone),
            oracle.Grid("monthly", 30, 31, time_of_day, zone),
        ):
            for boundary in islice((b for b in oracle.boundaries(grid, due) if b > due), 6 if grid.day is None else 1):
                for beside in (-MICROSECOND, timedelta(0), MICROSECOND):
                    yield grid, due, boundary + beside
