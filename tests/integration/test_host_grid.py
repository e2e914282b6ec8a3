"""No sequence of changes, however often repeated, earns a second grant for time that was granted already.

Hypothesis makes up a host that keeps changing its users' plans, days, zones, dates, holds and activity, while time goes
by and one path or another refreshes them. Time goes by in two ways: as the runs' own instant, so that the calendar is
the calendar; and by moving every date into the past, so that the paths that read the clock take part.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refresh.switch import turn_trigger
from tests.integration.ledger import behind_the_triggers, check_ledger
from tests.integration.population import PLANS, ZONES, add_plans

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from tests.integration.world import World

USERS = 2
ANOTHER_AGE = timedelta(days=100_000)
many = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Change = tuple[str, object]
Tick = tuple[timedelta, str, list[list[Change]]]

with_windows = [plan for plan in PLANS if not plan.startswith("external")]
hours = st.integers(-45 * 24, 45 * 24).map(lambda n: timedelta(hours=n))
own = st.one_of(
    st.tuples(st.just("plan_code"), st.sampled_from(with_windows)),
    st.tuples(st.just("credit_refresh_day"), st.sampled_from([None, 1, 15, 29, 30, 31])),
    st.tuples(st.just("timezone"), st.sampled_from([None, *ZONES])),
    st.tuples(st.just("moved_by"), hours),
    st.tuples(st.just("set_to"), hours),
    st.tuples(st.just("credit_refresh_hold"), st.booleans()),
    st.tuples(st.just("active"), st.booleans()),
)
any_change = st.one_of(
    own,
    st.tuples(st.just("plan_code"), st.sampled_from(["external-fill", "external-add", None])),
    st.tuples(st.just("next_refresh_at"), st.none()),
)
elapsed = st.one_of(
    st.sampled_from([timedelta(0), timedelta(days=7), timedelta(days=30), timedelta(days=31)]),
    st.integers(1, 24 * 60).map(lambda n: timedelta(hours=n)),
)

_CHANGES = {
    "plan_code": "plan_code = %s",
    "credit_refresh_day": "credit_refresh_day = %s",
    "timezone": "timezone = %s",
    "credit_refresh_hold": "credit_refresh_hold = %s",
    "active": "active = %s",
    "next_refresh_at": "next_refresh_at = %s",
    "moved_by": "next_refresh_at = next_refresh_at + %s",
}
_BEHIND = """
SELECT u.id FROM users AS u JOIN credit_refresh_histories AS h ON h.user_id = u.id
WHERE h.status = 'refreshed' AND u.next_refresh_at < h.window_end
"""
_OUT_OF_ORDER = """
SELECT id FROM (
    SELECT id, window_start, lag(window_end) OVER (PARTITION BY user_id ORDER BY id) AS granted_until
    FROM credit_refresh_histories WHERE status = 'refreshed'
) AS h
WHERE window_start < granted_until
"""


def ticks(change: st.SearchStrategy[Change], paths: Sequence[str]) -> st.SearchStrategy[list[Tick]]:
    changes = st.lists(st.lists(change, max_size=3), min_size=USERS, max_size=USERS)
    return st.lists(st.tuples(elapsed, st.sampled_from(paths), changes), min_size=3, max_size=9)


class Host:
    """A host that cannot leave its users alone."""

    _GRID = ("plan_code", "credit_refresh_day", "timezone")

    def __init__(self, world: World, at: datetime | None = None) -> None:
        self.world = world
        self.at = at
        world.sql.execute("DELETE FROM users")
        self.users = [world.user(f"user-{n}", plan_code="rolling-add", due_in="-1 hour") for n in range(USERS)]
        world.sql.execute("UPDATE users SET next_refresh_at = coalesce(%s, now() - interval '1 hour')", (at,))

    def change(self, user_id: int, what: str, value: object) -> None:
        parameters: tuple[object, ...]
        if what == "set_to":
            assignment, parameters = "next_refresh_at = coalesce(%s::timestamptz, now()) + %s", (self.at, value)
        else:
            assignment, parameters = _CHANGES[what], (value,)
        self.world.sql.execute(f"UPDATE users SET {assignment} WHERE id = %s", (*parameters, user_id))  # noqa: S608

    def grid(self, user_id: int) -> dict[str, object]:
        """What a user's dates follow from."""
        user = self.world.see(user_id)
        return {name: user[name] for name in self._GRID}

    def restore(self, user_id: int, grid: dict[str, object]) -> None:
        """Undo the changes to it, one by one."""
        for what, value in grid.items():
            self.change(user_id, what, value)

    def date(self, user_id: int) -> datetime:
        at: datetime = self.world.see(user_id)["next_refresh_at"]
        return at

    def pass_time(self, elapsed: timedelta) -> None:
        """Nobody sets the database's clock: what has happened is moved into the past."""
        with behind_the_triggers(self.world):
            self.world.sql.execute(
                "UPDATE users SET next_refresh_at = next_refresh_at - %(by)s, held_window = held_window - %(by)s",
                {"by": elapsed},
            )
            # By way of another age: on its way, a window must not meet the one before it under the unique key.
            for by in (elapsed + ANOTHER_AGE, -ANOTHER_AGE):
                self.world.sql.execute(
                    "UPDATE credit_refresh_histories SET window_start = window_start - %(by)s,"
                    " window_end = window_end - %(by)s WHERE user_id = ANY (%(users)s)",
                    {"by": by, "users": self.users},
                )

    def refresh(self, path: str) -> None:
        if path == "scan":
            self.world.refresh(as_of=self.at)
        elif path == "due":
            self.world.value("SELECT refresh_due(10)")
        elif path == "if_due":
            self.world.rows("SELECT refresh_credits_if_due(external_id) FROM users")
        else:
            self.world.sql.execute("UPDATE users SET credit_balance = credit_balance - 1")

    def check(self) -> None:
        """No date lies before the end of what was granted, and no window begins before the one before has ended."""
        assert self.world.rows(_BEHIND) == []
        assert self.world.rows(_OUT_OF_ORDER) == []


@pytest.fixture
def planned(world: World) -> World:
    add_plans(world)
    with world.database.transaction(lock_timeout=timedelta(seconds=5)) as connection:
        turn_trigger(connection, on=True, actor="test")
    return world


def test_on_the_calendar(planned: World) -> None:
    begins: datetime = planned.value("SELECT '2023-12-31 23:30+00'::timestamptz")

    @many
    @given(ticks(own, ["scan"]))
    def never_twice(story: list[Tick]) -> None:
        host = Host(planned, begins)
        for elapsed, path, changes in story:
            host.at = (host.at or begins) + elapsed
            for user_id, made in zip(host.users, changes, strict=True):
                for what, value in made:
                    host.change(user_id, what, value)
                    host.check()
            host.refresh(path)
            host.check()

    never_twice()
    check_ledger(planned)
    assert planned.value("SELECT count(*) FROM credit_refresh_histories WHERE status = 'refreshed'") > many.max_examples


def test_on_every_path(planned: World) -> None:
    @many
    @given(ticks(any_change, ["scan", "due", "if_due", "spend"]))
    def never_twice(story: list[Tick]) -> None:
        host = Host(planned)
        for elapsed, path, changes in story:
            host.pass_time(elapsed)
            for user_id, made in zip(host.users, changes, strict=True):
                for what, value in made:
                    host.change(user_id, what, value)
            host.refresh(path)
            host.check()

    never_twice()
    check_ledger(planned)
    sources = planned.rows("SELECT DISTINCT source FROM credit_refresh_histories WHERE status = 'refreshed' ORDER BY 1")
    assert [row["source"] for row in sources] == ["function", "run", "trigger"]


flips = st.one_of(
    st.tuples(st.just("plan_code"), st.sampled_from(with_windows)),
    st.tuples(st.just("plan_code"), st.none()),
    st.tuples(st.just("credit_refresh_day"), st.sampled_from([None, 1, 15, 29, 30, 31])),
    st.tuples(st.just("timezone"), st.sampled_from([None, *ZONES])),
)


def test_flipped_back_the_date_is_what_it_was(planned: World) -> None:
    """However many changes of plan, day and zone there were, and whether or not a window has ended meanwhile."""
    begins: datetime = planned.value("SELECT '2023-12-31 23:30+00'::timestamptz")

    @many
    @given(st.lists(st.tuples(elapsed, st.lists(flips, min_size=1, max_size=5)), min_size=2, max_size=6))
    def restored(story: list[tuple[timedelta, list[Change]]]) -> None:
        host = Host(planned, begins)
        ada, quiet = host.users
        host.refresh("scan")
        for elapsed, changes in story:
            grid, date = host.grid(ada), host.date(ada)
            for what, value in changes:
                host.change(ada, what, value)
                host.check()
            host.restore(ada, grid)
            assert host.date(ada) == date
            host.at = (host.at or begins) + elapsed
            host.refresh("scan")
            host.check()
            # Another grid for the next round, which begins where the window just granted ends; no plan has none.
            if changes[0] != ("plan_code", None):
                host.change(ada, *changes[0])
        facts_of = "SELECT window_start FROM credit_refresh_histories WHERE user_id = %s ORDER BY id LIMIT 2"
        assert planned.rows(facts_of, ada)[0] == planned.rows(facts_of, quiet)[0]

    restored()
    check_ledger(planned)


FLIPS: dict[str, tuple[Change, Change]] = {
    "plans": (("plan_code", "daily-add"), ("plan_code", "monthly-add")),
    "days": (("credit_refresh_day", 1), ("credit_refresh_day", 28)),
    "zones": (("timezone", "Pacific/Kiritimati"), ("timezone", "America/New_York")),
    "external and back": (("plan_code", "external-add"), ("plan_code", "rolling-add")),
    "none and back": (("plan_code", None), ("plan_code", "daily-add")),
    "dates": (("next_refresh_at", None), ("set_to", timedelta(days=-1))),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_flipped_a_hundred_times_there_is_one_grant(planned: World, flip: str) -> None:
    host = Host(planned)
    host.refresh("scan")
    host.change(host.users[1], "plan_code", "monthly-add")
    granted = {user_id: len(planned.history(user_id)) for user_id in host.users}
    before = {user_id: (host.grid(user_id), host.date(user_id)) for user_id in host.users}
    for _ in range(50):
        for what, value in FLIPS[flip]:
            for user_id in host.users:
                host.change(user_id, what, value)
            host.refresh("due")
    host.refresh("scan")
    host.check()
    assert {user_id: len(planned.history(user_id)) for user_id in host.users} == granted
    for user_id, (grid, date) in before.items():
        host.restore(user_id, {"plan_code": "rolling-fill", **grid})
        host.restore(user_id, {"plan_code": "rolling-fill"})
        host.restore(user_id, grid)
        assert host.date(user_id) == date


def facts(row: dict[str, Any]) -> tuple[object, ...]:
    return (row["window_start"], row["window_end"], row["credits_added"])


def test_changes_undone_leave_the_windows_as_they_would_have_been(planned: World) -> None:
    """There and back between two windows, on the same grid: nothing is lost by it, either."""
    host = Host(planned)
    quiet, restless = host.users
    for _ in range(3):
        for what, value in (("timezone", "Asia/Kathmandu"), ("timezone", None), ("plan_code", "rolling-fill")):
            host.change(restless, what, value)
        host.change(restless, "plan_code", "rolling-add")
        host.refresh("scan")
        host.pass_time(timedelta(days=7))
    assert [facts(row) for row in planned.history(restless)] == [facts(row) for row in planned.history(quiet)]
    assert len(planned.history(quiet)) == 3
