"""`credits users stagger`: dates for those who have none, spread evenly; and the chart of them."""

from __future__ import annotations

from datetime import date, timedelta
from io import StringIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from cli.chart import bars
from refresh.errors import RefusedError
from refresh.stagger import Day, count_unscheduled, stagger_users
from tests.integration.command import refused

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.command import Cli
    from tests.integration.world import World


def unscheduled(world: World, count: int, plan: str = "free", prefix: str = "user") -> None:
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance) SELECT %s || '-' || n, %s, 5"
        " FROM generate_series(1, %s) AS n",
        (prefix, plan, count),
    )


def stagger(world: World, plan: str | None = None) -> list[Day]:
    with world.database.transaction() as connection:
        return stagger_users(connection, actor="cli:ops", plan=plan)


def count(world: World, plan: str | None = None) -> int:
    with world.database.statements() as connection:
        return count_unscheduled(connection, plan)


def dates(world: World) -> dict[str, Any]:
    rows = world.rows("SELECT external_id, next_refresh_at FROM users ORDER BY next_refresh_at")
    return {row["external_id"]: row["next_refresh_at"] for row in rows}


def test_a_rolling_plans_users_are_spread_evenly_over_its_interval(world: World) -> None:
    unscheduled(world, 300)
    assert count(world) == 300
    days = stagger(world)
    assert sum(day.users for day in days) == 300
    assert {day.users for day in days[1:-1]} == {10}
    at = list(dates(world).values())
    steps = {(later - earlier).total_seconds() for earlier, later in pairwise(at)}
    assert {round(step) for step in steps} == {30 * 86_400 // 300}
    now = world.value("SELECT now()")
    assert now < at[0]
    assert at[-1] < now + timedelta(days=30)
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == 0
    audit = world.row("SELECT * FROM credit_audit_logs WHERE action = 'staggered'")
    assert (audit["actor"], audit["detail"]) == ("cli:ops", {"plan": None, "users": 300, "plans": {"free": 300}})


def test_each_plan_has_its_own_interval(world: World) -> None:
    world.sql.execute("UPDATE plans SET interval_days = 7 WHERE code = 'pro'")
    unscheduled(world, 30)
    unscheduled(world, 14, "pro", "pro")
    assert {day.users for day in stagger(world) if day.plan_code == "pro"} <= {1, 2, 3}
    last = world.value("SELECT max(next_refresh_at) - now() FROM users WHERE plan_code = 'pro'")
    assert timedelta(days=6) < last < timedelta(days=7)


def test_the_order_depends_on_the_ids_alone(world: World) -> None:
    unscheduled(world, 50)
    stagger(world)
    first = list(dates(world))
    assert first != sorted(first, key=lambda name: int(name.rpartition("-")[2]))
    world.sql.execute("DELETE FROM users")
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance) SELECT 'user-' || n, 'free', 5"
        " FROM generate_series(50, 1, -1) AS n"
    )
    stagger(world)
    assert list(dates(world)) == first


def test_calendar_users_get_their_next_boundary(world: World) -> None:
    world.sql.execute(
        "UPDATE plans SET cadence = 'daily', time_of_day = '09:00', timezone = 'Asia/Kathmandu' WHERE code = 'pro'"
    )
    unscheduled(world, 3, "pro")
    unscheduled(world, 1, "free", "own-day")
    world.sql.execute("UPDATE users SET credit_refresh_day = 31, timezone = 'UTC' WHERE external_id = 'own-day-1'")
    stagger(world)
    local = world.rows(
        "SELECT DISTINCT next_refresh_at AT TIME ZONE 'Asia/Kathmandu' AS at FROM users WHERE plan_code = 'pro'"
    )
    assert [f"{row['at']:%H:%M}" for row in local] == ["09:00"]
    assert world.value("SELECT max(next_refresh_at) - now() < interval '1 day' FROM users WHERE plan_code = 'pro'")
    own = world.value("SELECT next_refresh_at FROM users WHERE external_id = 'own-day-1'")
    assert own == world.value("SELECT date_trunc('month', now()) + interval '1 month -1 day'")


def test_who_is_left_alone(world: World) -> None:
    unscheduled(world, 1)
    world.sql.execute("INSERT INTO plans (code, name, amount, active) VALUES ('old', 'Old', 5, false)")
    world.sql.execute("INSERT INTO plans (code, name, amount, cadence) VALUES ('hook', 'Hook', 5, 'external')")
    world.user("inactive", due_in=None, active=False)
    world.user("planless", due_in=None, plan_code=None)
    world.user("old", due_in=None, plan_code="old")
    world.user("hook", due_in=None, plan_code="hook")
    scheduled = world.see(world.user("scheduled"))["next_refresh_at"]
    world.user("held", due_in=None, credit_refresh_hold=True)
    assert count(world) == 2
    assert sum(day.users for day in stagger(world)) == 2
    given = dates(world)
    assert None not in (given["user-1"], given["held"])
    assert given["scheduled"] == scheduled
    assert {given[name] for name in ("inactive", "planless", "old", "hook")} == {None}
    assert stagger(world) == []
    assert world.value("SELECT count(*) FROM credit_audit_logs WHERE action = 'staggered'") == 1


def test_one_plan_alone(world: World) -> None:
    unscheduled(world, 2)
    unscheduled(world, 3, "pro", "pro")
    assert (count(world), count(world, "pro")) == (5, 3)
    assert {day.plan_code for day in stagger(world, "pro")} == {"pro"}
    assert count(world) == 2


def test_an_unknown_and_an_external_plan(world: World) -> None:
    world.sql.execute("UPDATE plans SET cadence = 'external' WHERE code = 'pro'")
    with pytest.raises(RefusedError, match="there is no plan 'nope'"):
        count(world, "nope")
    with pytest.raises(RefusedError, match="plan 'pro' is external"):
        count(world, "pro")


def test_never_before_the_end_of_what_was_granted(world: World) -> None:
    world.user()
    world.refresh()
    granted_until = dates(world)["ada"]
    world.sql.execute("UPDATE users SET next_refresh_at = NULL")
    stagger(world)
    assert dates(world)["ada"] == granted_until


def test_users_whom_somebody_else_has_locked_are_not_waited_for(world: World) -> None:
    unscheduled(world, 3)
    with world.host() as host:
        host.execute("SELECT FROM users WHERE external_id = 'user-2' FOR UPDATE")
        assert sum(day.users for day in stagger(world)) == 2
    assert count(world) == 1


def test_the_command(world: World, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "users.csv"
    file.write_text("external_id,plan_code,credit_balance\n" + "".join(f"user-{n},free,0\n" for n in range(60)))
    assert "`credits users stagger` spreads them evenly" in cli("users", "import", str(file)).stderr
    refused(cli("users", "stagger"), 2, "Give a date to 60 unscheduled users? Without a terminal")
    refused(cli("users", "stagger", "--plan", "nope", "--yes"), 2, "there is no plan 'nope'")
    text = cli.says("users", "stagger", "--yes")
    assert "First refreshes a day (UTC)" in text
    assert text.count("█") > 30
    assert text.endswith("Staggered 60 users.\n")
    assert cli.facts("users", "stagger") == {"users": 0, "left": 0, "days": []}
    world.sql.execute("UPDATE users SET next_refresh_at = NULL WHERE external_id = 'user-1'")
    facts = cli.facts("users", "stagger", "--yes")
    assert (facts["users"], facts["left"], facts["days"][0]["users"]) == (1, 0, 1)


def drawn(days: list[tuple[date, int]]) -> list[str]:
    console = Console(width=80, file=StringIO())
    with console.capture() as printed:
        console.print(bars("Title", days))
    return printed.get().splitlines()[1:]


def test_the_chart_shows_days_without_users_too() -> None:
    lines = drawn([(date(2026, 3, 1), 2), (date(2026, 3, 3), 4)])
    assert [line.split()[:2] for line in lines] == [["2026-03-01", "2"], ["2026-03-02", "0"], ["2026-03-03", "4"]]
    assert [line.count("█") for line in lines] == [20, 0, 40]


def test_the_chart_of_a_long_span_has_several_days_to_a_line() -> None:
    lines = drawn([(date(2026, 1, 1) + timedelta(days=day), 1) for day in range(365)])
    assert len(lines) <= 31
    assert sum(int(line.split()[1]) for line in lines) == 365
