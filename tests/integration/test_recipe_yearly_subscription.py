"""docs/recipes/yearly-subscription.md, played: once a year is paid, once a month are the credits."""

from __future__ import annotations

import calendar
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING

from refresh.stagger import stagger_users
from tests.integration.recipes import Period, Person, Play, set_up, try_sql, utc

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

PAGE = "yearly-subscription.md"
MONTHLY_CREDITS = {"yearly": 2_000, "yearly-pro": 20_000}


class YearlySubscription:
    """Daily at 02:00: has another month passed since the subscription began?"""

    def period(self, person: Person, at: datetime) -> Period | None:
        if person.plan not in MONTHLY_CREDITS:
            return None
        turns = self._anniversary(person, at)
        if at >= turns:
            return turns, self._anniversary(person, at.replace(day=1) + timedelta(days=31))
        return self._anniversary(person, at.replace(day=1) - timedelta(days=1)), turns

    def _anniversary(self, person: Person, month: datetime) -> datetime:
        _, days = calendar.monthrange(month.year, month.month)
        return utc(month.year, month.month, min(person.started.day, days), 2)

    def refreshed(self, person: Person) -> int:
        return person.custom_amount or MONTHLY_CREDITS[person.plan or ""]


def subscriber(name: str, started: datetime, **columns: object) -> Person:
    known = {"plan": "yearly", "balance": 2_000, **columns}
    return Person(name, started=started, day=started.day, **known)  # type: ignore[arg-type]


def test_a_year_and_an_outage(world: World, cli: Cli) -> None:
    assert len(set_up(cli, PAGE)) == 3
    play = Play(world, YearlySubscription(), daily=time(2), outage=(utc(2025, 1, 1), utc(2025, 4, 1, 2)))
    for person in (
        subscriber("on 17 May", utc(2023, 5, 17), spends=30),
        subscriber("on the first", utc(2023, 9, 1), spends=200),
        subscriber("on day 29", utc(2023, 9, 29)),
        subscriber("on day 30", utc(2023, 6, 30)),
        subscriber("on day 31", utc(2023, 10, 31), spends=1),
        subscriber("negotiated", utc(2023, 2, 11), custom_amount=3_333),
        subscriber("upgrades", utc(2023, 8, 5), spends=60),
        subscriber("cancels", utc(2023, 12, 24)),
        subscriber("held", utc(2023, 7, 20), spends=5),
        subscriber("pays monthly", utc(2023, 7, 8), plan="monthly", spends=40),
        subscriber("goes monthly", utc(2023, 3, 3)),
    ):
        play.join(utc(2024, 1, 1, 12), person)
    play.joins(utc(2024, 8, 8, 16, 20), subscriber("joins", utc(2024, 8, 8), spends=10))
    play.changes(utc(2024, 6, 20, 8), "upgrades", "plan_code", "yearly-pro")
    play.changes(utc(2024, 6, 24, 1), "cancels", "active", value=False)
    play.leaves_the_calendar(utc(2024, 9, 10), "goes monthly", "monthly")
    play.holds(utc(2024, 3, 15), "held")
    play.releases(utc(2024, 5, 15, 10), "held")
    play.run(utc(2024, 1, 1, 13), utc(2025, 5, 1))

    # Twelve months in 2024, one grant for the outage, and the one of April.
    all_of_them = 12 + 1 + 1
    assert play.refreshed == {
        "on 17 May": all_of_them,
        "on the first": 11 + 1,  # 1 January lies before the beginning, and the outage ends on 1 April at 02:00 sharp
        "on day 29": all_of_them,
        "on day 30": all_of_them,
        "on day 31": all_of_them,
        "negotiated": all_of_them,
        "upgrades": all_of_them,
        "cancels": 5,
        "held": all_of_them - 1,  # 20 March fell due, and the window of 20 April came in May
        "goes monthly": 9,
        "joins": all_of_them - 8,
    }
    assert play.held == [("held", utc(2024, 3, 20, 2))]
    last_days = world.rows(
        "SELECT extract(day FROM h.window_start)::integer AS day FROM credit_refresh_histories AS h"
        " JOIN users AS u ON u.id = h.user_id WHERE u.external_id = 'on day 31' ORDER BY h.window_start LIMIT 5"
    )
    assert [row["day"] for row in last_days] == [31, 29, 31, 30, 31]
    try_sql(world, PAGE)


def test_subscriptions_that_begin_and_that_are_moved_at_present(world: World, cli: Cli) -> None:
    """The insert trigger and the stagger work at now(), so they are not played."""
    set_up(cli, PAGE)
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_refresh_day)"
        " SELECT 'new ' || day, 'yearly', day FROM generate_series(1, 31) AS day"
    )
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance)"
        " SELECT 'moved ' || day, 'yearly', 7 FROM generate_series(1, 31) AS day"
    )
    world.sql.execute(
        "UPDATE users SET credit_refresh_day = split_part(external_id, ' ', 2)::smallint"
        " WHERE external_id LIKE 'moved %'"
    )
    with world.database.transaction() as connection:
        stagger_users(connection, actor="test")
    users = world.rows("SELECT * FROM users")
    assert len(users) == 62
    for user in users:
        subscribed = subscriber("", utc(2024, 1, user["credit_refresh_day"]))
        period = YearlySubscription().period(subscribed, user["created_at"])
        assert period
        granted = 2_000 if user["external_id"].startswith("new") else 7
        assert (user["credit_balance"], user["next_refresh_at"]) == (granted, period[1])
