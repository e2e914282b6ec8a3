"""docs/recipes/calendar-month.md, played: everybody's balance is set to the default of their group on the first."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from tests.integration.recipes import Period, Person, Play, set_up, try_sql, utc

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

PAGE = "calendar-month.md"
DEFAULT_CREDITS = {"basic": 500, "premium": 5_000}


class CalendarMonth:
    """`needs_monthly_reset()`: the last reset was in a month before this one."""

    def period(self, person: Person, at: datetime) -> Period | None:
        if person.plan not in DEFAULT_CREDITS:
            return None
        first = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        return first, (first + timedelta(days=31)).replace(day=1)

    def refreshed(self, person: Person) -> int:
        return person.custom_amount or DEFAULT_CREDITS[person.plan or ""]


def test_a_year_and_an_outage(world: World, cli: Cli) -> None:
    assert len(set_up(cli, PAGE)) == 3
    play = Play(world, CalendarMonth(), outage=(utc(2025, 1, 10), utc(2025, 4, 10, 9)))
    before = utc(2023, 12, 20)
    for person in (
        Person("spends", "basic", 500, spends=13),
        Person("spends all", "basic", 500, spends=100),
        Person("sleeps", "basic", 500),
        Person("topped up", "basic", 500),
        Person("moves", "basic", 120, spends=7),
        Person("negotiated", "premium", 900, custom_amount=7_500),
        Person("held", "premium", 5_000, spends=50),
        Person("no group", None, 40),
        Person("group without credits", "guest", 0),
    ):
        play.join(before, person)
    play.joins(utc(2024, 5, 17, 15, 30), Person("mid-month", "basic", 500, spends=20))
    play.joins(utc(2024, 8, 31, 23, 59), Person("last minute", "basic", 500))
    play.gives(utc(2024, 6, 20), "topped up", 9_000)
    play.changes(utc(2024, 6, 20, 8), "moves", "plan_code", "premium")
    play.holds(utc(2024, 3, 10), "held")
    play.releases(utc(2024, 5, 12, 10), "held")
    play.run(utc(2023, 12, 31, 12), utc(2025, 5, 2))

    # The 13 firsts from January to January, one for the outage, and 1 May.
    all_of_them = 13 + 1 + 1
    assert play.refreshed == {
        "spends": all_of_them,
        "spends all": all_of_them,
        "sleeps": all_of_them,
        "topped up": all_of_them,
        "moves": all_of_them,
        "negotiated": all_of_them,
        "held": all_of_them - 1,  # 1 April fell due under hold, 1 May came with the release
        "mid-month": all_of_them - 5,
        "last minute": all_of_them - 8,
    }
    assert play.held == [("held", utc(2024, 4, 1))]
    # What was bought is gone on the first, as it was there: the page says how to keep it.
    (lowered,) = world.rows("SELECT window_start, credits_added FROM credit_refresh_histories WHERE credits_added < 0")
    assert lowered == {"window_start": utc(2024, 7, 1), "credits_added": -9_000}
    try_sql(world, PAGE)
