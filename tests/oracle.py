"""The rule a second time, in plain Python, from docs/rule.md and not from the SQL: what the tests hold the SQL against.

Slow on purpose: it lists a user's boundaries one by one and looks at each. Nothing but tests may import it, because the
rule of the service is the database's. Instants are aware datetimes in UTC, credits are integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MIDNIGHT = time(0, 0)
ONE_DAY = timedelta(days=1)
SIXTY_FOUR_BITS = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Plan:
    """A plan's columns that matter to the rule."""

    amount: int = 1_000
    grant_mode: str = "fill"
    rollover_cap: int | None = None
    cadence: str = "rolling"
    interval_days: int = 30
    day_of_month: int | None = None
    time_of_day: time | None = None
    timezone: tzinfo = UTC
    active: bool = True


@dataclass(frozen=True)
class User:
    """A user's columns that matter to the rule."""

    balance: int = 400
    next_refresh_at: datetime | None = None
    held: bool = False
    hold_until: datetime | None = None
    refresh_day: int | None = None
    custom_amount: int | None = None
    timezone: tzinfo | None = None
    active: bool = True
    shortfall: int = 0


@dataclass(frozen=True)
class Asked:
    """What a run was asked for that matters to the rule."""

    force: bool = False
    keep_window: bool = False
    amount: int | None = None


SCAN = Asked()


@dataclass(frozen=True)
class Grid:
    """What a user's boundaries follow from, once user and plan are settled."""

    cadence: str
    interval_days: int
    day: int | None
    time_of_day: time
    timezone: tzinfo


@dataclass(frozen=True)
class Window:
    """A window, and what was missed before it. One that was forced outside any grid has no end."""

    start: datetime
    end: datetime | None
    passed: int
    first_missed_at: datetime | None


@dataclass(frozen=True)
class Decision:
    """A verdict and the facts beside it. No window: nothing is granted, and none has fallen due under a hold."""

    verdict: str
    window: Window | None
    target: int | None
    credits_added: int | None


def wall_to_instant(day: date, time_of_day: time, zone: tzinfo) -> datetime:
    """The instant at which a wall clock shows this; where it never does or does so twice, the later reading."""
    readings = [datetime.combine(day, time_of_day.replace(fold=fold), tzinfo=zone).astimezone(UTC) for fold in (0, 1)]
    return max(readings)


def days_in_month(year: int, month: int) -> int:
    next_month = date(year + 1, 1, 1) if month == 12 else date(year, month + 1, 1)
    return (next_month - date(year, month, 1)).days


def boundaries(grid: Grid, due: datetime) -> Iterator[datetime]:
    """A grid's boundaries in order, without end, from some way before the due instant. A rolling grid begins there."""
    if grid.cadence == "rolling":
        for windows in count():
            yield due + windows * timedelta(hours=24 * grid.interval_days)
    # A local date is at most a day away from that of UTC, and a skipped date at most one more.
    first = due.date() - 3 * ONE_DAY
    if grid.cadence == "daily":
        for days in count():
            yield wall_to_instant(first + days * ONE_DAY, grid.time_of_day, grid.timezone)
    if grid.cadence == "monthly":
        assert grid.day is not None
        year, month = (first.year, first.month - 1) if first.month > 1 else (first.year - 1, 12)
        while True:
            day = min(grid.day, days_in_month(year, month))
            yield wall_to_instant(date(year, month, day), grid.time_of_day, grid.timezone)
            year, month = (year, month + 1) if month < 12 else (year + 1, 1)
    raise ValueError(f"no grid: {grid.cadence}")


def window(grid: Grid, due: datetime, as_of: datetime) -> Window:
    """The window that a user, due since `due`, is refreshed for at `as_of`."""
    assert due <= as_of
    start, passed = due, 0
    for boundary in boundaries(grid, due):
        if boundary <= due:
            continue
        if boundary > as_of:
            return Window(start, boundary, passed, due if passed else None)
        start, passed = boundary, passed + 1
    raise AssertionError("boundaries have no end")


def credits(grant_mode: str, target: int, rollover_cap: int | None, balance: int) -> int | None:  # noqa: A001
    """What a grant adds to a balance; None where it, or the balance after it, does not fit 64 bits."""
    if grant_mode == "fill":
        afterwards = max(balance, target)
    elif grant_mode == "reset":
        afterwards = target
    elif grant_mode == "add":
        afterwards = balance + target
    elif grant_mode == "rollover":
        assert rollover_cap is not None
        afterwards = min(balance, rollover_cap) + target
    else:
        raise ValueError(grant_mode)
    added = afterwards - balance
    return added if added in SIXTY_FOUR_BITS and afterwards in SIXTY_FOUR_BITS else None


def grid_of(user: User, plan: Plan) -> Grid | None:
    """A user's grid under a plan; None where a webhook says when."""
    if plan.cadence == "external":
        return None
    return Grid(
        cadence="monthly" if plan.cadence == "rolling" and user.refresh_day else plan.cadence,
        interval_days=plan.interval_days,
        day=user.refresh_day or plan.day_of_month,
        time_of_day=plan.time_of_day or MIDNIGHT,
        timezone=user.timezone or plan.timezone,
    )


def held(user: User, as_of: datetime) -> bool:
    return user.held and (user.hold_until is None or user.hold_until > as_of)


def verdict(  # noqa: PLR0911 - one for each
    user: User, plan: Plan | None, added: int | None, as_of: datetime, *, force: bool
) -> str:
    if not user.active:
        return "inactive"
    if plan is None or not plan.active:
        return "no_plan"
    if held(user, as_of):
        return "held"
    if plan.cadence == "external" and not force:
        return "external"
    if user.next_refresh_at is None and not force:
        return "unscheduled"
    if user.next_refresh_at is not None and user.next_refresh_at > as_of and not force:
        return "not_due"
    return "overflow" if added is None else "due"


def forced_window(grid: Grid | None, due: datetime | None, as_of: datetime, *, keep: bool) -> Window:
    """The window of force's own, of a user who is not due, unscheduled or external."""
    ahead = due if due is not None and due > as_of else None
    if keep or grid is None:
        return Window(as_of, ahead, 0, None)
    end = window(grid, as_of, as_of).end
    assert end is not None
    return Window(as_of, max(end, ahead) if ahead else end, 0, None)


def decide(user: User, plan: Plan | None, as_of: datetime, asked: Asked = SCAN) -> Decision:
    """The verdict over one user at one instant, and the grant that it would be."""
    amounts = (asked.amount, user.custom_amount, plan.amount if plan else None)
    amount = next((amount for amount in amounts if amount is not None), None)
    target = None if amount is None else max(amount - user.shortfall, 0)
    if plan is None or target is None:
        return Decision(verdict(user, plan, None, as_of, force=asked.force), None, target, None)
    added = credits(plan.grant_mode, target, plan.rollover_cap, user.balance)
    said = verdict(user, plan, added, as_of, force=asked.force)
    grid, due = grid_of(user, plan), user.next_refresh_at
    current = None
    if said in {"due", "overflow", "held"} and grid and due and due <= as_of:
        current = window(grid, due, as_of)
    elif said in {"due", "overflow"}:
        current = forced_window(grid, due, as_of, keep=asked.keep_window)
    return Decision(said, current, target, added)
