"""The view user_credits_now: each user as if the refresh that is due had happened, and nothing that will not come.

That it equals what every path then writes, over made-up users of all kinds, is in test_host_properties.py.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.ledger import behind_the_triggers
from tests.integration.population import CADENCES, MODES, add_plans

if TYPE_CHECKING:
    from tests.integration.world import World

DAYS_30 = timedelta(days=30)


def shown(world: World, external_id: str = "ada") -> dict[str, Any]:
    return world.row("SELECT * FROM user_credits_now WHERE external_id = %s", external_id)


def test_an_inactive_customer_sees_the_right_number_with_no_job_run(world: World) -> None:
    """77 of 500 used on 28 September, and still on 2 October: what the second seed had to mend."""
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, grant_mode, cadence, day_of_month, time_of_day)"
        " VALUES ('tokens', 'Tokens', 500, 'reset', 'monthly', 1, '00:00')"
    )
    ada = world.user(plan_code="tokens", credit_balance=423, due_in="1 day")
    before = shown(world)
    assert (before["verdict"], before["used"], before["amount"], before["credit_balance"]) == ("not_due", 77, 500, 423)
    # The month turns, and nobody comes by: no worker, no spend.
    world.sql.execute("UPDATE users SET next_refresh_at = now() - interval '1 day'")
    after = shown(world)
    assert (after["verdict"], after["used"], after["amount"], after["credit_balance"]) == ("due", 0, 500, 500)
    assert after["next_refresh_at"] > world.value("SELECT now()")
    assert world.history(ada) == world.audit(ada) == []
    assert world.see(ada)["credit_balance"] == 423


@pytest.mark.parametrize("grant_mode", MODES)
@pytest.mark.parametrize("cadence", CADENCES)
def test_it_shows_what_the_scan_then_writes(world: World, cadence: str, grant_mode: str) -> None:
    add_plans(world)
    for name, due_in in {"due": "-1 hour", "late": "-100 days", "ahead": "1 hour"}.items():
        world.user(name, plan_code=f"{cadence}-{grant_mode}", due_in=due_in, credit_balance=5_000)
    query = "SELECT id, credit_balance, next_refresh_at FROM {} ORDER BY id"
    before = world.rows(query.format("user_credits_now"))
    assert world.refresh().users_refreshed == (0 if cadence == "external" else 2)
    assert before == world.rows(query.format("users")) == world.rows(query.format("user_credits_now"))


STANDING = {
    "held": "credit_refresh_hold = true",
    "inactive": "active = false",
    "no_plan": "plan_code = NULL",
    "unscheduled": "next_refresh_at = NULL",
    "not_due": "next_refresh_at = now() + interval '1 hour'",
    "overflow": "credit_balance = -9223372036854775807 - 1",
}


@pytest.mark.parametrize("verdict", STANDING)
def test_who_would_not_be_refreshed_is_shown_as_they_are(world: World, verdict: str) -> None:
    ada = world.user()
    world.sql.execute(f"UPDATE users SET {STANDING[verdict]}")  # noqa: S608
    user, row = world.see(ada), shown(world)
    assert row["verdict"] == verdict
    assert (row["credit_balance"], row["next_refresh_at"]) == (user["credit_balance"], user["next_refresh_at"])
    assert row["amount"] == (None if verdict == "no_plan" else 1_000)


def test_used_is_what_is_gone_of_the_amount(world: World) -> None:
    for name, balance in {"some": 400, "none": 1_000, "more": 5_000, "debt": -50}.items():
        world.user(name, credit_balance=balance, due_in="1 day")
    world.user("own", custom_credit_amount=7_000, due_in="1 day")
    used = {row["external_id"]: row["used"] for row in world.rows("SELECT external_id, used FROM user_credits_now")}
    assert used == {"some": 600, "none": 0, "more": -4_000, "debt": 1_050, "own": 6_600}


def test_a_number_that_does_not_fit_takes_nobody_elses_away(world: World) -> None:
    world.user("lowest", credit_balance=-(2**63))
    world.user("highest", credit_balance=2**63 - 1, due_in="1 day")
    world.user()
    used = {row["external_id"]: row["used"] for row in world.rows("SELECT external_id, used FROM user_credits_now")}
    assert used == {"lowest": None, "highest": 1_000 - (2**63 - 1), "ada": 0}


def test_missed_windows_show_the_window_of_now(world: World) -> None:
    ada = world.user(due_in="-95 days")
    assert shown(world)["next_refresh_at"] == world.see(ada)["next_refresh_at"] + 4 * DAYS_30


def test_a_hold_that_has_run_out_hides_nothing(world: World) -> None:
    world.user(credit_refresh_hold=True, hold_for="-1 minute")
    assert (shown(world)["verdict"], shown(world)["credit_balance"]) == ("due", 1_000)


@pytest.mark.parametrize("switch", ["enabled = false", "dry_run = true"])
def test_while_nothing_is_granted_nothing_is_shown_that_will_not_come(world: World, switch: str) -> None:
    ada = world.user()
    world.sql.execute(f"UPDATE settings SET {switch}")  # noqa: S608
    row = shown(world)
    assert (row["verdict"], row["credit_balance"], row["used"]) == ("due", 400, 600)
    assert row["next_refresh_at"] == world.see(ada)["next_refresh_at"]


def test_a_window_that_was_granted_already_is_not_shown_again(world: World) -> None:
    ada = world.user()
    due = world.see(ada)["next_refresh_at"]
    world.refresh()
    with behind_the_triggers(world):
        world.sql.execute("UPDATE users SET credit_balance = 3, next_refresh_at = %s", (due,))
    row = shown(world)
    assert (row["verdict"], row["credit_balance"], row["used"]) == ("due", 3, 997)
    assert row["next_refresh_at"] == due + DAYS_30
    world.refresh()
    user = world.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"]) == (3, due + DAYS_30)


def test_a_grant_that_was_reversed_is_shown_again(world: World) -> None:
    ada = world.user()
    due = world.see(ada)["next_refresh_at"]
    run = world.refresh()
    world.sql.execute("UPDATE credit_refresh_histories SET reversed_by_run_id = %s", (run.run_id,))
    world.sql.execute("UPDATE users SET credit_balance = 400, next_refresh_at = %s", (due,))
    assert shown(world)["credit_balance"] == 1_000
    world.refresh()
    assert world.see(ada)["credit_balance"] == 1_000


def test_one_user_is_one_look_at_the_unique_index(world: World) -> None:
    world.users(5_000, due_in="-1 hour")
    world.refresh()
    with behind_the_triggers(world):
        world.sql.execute("UPDATE users SET next_refresh_at = next_refresh_at - interval '30 days' WHERE id < 2500")
    world.sql.execute("ANALYZE")
    query = "SELECT * FROM user_credits_now WHERE external_id = 'user-77'"
    plan = "\n".join(row["QUERY PLAN"] for row in world.rows(f"EXPLAIN (ANALYZE, BUFFERS OFF) {query}"))
    assert "Index Scan using uq_users_external_id" in plan
    assert "Seq Scan on users" not in plan
    # Whether the window was granted is asked of one user, through the key that guards it: nothing is read and dropped.
    assert re.search(r"Index .*Scan using credit_refresh_histories_\w+_user_id_window_start_idx", plan)
    assert "Rows Removed by Filter" not in plan
    assert "decide(" not in plan
