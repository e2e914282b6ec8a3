"""`credits forecast`: refreshes and credits by day and plan, against the oracle's; what if; and the command."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import psycopg
import pytest

from refresh import plans
from refresh.errors import RefusedError
from refresh.forecast import SETTABLE, Forecast, forecast, parse_change
from refresh.outlook import STATES, Outlook, Total
from tests import oracle
from tests.integration.command import refused
from tests.integration.planning import move
from tests.integration.population import LARGEST, PLANS, ZONES, add_plans, add_users

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

Days = dict[tuple[str, date], tuple[int, int, int]]

_OFF_UTC = "UPDATE plans SET time_of_day = '23:30', timezone = 'America/New_York' WHERE code LIKE 'daily-%'"


def ask(world: World, *changes: str, days: int = 30) -> Forecast:
    with world.database.transaction() as connection:
        return forecast(connection, days=days, changes=[parse_change(text) for text in changes])


def asked(world: World, *changes: str) -> Outlook:
    outlook = ask(world, *changes).what_if
    assert outlook is not None
    return outlook


def made_up(seed: int, count: int) -> list[dict[str, Any]]:
    pick = random.Random(seed)  # noqa: S311 - the same users each time are the point
    choice = pick.choice
    return [
        {
            "plan": choice([*PLANS, *PLANS[:12], "retired", None]),
            "balance": choice([0, 299, 300, 301, 1_000, 1_300, pick.randint(-2_000, 5_000)]),
            "due": choice([None, *[timedelta(minutes=pick.randint(-90 * 1_440, 60 * 1_440)) for _ in range(9)]]),
            "hold": pick.random() < 0.25,
            "hold_for": choice([None, timedelta(minutes=-10), timedelta(days=2), timedelta(days=17, hours=5)]),
            "custom": choice([None, None, None, 1, 90, 7_777]),
            "day": choice([None, None, 1, 15, 29, 31]),
            "zone": choice([None, *ZONES]),
            "active": pick.random() < 0.95,
        }
        for _ in range(count)
    ]


def oracles_plan(row: dict[str, Any]) -> oracle.Plan:
    names = ("amount", "grant_mode", "rollover_cap", "cadence", "interval_days", "day_of_month", "time_of_day")
    return oracle.Plan(**{name: row[name] for name in names}, timezone=ZoneInfo(row["timezone"]), active=row["active"])


def oracles_user(row: dict[str, Any]) -> oracle.User:
    return oracle.User(
        balance=row["credit_balance"],
        next_refresh_at=row["next_refresh_at"],
        held=row["credit_refresh_hold"],
        hold_until=row["hold_until"],
        refresh_day=row["credit_refresh_day"],
        custom_amount=row["custom_credit_amount"],
        timezone=ZoneInfo(row["timezone"]) if row["timezone"] else None,
        active=row["active"],
    )


def refreshes(
    user: oracle.User, plan: oracle.Plan | None, now: datetime, until: datetime
) -> tuple[str, list[tuple[date, int, int]]]:
    """Why a user is not refreshed, or each refresh with its least and most credits: one window after the other."""
    hold_ends = user.hold_until if user.held and user.hold_until else now
    at = max(now, hold_ends, user.next_refresh_at or now)
    decision = oracle.decide(user, plan, at)
    if decision.verdict != "due" or at >= until:
        return ("later" if decision.verdict == "due" else decision.verdict), []
    assert plan is not None
    poor = replace(user, balance=user.balance if at == now else min(user.balance, 0))
    found: list[tuple[date, int, int]] = []
    while at < until:
        decision, spent = oracle.decide(user, plan, at), oracle.decide(poor, plan, at)
        assert decision.window is not None
        assert decision.window.end is not None
        assert decision.credits_added is not None
        assert spent.credits_added is not None
        found.append((at.astimezone(UTC).date(), decision.credits_added, spent.credits_added))
        at = decision.window.end
        user = replace(user, balance=user.balance + decision.credits_added, next_refresh_at=at)
        poor = replace(user, balance=0)
    return "due", found


def expected(world: World, now: datetime, until: datetime) -> tuple[Days, dict[str, int], dict[str, int]]:
    by_code = {row["code"]: oracles_plan(row) for row in world.rows("SELECT * FROM plans")}
    days: Days = {}
    users: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for row in world.rows("SELECT * FROM users"):
        code = row["plan_code"]
        state, found = refreshes(oracles_user(row), by_code.get(code), now, until)
        if state != "due":
            apart[state] += 1
            continue
        users[code] += 1
        for day, least, most in found:
            before = days.get((code, day), (0, 0, 0))
            days[code, day] = (before[0] + 1, before[1] + least, before[2] + most)
    return days, dict(users), {state: apart[state] for state in STATES}


def by_day(outlook: Outlook) -> Days:
    return {(day.plan_code, day.day): (day.refreshes, day.credits_least, day.credits_most) for day in outlook.days}


@pytest.mark.parametrize(("seed", "days"), [(1, 30), (2, 1), (3, 75)])
def test_each_day_and_plan_agrees_with_the_oracle(world: World, seed: int, days: int) -> None:
    add_plans(world)
    world.sql.execute(_OFF_UTC)
    add_users(world, "user", made_up(seed, 500))
    found = ask(world, days=days)
    assert found.first_day == found.at.date()
    assert (found.last_day - found.first_day).days == days - 1
    until = datetime.combine(found.last_day + timedelta(days=1), datetime.min.time(), UTC)
    expected_days, users, apart = expected(world, found.at, until)
    outlook = found.as_it_is
    assert by_day(outlook) == expected_days
    assert {code: total.users for code, total in outlook.plans.items()} == users
    assert outlook.apart == apart
    assert outlook.total.users + sum(outlook.apart.values()) == 500
    assert outlook.total.refreshes == sum(day.refreshes for day in outlook.days)
    assert outlook.days == sorted(outlook.days, key=lambda day: (day.day, day.plan_code))


def test_what_is_overdue_counts_today_and_once(world: World) -> None:
    world.user("ada", due_in="-100 days")
    found = ask(world)
    (first, *later) = found.as_it_is.days
    assert (first.day, first.refreshes, first.credits_least, first.credits_most) == (found.first_day, 1, 600, 600)
    assert [(day.credits_least, day.credits_most) for day in later] == [(0, 1_000)] * len(later)


def test_the_next_refresh_is_exact_when_nothing_is_spent(world: World) -> None:
    world.user("ada", due_in="2 days", credit_balance=-250)
    world.user("bob", due_in="2 days", credit_balance=5_000)
    (day,) = ask(world, days=10).as_it_is.days
    assert (day.refreshes, day.credits_least, day.credits_most) == (2, 1_250, 2_250)


def test_holds(world: World) -> None:
    world.user("ada", credit_refresh_hold=True)
    bob = world.user("bob", credit_refresh_hold=True)
    world.sql.execute("UPDATE users SET hold_until = 'infinity' WHERE id = %s", (bob,))
    world.user("cyd", credit_refresh_hold=True, hold_for="5 days")
    world.user("dan", credit_refresh_hold=True, hold_for="5 days", due_in="9 days")
    world.user("eve", credit_refresh_hold=True, hold_for="99 days")
    world.user("fay", credit_refresh_hold=True, hold_for="-1 hour")
    found = ask(world, days=20)
    assert [(day.day - found.first_day).days for day in found.as_it_is.days] == [0, 5, 9]
    assert found.as_it_is.total.users == 3
    assert (found.as_it_is.apart["held"], found.as_it_is.apart["later"]) == (2, 1)


def test_what_does_not_fit_is_counted_apart(world: World) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'add'")
    world.user("ada", credit_balance=LARGEST)
    assert ask(world).as_it_is.apart["overflow"] == 1


def test_large_amounts_are_summed_exactly(world: World) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'rollover', rollover_cap = %s, amount = %s", (LARGEST, LARGEST))
    world.sql.execute("UPDATE plans SET cadence = 'daily', time_of_day = '00:00'")
    for name in ("ada", "bob", "cyd"):
        world.user(name, credit_balance=0)
    first = ask(world, days=3).as_it_is.days[0]
    assert first.credits_least >= 3 * LARGEST
    assert type(first.credits_least) is int


def test_a_shortfall_lowers_the_next_refresh_alone(world: World) -> None:
    world.user("ada", credit_balance=100)
    world.sql.execute("UPDATE plans SET interval_days = 7")
    world.sql.execute("UPDATE users SET refresh_shortfall = 300, next_refresh_at = now() - interval '1 minute'")
    added = [(day.credits_least, day.credits_most) for day in ask(world, days=20).as_it_is.days]
    assert added == [(600, 600), (300, 1_000), (0, 1_000)]


def test_another_amount(world: World) -> None:
    world.user("ada", due_in="1 day")
    world.user("bob", due_in="1 day", plan_code="pro", credit_balance=20_000)
    found = ask(world, "pro.amount=25000", days=20)
    assert found.as_it_is.total == Total(2, 2, 600, 21_000)
    assert found.what_if is not None
    assert found.what_if.total == Total(2, 2, 5_600, 26_000)
    assert found.what_if.plans["free"] == found.as_it_is.plans["free"]
    facts = found.facts()
    assert facts["difference"] == {"users": 0, "refreshes": 0, "creditsLeast": 5_000, "creditsMost": 5_000}
    assert world.value("SELECT amount FROM plans WHERE code = 'pro'") == 20_000


CHANGES: list[tuple[str, ...]] = [
    ("rolling-fill.amount=25", "rolling-fill.grant_mode=reset"),
    ("rolling-fill.interval_days=3",),
    ("monthly-add.grant_mode=rollover", "monthly-add.rollover_cap=0"),
    ("rolling-add.cadence=monthly", "rolling-add.day_of_month=17", "rolling-add.time_of_day=09:15"),
    ("monthly-reset.cadence=daily", "monthly-reset.timezone=Asia/Kathmandu", "daily-add.time_of_day=01:01"),
    ("daily-fill.cadence=rolling",),
    ("external-rollover.cadence=daily", "external-fill.cadence=rolling"),
    ("rolling-reset.cadence=external",),
    ("retired.active=true", "daily-reset.active=false"),
]


@pytest.mark.parametrize("changes", CHANGES, ids=" ".join)
def test_what_if_is_what_comes_of_the_change(world: World, changes: tuple[str, ...]) -> None:
    add_plans(world)
    add_users(world, "user", made_up(7, 400))
    before = world.rows("SELECT * FROM plans"), world.rows("SELECT * FROM users ORDER BY id")
    found = ask(world, *changes)
    assert (world.rows("SELECT * FROM plans"), world.rows("SELECT * FROM users ORDER BY id")) == before
    wanted: dict[str, dict[str, Any]] = {}
    for code, name, value in map(parse_change, changes):
        wanted.setdefault(code, {})[name] = value
    for code, values in wanted.items():
        move(world, values, code)
    assert found.what_if is not None
    real = ask(world).as_it_is
    assert by_day(found.what_if) == by_day(real)
    assert found.what_if.apart == real.apart
    assert by_day(found.what_if) != by_day(found.as_it_is)


def test_only_what_was_changed_differs(world: World) -> None:
    add_plans(world)
    add_users(world, "user", made_up(8, 300))
    found = ask(world, "rolling-fill.amount=1000")
    assert found.what_if == found.as_it_is


def test_nothing_can_be_written(world: World) -> None:
    with world.database.transaction() as connection:
        forecast(connection, days=1)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), connection.transaction():
            connection.execute("UPDATE users SET credit_balance = 0")


def test_nobody(world: World) -> None:
    outlook = ask(world, "free.amount=5").as_it_is
    assert (outlook.days, outlook.plans, outlook.total) == ([], {}, Total())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pro", "'pro' is no change: write PLAN.NAME=VALUE"),
        ("amount=5", "'amount=5' is no change"),
        ("pro.amount", "'pro.amount' is no change"),
        ("pro.amuont=5", "'amuont' in 'pro.amuont=5' is not allowed: amount, rollover_cap, interval_days"),
        ("pro.atomic=true", "'atomic' in 'pro.atomic=true' is not allowed"),
        ("pro.amount=25_000", "'25_000' in 'pro.amount=25_000' is not allowed: a whole number"),
        ("pro.amount=", "'' in 'pro.amount=' is not allowed"),
        ("pro.amount=" + "9" * 5_000, "9999'… is no change: up to 160 characters are allowed"),
        ("pro.amount=0", "amount 0 is not allowed: 1 to"),
        ("pro.amount=9223372036854775808", "amount 9223372036854775808 is not allowed: 1 to 9,223,372,036,854,775,807"),
        ("pro.interval_days=0", "interval days 0 is not allowed: 1 to 3,660 are"),
        ("pro.grant_mode=top", "grant mode 'top' is not allowed: fill, reset, add, rollover are"),
        ("pro.cadence=weekly", "cadence 'weekly' is not allowed: rolling, monthly, daily, external are"),
        ("pro.time_of_day=24:00", "'24:00' in 'pro.time_of_day=24:00' is not allowed: 00:00 to 23:59 are"),
        ("pro.active=yes", "'yes' in 'pro.active=yes' is not allowed: true, false are"),
        ("pro.timezone=Berlin", "time zone 'Berlin' is not allowed: did you mean Europe/Berlin"),
        ("gold.amount=5", "there is no plan 'gold': free, pro are there"),
    ],
)
def test_a_bad_change(world: World, text: str, says: str) -> None:
    with pytest.raises(RefusedError) as raised:
        ask(world, text)
    assert says in str(raised.value)


def test_a_value_twice(world: World) -> None:
    with pytest.raises(RefusedError, match=r"pro\.amount is set twice, to 5 and to 6: once is allowed"):
        ask(world, "pro.amount=5", "pro.amount=6")


@pytest.mark.parametrize("days", [0, 367])
def test_a_period_that_is_not_allowed(world: World, days: int) -> None:
    with pytest.raises(RefusedError, match=f"{days} days are not allowed: 1 to 366 are"):
        ask(world, days=days)


def test_a_plans_code_may_hold_dots() -> None:
    assert parse_change("team.eu.amount=5") == ("team.eu", "amount", 5)


def test_what_may_be_set_is_all_that_the_rule_reads() -> None:
    values = plans.Plan(code="x", name="x", amount=1).values()
    assert {*SETTABLE} == values.keys() - {"code", "name", "atomic"}


def test_the_command(world: World, cli: Cli) -> None:
    world.users(40, due_in="3 days")
    world.user("bob", plan_code="pro", due_in="5 days")
    world.user("held", credit_refresh_hold=True)
    text = cli.says("forecast")
    assert "As it is: refreshes a day (UTC) by plan, and credits at most" in text
    assert text.count("█") >= 20
    assert "As it is, not refreshed in these days: 1 held without end." in text
    facts = cli.facts("forecast", "--days", "10")
    assert (facts["whatIf"], facts["difference"], facts["changes"]) == (None, None, None)
    assert facts["asItIs"]["users"] == 41
    assert facts["asItIs"]["notRefreshed"]["held"] == 1
    assert [row["planCode"] for row in facts["asItIs"]["days"]] == ["free", "pro"]
    assert facts["asItIs"]["days"][0]["refreshes"] == 40
    text = cli.says("forecast", "--set", "pro.amount=25000", "--set", "free.interval_days=1", "--days", "90")
    assert "What if: pro with amount 20000 → 25000." in text
    assert "What if: free with intervalDays 30 → 1." in text
    assert "difference" in text
    world.sql.execute("UPDATE settings SET enabled = false")
    assert "The service is paused" in cli.says("forecast")


def test_the_command_with_many_plans(world: World, cli: Cli) -> None:
    add_plans(world)
    add_users(world, "user", made_up(9, 200))
    head = next(line for line in cli.says("forecast").splitlines() if line.startswith("day"))
    assert head.split()[-2:] == ["(others)", "credits"]
    assert len(head.split()) == 6
    text = cli.says("forecast", "--set", "retired.active=true")
    assert text.count("retired  ") >= 2
    assert text.count("(others)") == 2


def test_the_command_over_nobody(world: World, cli: Cli) -> None:
    assert world.value("SELECT count(*) FROM users") == 0
    assert "As it is: nobody is refreshed from" in cli.says("forecast")


@pytest.mark.usefixtures("world")
def test_bad_input_is_one_line(cli: Cli) -> None:
    refused(cli("forecast", "--days", "0"), 2, "0 is not in the range 1<=x<=366")
    refused(cli("forecast", "--set", "gold.amount=5"), 2, "there is no plan 'gold': free, pro are there")
    refused(cli("forecast", "--set", "pro.grant_mode=rollover"), 2, "--set …rollover_cap, 0 or more")
