"""docs/recipes/daily.md, played: a fresh allowance every day at a time on the wall."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

from tests.integration.recipes import DAY, Period, Person, Play, set_up, try_sql, utc

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

PAGE = "daily.md"
TOKEN_LIMITS = {"trial": 1_000, "subscribed": 20_000, "berlin": 3_000}
SUMMERS = (
    # At 02:30 in Berlin. On the last Sunday of March that is 03:30 summer time, which is what 02:30 winter time would
    # have been; on the last Sunday of October it is the second 02:30, that of winter time. So these days count as
    # winter, and between them lies the summer.
    (date(2024, 4, 1), date(2024, 10, 26)),
    (date(2025, 3, 31), date(2025, 10, 25)),
)


class Daily:
    """A new record for each date: the date of the last reset is not today's."""

    def period(self, person: Person, at: datetime) -> Period | None:
        if person.plan not in TOKEN_LIMITS:
            return None
        turns = self._reset_at(person, at.date())
        if at >= turns:
            return turns, self._reset_at(person, at.date() + DAY)
        return self._reset_at(person, at.date() - DAY), turns

    def _reset_at(self, person: Person, day: date) -> datetime:
        midnight = utc(day.year, day.month, day.day)
        if person.plan != "berlin":
            return midnight
        summer = any(first <= day <= last for first, last in SUMMERS)
        return midnight + timedelta(hours=0 if summer else 1, minutes=30)

    def refreshed(self, person: Person) -> int:
        return TOKEN_LIMITS[person.plan or ""]


def test_a_year_and_an_outage(world: World, cli: Cli) -> None:
    assert len(set_up(cli, PAGE)) == 3
    play = Play(world, Daily(), outage=(utc(2025, 1, 3, 6), utc(2025, 4, 2, 6)))
    for person in (
        Person("spends", "trial", 1_000, spends=77),
        Person("spends all", "trial", 1_000, spends=1_000),
        Person("sleeps", "trial", 1_000),
        Person("subscribes", "trial", 1_000, spends=300),
        Person("held", "subscribed", 20_000, spends=900),
        Person("in Berlin", "berlin", 3_000, spends=30),
        Person("leaves", "subscribed", 20_000),
    ):
        play.join(utc(2023, 12, 30, 12), person)
    play.joins(utc(2024, 7, 16, 15), Person("mid-month", "trial", 1_000, spends=10))
    play.changes(utc(2024, 4, 9, 18), "subscribes", "plan_code", "subscribed")
    play.changes(utc(2024, 10, 1, 18), "leaves", "active", value=False)
    play.holds(utc(2024, 8, 5, 9), "held", until=utc(2024, 10, 5, 9))
    play.run(utc(2023, 12, 30, 13), utc(2025, 4, 4))

    # 31 December to 3 January of the year after, 2024 being a leap year; one for the outage; 3 April.
    all_of_them = 1 + 366 + 3 + 1 + 1
    assert play.refreshed == {
        "spends": all_of_them,
        "spends all": all_of_them,
        "sleeps": all_of_them,
        "subscribes": all_of_them,
        "in Berlin": all_of_them,
        "held": all_of_them - 60,  # 6 August to 4 October: the window of the 5th came when the hold ended
        "leaves": 1 + 275,
        "mid-month": all_of_them - 199,
    }
    assert play.held == [("held", utc(2024, 8, 6))]
    try_sql(world, PAGE)
