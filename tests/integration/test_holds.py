"""Holds: noted once, out of the scan's sight, and over once released or run out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.integration.world import World


def test_the_window_that_falls_due_under_hold_leaves_one_row_however_often_the_scan_runs(world: World) -> None:
    ada = world.user(credit_refresh_hold=True)
    due = world.see(ada)["next_refresh_at"]
    run = world.refresh()
    assert (run.status, run.users_held, run.users_refreshed, run.credits_granted) == ("succeeded", 1, 0, 0)
    for _ in range(3):
        assert world.refresh().users_selected == 0
    (history,) = world.history(ada)
    assert (history["status"], history["credits_added"], history["window_start"]) == ("held", 0, due)
    assert [row["action"] for row in world.audit(ada)] == ["hold_set", "held"]
    user = world.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"], user["held_window"]) == (400, due, due)
    assert user["wake_at"] is None


def test_released_by_a_plain_update_the_user_is_refreshed_once(world: World) -> None:
    ada = world.user(credit_refresh_hold=True)
    world.refresh()
    world.sql.execute("UPDATE users SET credit_refresh_hold = false WHERE id = %s", (ada,))
    assert world.refresh().users_refreshed == 1
    assert world.refresh().users_selected == 0
    user = world.see(ada)
    assert (user["credit_balance"], user["held_window"]) == (1_000, None)
    assert [row["status"] for row in world.history(ada)] == ["held", "refreshed"]


def test_a_hold_that_has_run_out_is_ended_by_the_refresh(world: World) -> None:
    ada = world.user(credit_refresh_hold=True, hold_for="1 hour")
    world.sql.execute("UPDATE users SET hold_reason = 'fraud check' WHERE id = %s", (ada,))
    world.refresh()
    assert world.see(ada)["wake_at"] == world.see(ada)["hold_until"]
    world.sql.execute("UPDATE users SET hold_until = now() - interval '1 second' WHERE id = %s", (ada,))
    assert world.refresh().users_refreshed == 1
    user = world.see(ada)
    assert (user["credit_refresh_hold"], user["hold_reason"], user["hold_until"]) == (False, None, None)
    assert user["credit_balance"] == 1_000


def test_after_months_under_hold_the_grant_is_for_the_window_of_now(world: World) -> None:
    ada = world.user(due_in="-70 days", credit_refresh_hold=True)
    world.refresh()
    world.sql.execute("UPDATE users SET credit_refresh_hold = false WHERE id = %s", (ada,))
    world.refresh()
    granted = world.history(ada)[-1]
    assert (granted["status"], granted["windows_passed"]) == ("refreshed", 2)
    assert world.see(ada)["next_refresh_at"] == granted["window_end"]


def test_held_again_in_the_same_window_leaves_no_second_row(world: World) -> None:
    ada = world.user(credit_refresh_hold=True)
    world.refresh()
    world.sql.execute("UPDATE users SET credit_refresh_hold = false, held_window = NULL WHERE id = %s", (ada,))
    world.sql.execute("UPDATE users SET credit_refresh_hold = true WHERE id = %s", (ada,))
    run = world.refresh()
    assert (run.status, run.users_held) == ("succeeded", 1)
    assert [row["status"] for row in world.history(ada)] == ["held"]
    assert world.refresh().users_selected == 0


def test_noted_holds_are_not_in_the_wake_index(world: World) -> None:
    world.users(500)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true")
    assert world.refresh().users_held == 500
    assert world.value("SELECT count(*) FROM users WHERE wake_at IS NOT NULL") == 0
