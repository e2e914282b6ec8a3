"""The checker: silent about everything that is anybody's right, and about each wrong it says which rule it breaks."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from refresh.selection import Selection
from tests.faults import arithmetic, checker
from tests.faults.town import AN_HOUR, PLANS, Town, a_town
from tests.faults.wrongs import PREPARE, WRONGS
from tests.integration import applying, bulk, rollbacks

if TYPE_CHECKING:
    from collections.abc import Iterator

OWN = ("accounts", "arithmetic", "books", "checker", "run_rules", "witness")
"""The files of the checker."""


@pytest.fixture
def town(database_url: str) -> Iterator[Town]:
    with a_town(database_url) as made:
        yield made


def live(town: Town) -> None:
    """All that a fault suite does to its users, in an order of its own."""
    world = town.world
    town.bring_many(40)
    town.bring("missed", due_in=-2_000 * AN_HOUR)
    town.bring("custom", custom=750)
    town.bring("new", due_in=None)
    town.bring("toad", kind="poison")
    town.hold("user-7")
    town.spend("user-8", 30)
    first = town.scan()
    town.spend("user-12", 40)
    rollbacks.work_off(
        world, rollbacks.opened(world, first.run_id, users=["user-11", "user-12", "user-13", "user-14"], reopen=True)
    )
    town.scan()
    town.spend("new", 10)
    town.sql.execute("UPDATE users SET active = false WHERE external_id = 'user-9'")
    town.hold("user-10")
    town.release("user-7")
    world.value("SELECT refresh_credits_if_due('user-7')")
    town.set_back("user-1")
    world.value("SELECT refresh_credits_if_due('user-1')")
    town.set_back("user-2")
    _force_and_take_back(town)
    planned = applying.plan(world, force=True)
    town.spend("user-4", 5)
    assert applying.applied(world, planned).users_refreshed > 0
    world.sql.execute("DELETE FROM host.poisoned")
    town.scan()
    assert town.scan().users_selected == 0


def _force_and_take_back(town: Town) -> None:
    world = town.world
    for number, plan in enumerate(PLANS):
        given = bulk.opened(world, Selection(plan=plan), force=True, keep_window=number == 2, amount=2_000 + number)
        world.work(world.claim(given))
        name = world.value("SELECT external_id FROM users WHERE plan_code = %s AND active ORDER BY id LIMIT 1", plan)
        balance = world.value("SELECT credit_balance FROM users WHERE external_id = %s", name)
        town.spend(name, balance - 3)
        rollbacks.roll_back(world, given, reopen=number in {1, 3}, allow_negative=number == 2)
        town.scan()


def test_what_is_anybodys_right_is_right(town: Town) -> None:
    live(town)
    assert town.check(finished=True) == []
    assert town.watch() == []
    written = {
        row["status"]: row["rows"]
        for row in town.world.rows("SELECT status, count(*) AS rows FROM credit_refresh_histories GROUP BY status")
    }
    assert written.keys() >= {"refreshed", "reversed", "held", "failed", "planned"}


def test_nobody_waits_for_the_end_of_a_run(town: Town) -> None:
    town.bring_many(40)
    first, _ = town.world.claim(town.open_scan())
    town.world.work([first])
    assert town.check(finished=False) == []
    assert {finding.rule for finding in town.check(finished=True)} == {"unfinished", "due-left"}


@pytest.fixture(scope="module")
def past(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database with a past, to copy from."""
    cluster = request.getfixturevalue("cluster")
    name = cluster.create(cluster.template)
    with a_town(cluster.url(name)) as town:
        live(town)
    yield name
    cluster.drop(name)


@pytest.mark.parametrize("name", WRONGS)
def test_each_wrong_breaks_its_rule(name: str, past: str, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue("cluster")
    copy = cluster.create(past)
    with a_town(cluster.url(copy), prepared=True) as town:
        assert town.check(finished=True) == []
        town.sql.execute(PREPARE)
        town.sql.execute("SET session_replication_role = replica")
        town.sql.execute(WRONGS[name].script)
        town.sql.execute("RESET session_replication_role")
        found = town.check(finished=True)
        assert {finding.rule for finding in found} == WRONGS[name].rules, found
    cluster.drop(copy)


def test_whoever_is_left_is_seen_though_no_scan_comes(town: Town) -> None:
    town.bring("ada")
    assert [finding.rule for finding in town.check(finished=True)] == ["due-left"]
    assert town.check(finished=False) == []


def test_of_many_findings_a_few_are_told(town: Town) -> None:
    town.bring_many(checker.EACH_MAX + 2)
    found = town.check(finished=True)
    assert len(found) == checker.EACH_MAX + 1
    assert found[-1] == ("due-left", "… and 2 more")


def test_a_held_user_is_not_left(town: Town) -> None:
    town.bring("ada")
    town.hold("ada")
    town.scan()
    assert town.check(finished=True) == []


def test_the_checker_shares_no_code_with_the_product() -> None:
    folder = Path(checker.__file__).parent
    allowed = {"psycopg", "tests"}
    standard = {"__future__", "collections", "dataclasses", "datetime", "itertools", "operator", "typing", "uuid"}
    for name in OWN:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
                siblings = {alias.name for alias in node.names} if node.module == "tests.faults" else set()
                assert siblings <= set(OWN)
            for module in modules:
                first, *rest = module.split(".")
                assert first in allowed | standard, f"{name}.py imports {module}"
                assert first != "tests" or rest[:1] == ["faults"], f"{name}.py imports {module}"
                assert rest[1:2] == [] or first != "tests" or rest[1] in OWN, f"{name}.py imports {module}"


@pytest.mark.parametrize(
    ("mode", "cap", "balance", "added"),
    [
        ("fill", None, 100, 900),
        ("fill", None, 1_200, 0),
        ("fill", None, -50, 1_050),
        ("reset", None, 1_200, -200),
        ("add", None, 1_200, 1_000),
        ("rollover", 200, 150, 1_000),
        ("rollover", 200, 500, 700),
        ("rollover", 200, -50, 1_000),
    ],
)
def test_modes(mode: str, cap: int | None, balance: int, added: int) -> None:
    assert arithmetic.credits_to_add(mode, 1_000, cap, balance) == added
