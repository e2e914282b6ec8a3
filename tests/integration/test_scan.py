"""The scan: whom it selects, how it cuts them, and that two of them take nobody twice."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from refresh import runs
from refresh.errors import RefusedError
from settings import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.world import World


def test_due_users_are_cut_into_batches_of_a_hundred(world: World) -> None:
    world.users(250)
    world.user("tomorrow", due_in="1 day")
    run = world.scan()
    assert (run.users_selected, run.batches_total) == (250, 3)
    sizes = world.rows("SELECT cardinality(user_ids) AS n FROM credit_refresh_batches ORDER BY seq")
    assert [row["n"] for row in sizes] == [100, 100, 50]
    assert world.value("SELECT count(DISTINCT u) FROM credit_refresh_batches, unnest(user_ids) AS u") == 250


@pytest.mark.parametrize(
    "columns",
    [
        {"active": False},
        {"plan_code": None},
        {"due_in": "1 second"},
        {"due_in": None},
    ],
    ids=str,
)
def test_nobody_is_selected_who_could_not_be_refreshed(world: World, columns: dict[str, Any]) -> None:
    world.user("ada", **columns)
    assert world.scan().users_selected == 0


def test_a_user_of_an_inactive_or_external_plan_is_not_selected(world: World) -> None:
    world.user("ada", plan_code="free")
    world.user("bob", plan_code="pro")
    world.sql.execute("UPDATE plans SET active = false WHERE code = 'free'")
    world.sql.execute("UPDATE plans SET cadence = 'external' WHERE code = 'pro'")
    assert world.scan().users_selected == 0


def test_a_scan_that_finds_nobody_is_a_finished_run(world: World) -> None:
    run = world.progress(world.scan())
    assert (run.status, run.users_selected, run.batches_total) == ("succeeded", 0, 0)


def test_a_slot_has_one_run(world: World) -> None:
    world.users(10)
    first = world.scheduled()
    assert isinstance(first, runs.Opened)
    assert first.users_selected == 10
    assert world.scheduled() == runs.NotOpened("slot_taken")
    run = world.row("SELECT source, slot, requested_by, reason FROM credit_refresh_runs")
    assert (run["source"], run["requested_by"], run["reason"]) == ("beat", "beat", "scheduled")
    assert run["slot"] == world.value("SELECT date_bin('1 hour', now(), 'epoch')")


def test_the_next_slot_has_its_own(world: World) -> None:
    assert isinstance(world.scheduled(), runs.Opened)
    world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 hour'")
    assert isinstance(world.scheduled(), runs.Opened)


def test_two_beats_at_the_same_instant_open_one_run(world: World) -> None:
    world.users(10)
    with world.host() as host, world.calls(world.scheduled, world.scheduled) as both:
        host.execute("SELECT pg_advisory_xact_lock(hashtextextended('credits.open_run', 0))")
        both.start()
        world.until(lambda: world.waiting("test") == 2, "both wait at the door")
        host.rollback()
        opened = both.results()
    assert sorted(type(one).__name__ for one in opened) == ["NotOpened", "Opened"]
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


def test_two_scans_at_the_same_instant_batch_nobody_twice(world: World) -> None:
    world.users(150)
    with world.host() as host, world.calls(world.scan, world.scan) as both:
        host.execute("SELECT pg_advisory_xact_lock(hashtextextended('credits.open_run', 0))")
        both.start()
        world.until(lambda: world.waiting("test") == 2, "both wait at the door")
        host.rollback()
        opened = both.results()
    assert sorted(run.users_selected for run in opened) == [0, 150]


def test_a_scan_leaves_out_the_users_of_an_unfinished_run(world: World) -> None:
    world.users(150)
    first = world.scan()
    world.user("late")
    second = world.scan()
    assert second.users_selected == 1
    world.work(world.claim(first))
    assert world.scan().users_selected == 0


@pytest.mark.parametrize("scan", ["cli", "beat"])
def test_while_paused_nothing_is_opened_and_no_slot_taken(world: World, scan: str) -> None:
    world.users(3)
    world.sql.execute("UPDATE settings SET enabled = false")
    assert (world.open() if scan == "cli" else world.scheduled()) == runs.NotOpened("paused")
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0


def test_only_a_dry_run_may_look_ahead(world: World) -> None:
    world.user("ada", due_in="10 days")
    tomorrow = world.value("SELECT now() + interval '11 days'")
    with pytest.raises(RefusedError, match="only a dry run may look ahead"):
        world.scan(as_of=tomorrow)
    assert world.scan(as_of=tomorrow, dry_run=True).users_selected == 1


_MEASURED = """
import resource, sys
from db import Database
from refresh import runs
database = Database(sys.argv[1], "credits", name="measured")
with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection, open(sys.argv[2], "wb") as trace:
    connection.pgconn.trace(trace.fileno())
    run = runs.open_run(connection, runs.Request("cli", "test", 100))
    connection.pgconn.untrace()
print(run.users_selected, run.batches_total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _measure(world: World, url: str, trace: Path) -> tuple[int, int, int, tuple[int, int]]:
    """A scan in a process of its own: users, batches, peak memory in kB; scan statements sent and rows received."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, url, str(trace)],
        check=True, capture_output=True, text=True, cwd=CHECKOUT,
    )  # fmt: skip
    users, batches, peak = (int(word) for word in done.stdout.split())
    traffic = trace.read_text()
    world.sql.execute("TRUNCATE credit_refresh_batches, credit_refresh_runs, stripe_events")
    return users, batches, peak, (traffic.count("INSERT INTO credit_refresh_batches"), traffic.count("\tDataRow\t"))


def test_a_scan_is_one_statement_and_its_memory_does_not_grow_with_the_users(
    world: World, database_url: str, tmp_path: Path
) -> None:
    world.users(1_000)
    small = _measure(world, database_url, tmp_path / "small")
    world.sql.execute(
        """
        INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)
        SELECT 'many-' || n, 'free', 0, now() - interval '1 hour' FROM generate_series(1, 999000) AS n
        """
    )
    large = _measure(world, database_url, tmp_path / "large")
    assert small[:2] == (1_000, 10)
    assert large[:2] == (1_000_000, 10_000)
    assert small[3] == large[3] == (1, 5)  # the lock, the situation, the first user, whether a plan is atomic, the run
    assert large[2] - small[2] < 20 * 1024
