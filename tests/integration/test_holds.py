"""Holds: noted once, out of the scan's sight, and over once released or run out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from refresh import selection

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


RELEASES = {
    "the flag alone": "credit_refresh_hold = false",
    "the flag and the reason": "credit_refresh_hold = false, hold_reason = NULL, hold_until = NULL",
}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("ended", [False, True], ids=["before its end", "after its end"])
def test_a_hold_that_was_released_leaves_no_end_to_the_next_one(world: World, release: str, ended: bool) -> None:  # noqa: FBT001
    ada = world.user(due_in="-1 hour")
    world.sql.execute(
        "UPDATE users SET credit_refresh_hold = true, hold_reason = 'fraud check', hold_until = now() + %s::interval",
        ("-1 second" if ended else "1 hour",),
    )
    until = world.see(ada)["hold_until"]
    world.sql.execute(f"UPDATE users SET {RELEASES[release]}")  # noqa: S608
    user = world.see(ada)
    assert (user["credit_refresh_hold"], user["hold_reason"], user["hold_until"]) == (False, None, None)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true")
    user = world.see(ada)
    assert (user["credit_refresh_hold"], user["hold_reason"], user["hold_until"]) == (True, None, None)
    assert world.refresh().users_held == 1
    assert world.see(ada)["wake_at"] is None
    told = [(row["action"], row["detail"]) for row in world.audit(ada) if row["action"] != "held"]
    first = {"reason": "fraud check", "until": told[0][1]["until"]}
    assert told == [
        ("hold_set", first),
        ("hold_expired" if ended else "hold_released", first),
        ("hold_set", {"reason": None, "until": None}),
    ]
    assert world.value("SELECT %s::timestamptz", first["until"]) == until


def test_a_release_of_many_by_the_flag_ends_them_all(world: World) -> None:
    world.users(50)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true, hold_until = now() + id * interval '1 day'")
    world.sql.execute("UPDATE users SET credit_refresh_hold = false WHERE id % 2 = 0")
    ends = world.row("SELECT count(*) AS held, count(hold_until) AS ends FROM users WHERE credit_refresh_hold")
    assert ends == {"held": 25, "ends": 25}
    assert world.value("SELECT count(hold_until) FROM users WHERE NOT credit_refresh_hold") == 0
    actions = world.rows("SELECT action, count(*) FROM credit_audit_logs GROUP BY 1 ORDER BY 1")
    assert {row["action"]: row["count"] for row in actions} == {"hold_set": 50, "hold_released": 25}


def test_an_end_that_is_given_after_the_release_counts(world: World) -> None:
    """As the release itself gives it, or a statement of its own: for the hold that follows."""
    ada = world.user(credit_refresh_hold=True, hold_for="1 hour")
    world.sql.execute("UPDATE users SET credit_refresh_hold = false")
    world.sql.execute("UPDATE users SET hold_until = now() + interval '1 day'")
    given = world.see(ada)["hold_until"]
    world.sql.execute("UPDATE users SET credit_refresh_hold = true")
    assert world.see(ada)["hold_until"] == given
    world.sql.execute("UPDATE users SET credit_refresh_hold = false, hold_until = hold_until + interval '1 day'")
    assert world.see(ada)["hold_until"] > given


# As the door of runs.py puts it, whatever it does with whom it finds.
_SCAN = f"""
EXPLAIN (ANALYZE, BUFFERS, TIMING off, FORMAT json)
WITH {selection.DUE.format(taken=selection.NOBODY)} SELECT id FROM selected
"""  # noqa: S608
HELD_USERS = 100_000


def scanned_blocks(world: World, *, finds: int = 100) -> int:
    world.sql.execute("VACUUM (ANALYZE, INDEX_CLEANUP on) users")
    parameters = {"as_of": None, "atomic": False, "atomic_plans": False}
    with world.sql.cursor() as cursor:
        # Once to fill the caches of the session: its first look at a table reads the catalogue, too.
        for _ in range(2):
            (row,) = cursor.execute(_SCAN, parameters).fetchall()
    plan: dict[str, Any] = row["QUERY PLAN"][0]["Plan"]
    assert plan["Actual Rows"] == finds
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def test_a_hundred_thousand_held_users_cost_the_scan_nothing(world: World) -> None:
    """Blocks, and not time: those that the scan looks at are as many as without them."""
    world.users(1_000, due_in="1 day")
    world.sql.execute("UPDATE users SET next_refresh_at = now() - interval '1 hour' WHERE id % 10 = 0")
    none = scanned_blocks(world)
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at, credit_refresh_hold, held_window)"
        " SELECT 'held-' || n, 'free', 400, at, true, at FROM generate_series(1, %s) AS n,"
        " LATERAL (SELECT now() - n * interval '1 minute' AS at) AS due",
        (HELD_USERS,),
    )
    assert abs(scanned_blocks(world) - none) <= 3
    # Not because nothing would show: a tenth of them, not noted, are looked at.
    world.restore("UPDATE users SET held_window = NULL WHERE credit_refresh_hold AND id %% 10 = 0")
    assert scanned_blocks(world, finds=100 + HELD_USERS // 10) > none + 100
