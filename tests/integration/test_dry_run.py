"""Dry runs: everything decided and recorded, no user touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refresh import runs
from refresh.errors import RefusedError

if TYPE_CHECKING:
    from tests.integration.world import World

PLANNED = "SELECT * FROM credit_refresh_histories WHERE status = 'planned' ORDER BY user_id"


def test_a_dry_run_writes_what_it_would_do_and_touches_no_user(world: World) -> None:
    ada = world.user()
    world.user("bob", credit_refresh_hold=True)
    users = world.rows("SELECT * FROM users ORDER BY id")
    run = world.refresh(dry_run=True)
    assert (run.status, run.dry_run, run.users_refreshed, run.users_held) == ("succeeded", True, 1, 1)
    assert world.rows("SELECT * FROM users ORDER BY id") == users
    (plan,) = world.rows(PLANNED)
    assert (plan["user_id"], plan["dry_run"], plan["run_id"]) == (ada, True, run.run_id)
    assert (plan["old_balance"], plan["credits_added"], plan["new_balance"]) == (400, 600, 1_000)
    (audit,) = world.rows("SELECT * FROM credit_audit_logs WHERE action <> 'hold_set'")
    assert (audit["action"], audit["user_id"], audit["credits"]) == ("planned", None, 0)
    assert audit["detail"]["users_planned"] == 1
    assert audit["detail"]["credits_planned"] == 600


def test_what_a_dry_run_plans_is_what_the_scan_then_writes(world: World) -> None:
    world.users(120)
    world.user("late", due_in="-95 days")
    world.refresh(dry_run=True)
    world.refresh()
    columns = "user_id, window_start, window_end, first_missed_at, windows_passed, plan_code, grant_mode, target,"
    columns += " old_balance, credits_added, new_balance, previous_next_refresh_at"
    query = f"SELECT {columns} FROM credit_refresh_histories WHERE status = %s ORDER BY user_id"  # noqa: S608
    planned = world.rows(query, "planned")
    assert len(planned) == 121
    assert planned == world.rows(query, "refreshed")


def test_nobody_passes_for_beat_whose_dry_runs_leave_out_what_is_planned() -> None:
    """Else `--reason scheduled` would plan nobody who is planned already, and an apply would grant too few."""
    with pytest.raises(RefusedError, match="'scheduled' is that of beat's runs: give another"):
        runs.Request("cli", "kim", 100, dry_run=True, reason="scheduled")


def test_each_dry_run_that_somebody_asked_for_has_its_own_rows(world: World) -> None:
    world.user()
    world.refresh(dry_run=True)
    world.refresh(dry_run=True)
    assert len(world.rows(PLANNED)) == 2


def test_scheduled_dry_runs_plan_a_user_and_window_once(world: World) -> None:
    world.users(10)
    for _ in range(3):
        run = world.scheduled(dry_run=True)
        assert isinstance(run, runs.Opened)
        world.work(world.claim(run))
        world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 hour'")
    assert len(world.rows(PLANNED)) == 10
    selected = world.rows("SELECT users_selected AS n FROM credit_refresh_runs ORDER BY created_at")
    assert [row["n"] for row in selected] == [10, 0, 0]


def test_two_scheduled_dry_runs_that_overlap_plan_each_user_once(world: World) -> None:
    world.users(10)
    first = world.scheduled(dry_run=True)
    world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 hour'")
    second = world.scheduled(dry_run=True)
    assert isinstance(first, runs.Opened)
    assert isinstance(second, runs.Opened)
    assert second.users_selected == 10
    world.work(world.claim(first))
    world.work(world.claim(second))
    assert len(world.rows(PLANNED)) == 10
    done = world.progress(second)
    assert (done.status, done.users_refreshed, done.users_skipped) == ("succeeded", 0, 10)


def test_a_dry_run_takes_no_slot_from_the_real_scan_and_nobodys_users(world: World) -> None:
    world.users(10)
    assert isinstance(world.scheduled(dry_run=True), runs.Opened)
    real = world.scheduled()
    assert isinstance(real, runs.Opened)
    assert real.users_selected == 10


def test_the_dry_switch_in_the_database_makes_every_run_dry(world: World) -> None:
    ada = world.user()
    world.sql.execute("UPDATE settings SET dry_run = true")
    assert world.refresh().dry_run
    assert world.see(ada)["credit_balance"] == 400


def test_a_dry_run_does_not_wait_for_a_hosts_lock(world: World) -> None:
    ada = world.user()
    ids = world.claim(world.scan(dry_run=True))
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = 0 WHERE id = %s", (ada,))
        (done,) = world.work(ids)
    assert done.users_refreshed == 1


def test_scheduled_dry_runs_plan_a_user_again_in_the_next_window(world: World) -> None:
    world.user()
    for selected in (1, 0, 1):
        run = world.scheduled(dry_run=True)
        assert isinstance(run, runs.Opened)
        assert run.users_selected == selected
        world.work(world.claim(run))
        world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 hour'")
        if selected == 0:  # a month later
            world.sql.execute(
                """
                UPDATE credit_refresh_histories
                SET window_start = window_start - interval '30 days', window_end = window_end - interval '30 days'
                """
            )
            world.sql.execute("UPDATE users SET next_refresh_at = next_refresh_at - interval '30 days'")
    assert len(world.rows(PLANNED)) == 2


def test_a_dry_run_that_looks_far_ahead_finds_its_partitions(world: World) -> None:
    world.user(due_in="200 days")
    run = world.refresh(dry_run=True, as_of=world.value("SELECT now() + interval '201 days'"))
    assert run.users_refreshed == 1
    assert world.value("SELECT count(*) FROM credit_refresh_histories_default") == 0
