"""The cases of docs/rule.md, worked out by hand, put to the SQL rule and to the oracle."""

from __future__ import annotations

from datetime import datetime, time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import oracle
from tests.integration.rule import SESSIONS, Rule, sessions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster

Row = dict[str, str]

NOTHING = "–"  # noqa: RUF001 - as the page writes it
LINES = (Path(__file__).parents[2] / "docs" / "rule.md").read_text().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


def table_rows(columns: str) -> list[Row]:
    """The rows of every table in docs/rule.md that has exactly these columns."""
    names = cells(columns)
    found: list[Row] = []
    inside = False
    for line in LINES:
        if not line.startswith("|"):
            inside = False
        elif cells(line) == names:
            inside = True
        elif inside and not line.startswith("|---"):
            found.append(dict(zip(names, cells(line), strict=True)))
    return found


WINDOWS = table_rows("cadence | interval | day | time | zone | due at | as of | window start | window end | passed")
AMOUNTS = table_rows("mode | target | cap | balance | credits added")
VERDICTS = table_rows(
    "plan | user | due at | as of | verdict | window start | window end | first missed | credits",
)
ASKED = table_rows("asked | plan | user | due at | as of | verdict | window start | window end | credits")


def named(rows: list[Row], *columns: str) -> list[object]:
    return [pytest.param(row, id=" ".join(row[column] for column in columns)) for row in rows]


def instant(cell: str) -> datetime:
    assert cell.endswith("Z")
    return datetime.fromisoformat(cell)


def instant_or_none(cell: str) -> datetime | None:
    return None if cell == NOTHING else instant(cell)


def number(cell: str) -> int | None:
    return None if cell in (NOTHING, "overflow") else int(cell)


def integer(cell: str) -> int:
    return int(cell)


@pytest.fixture(scope="module")
def rules(cluster: Cluster) -> Iterator[list[Rule]]:
    with sessions(cluster) as opened:
        yield opened


@pytest.fixture(params=range(len(SESSIONS)), ids=list(SESSIONS))
def rule(request: pytest.FixtureRequest, rules: list[Rule]) -> Rule:
    session: int = request.param
    return rules[session]


def test_the_page_has_its_cases() -> None:
    assert len(WINDOWS) >= 60
    assert (len(WINDOWS), len(AMOUNTS), len(VERDICTS), len(ASKED)) == (66, 26, 26, 42)
    assert {row["cadence"] for row in WINDOWS} == {"rolling", "monthly", "daily"}
    assert {row["mode"] for row in AMOUNTS} == {"fill", "reset", "add", "rollover"}
    assert {row["verdict"] for row in VERDICTS} == {
        *("due", "not_due", "held", "inactive", "no_plan", "external", "unscheduled", "overflow"),
    }


@pytest.mark.parametrize("row", named(WINDOWS, "cadence", "day", "time", "zone", "due at", "as of"))
def test_window(rule: Rule, row: Row) -> None:
    grid = oracle.Grid(
        cadence=row["cadence"],
        interval_days=number(row["interval"]) or 30,
        day=number(row["day"]),
        time_of_day=time(0) if row["time"] == NOTHING else time.fromisoformat(row["time"]),
        timezone=rule.zone(row["zone"]),
    )
    due, as_of, passed = instant(row["due at"]), instant(row["as of"]), integer(row["passed"])
    by_hand = oracle.Window(instant(row["window start"]), instant(row["window end"]), passed, due if passed else None)
    assert rule.windows([(grid, due, as_of)]) == [by_hand]
    assert oracle.window(grid, due, as_of) == by_hand


@pytest.mark.parametrize("row", named(AMOUNTS, "mode", "target", "cap", "balance"))
def test_amount(rule: Rule, row: Row) -> None:
    asked = (row["mode"], integer(row["target"]), number(row["cap"]), integer(row["balance"]))
    by_hand = number(row["credits added"])
    assert rule.credits(*asked) == by_hand
    assert oracle.credits(*asked) == by_hand


def settings_of(cell: str) -> dict[str, str]:
    return {} if cell == NOTHING else dict(part.split("=", 1) for part in cell.split())


def plan_of(rule: Rule, cell: str) -> oracle.Plan | None:
    if cell == "none":
        return None
    named = settings_of(cell)
    plan = oracle.Plan(
        grant_mode=named.pop("mode", "fill"),
        rollover_cap=number(named.pop("cap", NOTHING)),
        cadence=named.pop("cadence", "rolling"),
        day_of_month=number(named.pop("day", NOTHING)),
        time_of_day=time.fromisoformat(named.pop("time")) if "time" in named else None,
        timezone=rule.zone(named.pop("zone", "UTC")),
        active=named.pop("active", "yes") == "yes",
    )
    assert not named
    return plan


def user_of(rule: Rule, cell: str, due: datetime | None) -> oracle.User:
    named = settings_of(cell)
    held = named.pop("held", "no")
    user = oracle.User(
        balance=integer(named.pop("balance", "400")),
        next_refresh_at=due,
        held=held != "no",
        hold_until=None if held in ("yes", "no") else instant(held),
        refresh_day=number(named.pop("day", NOTHING)),
        custom_amount=number(named.pop("custom", NOTHING)),
        timezone=rule.zone(named.pop("zone")) if "zone" in named else None,
        active=named.pop("active", "yes") == "yes",
        shortfall=integer(named.pop("shortfall", "0")),
    )
    assert not named
    return user


def run_of(cell: str) -> oracle.Asked:
    words = set() if cell == NOTHING else set(cell.split())
    amounts = {word for word in words if word.startswith("amount=")}
    assert words - amounts <= {"force", "keep"}
    amount = amounts.pop().removeprefix("amount=") if amounts else NOTHING
    return oracle.Asked(force="force" in words, keep_window="keep" in words, amount=number(amount))


@pytest.mark.parametrize("row", named(VERDICTS, "plan", "user", "due at", "as of"))
def test_verdict(rule: Rule, row: Row) -> None:
    due, as_of = instant_or_none(row["due at"]), instant(row["as of"])
    plan, user = plan_of(rule, row["plan"]), user_of(rule, row["user"], due)
    for decision in (rule.decide(user, plan, as_of), oracle.decide(user, plan, as_of)):
        assert (decision.verdict, decision.credits_added) == (row["verdict"], number(row["credits"]))
        if row["window start"] == NOTHING:
            assert decision.window is None
        elif row["window start"]:
            assert decision.window is not None
            assert decision.window.start == instant(row["window start"])
            assert decision.window.end == instant(row["window end"])
            assert decision.window.first_missed_at == instant_or_none(row["first missed"])


@pytest.mark.parametrize("row", named(ASKED, "asked", "plan", "user", "due at", "as of"))
def test_asked(rule: Rule, row: Row) -> None:
    due, as_of = instant_or_none(row["due at"]), instant(row["as of"])
    plan, user, run = plan_of(rule, row["plan"]), user_of(rule, row["user"], due), run_of(row["asked"])
    for decision in (rule.decide(user, plan, as_of, run), oracle.decide(user, plan, as_of, run)):
        assert (decision.verdict, decision.credits_added) == (row["verdict"], number(row["credits"]))
        if row["window start"] == NOTHING:
            assert decision.window is None
        elif row["window start"]:
            assert decision.window is not None
            assert decision.window.start == instant(row["window start"])
            assert decision.window.end == instant_or_none(row["window end"])
