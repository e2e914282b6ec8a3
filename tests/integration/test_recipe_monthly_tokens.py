"""docs/recipes/monthly-tokens.md, played: `used` is 0 again on the first, whether or not anybody looks."""

from __future__ import annotations

from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING

from tests.integration.recipes import Period, Person, Play, set_up, try_sql, utc

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

PAGE = "monthly-tokens.md"
LIMITS = {"tokens": 500, "tokens-pro": 10_000}


class MonthlyTokens:
    """`last_monthly_reset < date_trunc('month', CURRENT_DATE)`: then nothing is used."""

    def period(self, person: Person, at: datetime) -> Period | None:
        month = utc(at.year, at.month, 1)
        following = month + timedelta(days=32)
        return (month, utc(following.year, following.month, 1)) if person.plan in LIMITS else None

    def refreshed(self, person: Person) -> int:
        used = 0
        return LIMITS[person.plan or ""] - used


def test_a_year_and_an_outage(world: World, cli: Cli) -> None:
    set_up(cli, PAGE)
    cli.says("db", "triggers", "off")  # it works at now(), and would refresh the past at the first spend
    play = Play(world, MonthlyTokens(), daily=time(0, 1), outage=(utc(2025, 1, 2), utc(2025, 4, 2)))
    for person in (
        Person("77 of 500", "tokens", 500),
        Person("sleeps", "tokens", 1),
        Person("spends", "tokens", 500, spends=16),
        Person("upgrades", "tokens", 500, spends=9),
        Person("held", "tokens", 500, spends=3),
        Person("held to the end", "tokens-pro", 10_000),
        Person("gone", "tokens", 250),
    ):
        play.join(utc(2023, 12, 2), person)
    play.joins(utc(2024, 2, 29, 12), Person("leap day", "tokens", 500, spends=25))
    play.gives(utc(2024, 9, 28, 12), "77 of 500", -77)
    play.changes(utc(2024, 7, 31, 23, 59), "upgrades", "plan_code", "tokens-pro")
    play.changes(utc(2024, 6, 30, 12), "gone", "active", value=False)
    play.holds(utc(2024, 4, 15), "held", until=utc(2024, 6, 15))
    play.holds(utc(2024, 11, 20), "held to the end")
    play.run(utc(2023, 12, 31), utc(2025, 5, 2))

    all_of_them = 13 + 1 + 1
    assert play.refreshed == {
        "77 of 500": all_of_them,
        "sleeps": all_of_them,
        "spends": all_of_them,
        "upgrades": all_of_them,
        "held": all_of_them - 1,  # 1 May fell due, the window of 1 June came in the middle of it
        "held to the end": 11,
        "gone": 6,
        "leap day": all_of_them - 2,
    }
    assert play.held == [("held", utc(2024, 5, 1)), ("held to the end", utc(2024, 12, 1))]
    example = world.row(
        "SELECT h.old_balance, h.new_balance FROM credit_refresh_histories AS h JOIN users AS u ON u.id = h.user_id"
        " WHERE u.external_id = '77 of 500' AND h.window_start = '2024-10-01'"
    )
    assert example == {"old_balance": 423, "new_balance": 500}
    try_sql(world, PAGE)


def months_around(instant: datetime) -> Period:
    period = MonthlyTokens().period(Person("", "tokens", 0), instant)
    assert period
    return period


def test_the_view_the_functions_and_the_triggers_at_present(world: World, cli: Cli) -> None:
    """They work at now(), so they are not played: users whom no job has looked at, and a new one."""
    assert set_up(cli, PAGE)[-1].startswith("A spend now refreshes whoever is due first")
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)"
        " SELECT name, 'tokens', left_over, date_trunc('month', now())"
        " FROM (VALUES ('ada', 423), ('bob', 423), ('eve', 423), ('low', 3)) AS u (name, left_over)"
    )
    world.sql.execute("INSERT INTO users (external_id, plan_code) VALUES ('new', 'tokens')")

    view = "SELECT external_id, verdict, used, credit_balance, amount FROM user_credits_now ORDER BY id"
    everybody = [(name, "due", 0, 500, 500) for name in ("ada", "bob", "eve", "low")]
    everybody.append(("new", "not_due", 0, 500, 500))
    assert [tuple(row.values()) for row in world.rows(view)] == everybody
    assert world.value("SELECT credit_balance FROM users WHERE external_id = 'ada'") == 423

    first, again = (world.value("SELECT refresh_credits_if_due('ada')") for _ in range(2))
    assert (first["refreshed"], first["creditsAdded"], first["creditBalance"]) == (True, 77, 500)
    assert (again["refreshed"], again["verdict"], again["creditBalance"]) == (False, "not_due", 500)

    for balance in (490, 480):
        world.sql.execute("UPDATE users SET credit_balance = credit_balance - 10 WHERE external_id = 'bob'")
        assert world.value("SELECT credit_balance FROM users WHERE external_id = 'bob'") == balance

    # The guard is older than the trigger: who has too little left asks before the spend.
    guarded = "UPDATE users SET credit_balance = credit_balance - 7 WHERE external_id = 'low' AND credit_balance >= 7"
    assert world.sql.execute(guarded).rowcount == 0
    assert world.value("SELECT refresh_credits_if_due('low')")["creditBalance"] == 500
    assert world.sql.execute(guarded).rowcount == 1

    bulk, again = (world.value("SELECT refresh_due(1000)") for _ in range(2))
    assert (bulk["success"], bulk["refreshed"], bulk["creditsGranted"], bulk["more"]) == (True, 1, 77, False)
    assert again["refreshed"] == 0
    assert world.refresh().users_selected == 0

    history = world.rows(
        "SELECT u.external_id, h.* FROM credit_refresh_histories AS h JOIN users AS u ON u.id = h.user_id ORDER BY u.id"
    )
    assert [(row["external_id"], row["source"], row["old_balance"], row["new_balance"]) for row in history] == [
        ("ada", "function", 423, 500),
        ("bob", "trigger", 423, 500),
        ("eve", "function", 423, 500),
        ("low", "function", 3, 500),
        ("new", "insert", 0, 500),
    ]
    for row in history:
        month, following = months_around(row["created_at"])
        begins = row["created_at"] if row["external_id"] == "new" else month
        assert (row["status"], row["window_start"], row["window_end"]) == ("refreshed", begins, following)
