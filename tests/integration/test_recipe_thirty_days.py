"""docs/recipes/thirty-days.md, played: every 30 days up to the tier's amount, in process and by the command line."""

from __future__ import annotations

import calendar
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from tests.integration.recipes import MICROSECOND, Period, Person, Play, set_up, try_sql, utc

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.command import Cli
    from tests.integration.world import World

PAGE = "thirty-days.md"
TIERS = {"free": 1_000, "pro": 20_000}
THIRTY_DAYS = timedelta(days=30)


class ThirtyDays:
    """`lastCreditRefresh` is 30 days ago, counted from the date that the migration gave them; or it is their day."""

    def period(self, person: Person, at: datetime) -> Period | None:
        if person.plan not in TIERS:
            return None
        if person.day:
            return self._month(person.day, at)
        begun = person.started + (at - person.started) // THIRTY_DAYS * THIRTY_DAYS
        return begun, begun + THIRTY_DAYS

    def _month(self, day: int, at: datetime) -> Period:
        months = [at.replace(day=1) + timedelta(days=days) for days in (-1, 0, 32)]
        last_days = [calendar.monthrange(month.year, month.month)[1] for month in months]
        before, this, after = (
            utc(month.year, month.month, min(day, last)) for month, last in zip(months, last_days, strict=True)
        )
        return (this, after) if at >= this else (before, this)

    def refreshed(self, person: Person) -> int:
        return max(person.balance, person.custom_amount or TIERS[person.plan or ""])


def test_a_year_and_an_outage(world: World, cli: Cli) -> None:
    answers = set_up(cli, PAGE)
    assert len(answers) == 2
    assert all("is like that already" in answer for answer in answers), "the page shows a fresh database's own plans"
    play = Play(world, ThirtyDays(), outage=(utc(2025, 1, 5), utc(2025, 4, 5, 16)))
    for person in (
        Person("steady", "free", 1_000, started=utc(2023, 12, 3, 10), spends=20),
        Person("sleeps", "free", 1_000, started=utc(2023, 12, 9, 23, 59)),
        Person("spends all", "free", 1_000, started=utc(2023, 12, 17, 4), spends=500),
        Person("on day 31", "pro", 20_000, day=31, spends=600),
        Person("bought", "free", 1_000, started=utc(2023, 12, 21, 7, 7), spends=11),
        Person("custom", "pro", 1_234, started=utc(2023, 12, 28), custom_amount=5_000, spends=100),
        Person("upgrades", "free", 1_000, started=utc(2023, 12, 13, 13), spends=25),
        Person("held", "pro", 20_000, started=utc(2023, 12, 25, 18), spends=200),
    ):
        play.join(utc(2024, 1, 1), person)
    play.joins(utc(2024, 7, 19, 15, 45), Person("mid-year", "free", 1_000, started=utc(2024, 7, 19, 15, 45), spends=3))
    play.gives(utc(2024, 3, 1, 9), "bought", 5_000)
    play.changes(utc(2024, 6, 20, 8), "upgrades", "plan_code", "pro")
    play.holds(utc(2024, 3, 10), "held")
    play.releases(utc(2024, 5, 12, 10), "held")
    play.run(utc(2024, 1, 1, 12), utc(2025, 5, 1))

    assert play.refreshed == {
        # 2 January 2024 10:00 and every 30 days to 27 December 2024: 13; 5 April for 27 March; 26 April.
        "steady": 13 + 1 + 1,
        "sleeps": 13 + 1 + 0,
        "spends all": 12 + 1 + 1,
        "on day 31": 12 + 1 + 1,
        "bought": 12 + 1 + 1,
        "custom": 12 + 1 + 1,
        "upgrades": 13 + 1 + 0,
        "held": 12 - 1 + 1 + 1,
        "mid-year": 5 + 1 + 1,
    }
    assert play.held == [("held", utc(2024, 3, 24, 18))]
    # 5,000 bought credits are used up before the tier fills up again.
    assert world.value("SELECT count(*) FROM credit_refresh_histories WHERE credits_added < 0") == 0
    try_sql(world, PAGE)


def test_a_month_by_the_command_line(world: World, cli: Cli, tmp_path: Path) -> None:
    """Each command is a process, and its answer is checked beside the rows; the batches are done as a worker does."""
    changed = cli.facts("plans", "set", "free", "--amount", "1500", "--yes")
    assert (changed["changed"], changed["usersMoved"], changed["run"]) == (True, 0, None)
    users = tmp_path / "users.csv"
    users.write_text(
        "external_id,plan_code,credit_balance,next_refresh_at\n"
        "ada,free,400,2024-02-05T10:00:00Z\n"
        "bob,pro,20000,2024-02-20T12:00:00Z\n"
        "eve,free,9000,2024-03-01T00:00:00Z\n"
    )
    assert cli.facts("users", "import", str(users))["new"] == 3

    def scan(at: datetime) -> dict[str, int]:
        run = cli.facts("scan", "--as-of", at.isoformat())
        pending = world.rows("SELECT id FROM credit_refresh_batches WHERE status = 'pending'")
        world.work([row["id"] for row in pending])
        rows = world.rows(
            "SELECT u.external_id, h.credits_added FROM credit_refresh_histories AS h"
            " JOIN users AS u ON u.id = h.user_id WHERE h.run_id = %s AND h.status = 'refreshed'",
            run["run_id"],
        )
        return {row["external_id"]: row["credits_added"] for row in rows}

    ada_is_due = utc(2024, 2, 5, 10)
    assert scan(ada_is_due - MICROSECOND) == {}
    assert scan(ada_is_due) == {"ada": 1_100}
    assert cli.facts("hold", "bob", "--reason", "chargeback")["held"]
    assert scan(utc(2024, 2, 21)) == {}
    assert cli.facts("release", "bob")["verdict"] == "due"
    world.sql.execute("UPDATE users SET credit_balance = credit_balance - 700 WHERE external_id IN ('ada', 'bob')")
    assert scan(utc(2024, 3, 1)) == {"bob": 700, "eve": 0}
    assert scan(utc(2024, 3, 6, 10)) == {"ada": 700}
    shown = world.rows("SELECT external_id, credit_balance, next_refresh_at FROM users ORDER BY external_id")
    assert [tuple(row.values()) for row in shown] == [
        ("ada", 1_500, utc(2024, 4, 5, 10)),
        ("bob", 20_000, utc(2024, 3, 21, 12)),
        ("eve", 9_000, utc(2024, 3, 31)),
    ]
    statuses = world.rows("SELECT DISTINCT status FROM credit_refresh_runs")
    assert statuses == [{"status": "succeeded"}]
