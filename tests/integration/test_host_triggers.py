"""What a host's plain UPDATE sets off: the refresh on a spend, the grid that is kept, the hold that is on record."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from refresh.switch import turn_trigger
from tests.integration.ledger import behind_the_triggers, check_ledger
from tests.integration.population import CADENCES, MODES, add_plans

if TYPE_CHECKING:
    from datetime import datetime

    from tests.integration.world import World

DAYS_30 = timedelta(days=30)
SPEND = "UPDATE users SET credit_balance = credit_balance - %s WHERE id = %s"
HOLD_ACTIONS = ("hold_set", "hold_changed", "hold_released", "hold_expired")


@pytest.fixture
def spending(world: World) -> World:
    """As `credits db triggers on` leaves it."""
    with world.database.transaction(lock_timeout=timedelta(seconds=5)) as connection:
        assert turn_trigger(connection, on=True, actor="test")
    return world


def due_at(world: World, user_id: int) -> datetime:
    at: datetime = world.see(user_id)["next_refresh_at"]
    return at


# --- the refresh on a spend ------------------------------------------------------------------------------------------


def test_first_the_grant_and_then_the_spend(spending: World) -> None:
    ada = spending.user(credit_balance=50)
    due = due_at(spending, ada)
    row = spending.row(SPEND + " RETURNING credit_balance, next_refresh_at", 900, ada)
    assert row == {"credit_balance": 100, "next_refresh_at": due + DAYS_30}
    user = spending.see(ada)
    (history,) = spending.history(ada)
    (audit,) = spending.audit(ada)
    assert (history["source"], history["run_id"]) == ("trigger", None)
    assert (history["old_balance"], history["credits_added"], history["new_balance"]) == (50, 950, 1_000)
    assert (audit["action"], audit["balance_before"], audit["balance_after"]) == ("refreshed", 50, 1_000)
    assert user["last_credit_refresh"] == history["created_at"]
    assert user["wake_at"] == due + DAYS_30
    assert spending.refresh().users_selected == 0
    check_ledger(spending, {ada: 50 - 900})


def test_who_is_not_due_only_spends(spending: World) -> None:
    ada = spending.user(due_in="1 minute")
    spending.sql.execute(SPEND, (30, ada))
    assert spending.see(ada)["credit_balance"] == 370
    assert spending.history(ada) == spending.audit(ada) == []


def test_credits_that_come_in_are_no_spend(spending: World) -> None:
    ada = spending.user()
    spending.sql.execute(SPEND, (-30, ada))
    spending.sql.execute("UPDATE users SET email = 'ada@example.org'")
    assert (spending.see(ada)["credit_balance"], spending.history(ada)) == (430, [])


def test_the_hosts_rollback_takes_grant_and_spend_back(spending: World) -> None:
    ada = spending.user()
    before = spending.see(ada)
    with spending.host() as host:
        host.execute(SPEND, (30, ada))
        host.rollback()
    assert spending.see(ada) == before
    assert spending.history(ada) == spending.audit(ada) == []


@pytest.mark.parametrize("switch", ["enabled = false", "dry_run = true"])
def test_while_nothing_is_granted_a_spend_is_a_spend(spending: World, switch: str) -> None:
    spending.sql.execute(f"UPDATE settings SET {switch}")  # noqa: S608
    ada, bob = spending.user(), spending.user("bob", credit_refresh_hold=True)
    for user_id in (ada, bob):
        spending.sql.execute(SPEND, (30, user_id))
        assert (spending.see(user_id)["credit_balance"], spending.history(user_id)) == (370, [])


def test_a_held_user_spends_and_the_hold_is_noted_once(spending: World) -> None:
    ada = spending.user(credit_refresh_hold=True)
    for _ in range(3):
        spending.sql.execute(SPEND, (30, ada))
    user = spending.see(ada)
    (history,) = spending.history(ada)
    assert (history["status"], history["source"], history["old_balance"]) == ("held", "trigger", 400)
    assert [row["action"] for row in spending.audit(ada)] == ["hold_set", "held"]
    assert (user["credit_balance"], user["credit_refresh_hold"], user["wake_at"]) == (310, True, None)
    check_ledger(spending, {ada: 310})


def test_a_hold_that_has_run_out_is_ended_on_record(spending: World) -> None:
    ada = spending.user(credit_refresh_hold=True, hold_for="-1 minute")
    spending.sql.execute("UPDATE users SET hold_reason = 'fraud check'")
    spending.sql.execute(SPEND, (30, ada))
    user = spending.see(ada)
    assert (user["credit_balance"], user["credit_refresh_hold"], user["hold_until"]) == (970, False, None)
    assert [row["action"] for row in spending.audit(ada)][-2:] == ["refreshed", "hold_expired"]
    assert spending.audit(ada)[-1]["detail"]["reason"] == "fraud check"


TOGETHER = {
    "a hold": ("credit_refresh_hold = true, hold_reason = 'chargeback'", 370, "held"),
    "a hold that ends": ("credit_refresh_hold = true, hold_until = now() + interval '1 day'", 370, "held"),
    "inactive": ("active = false", 370, None),
    "no plan": ("plan_code = NULL", 370, None),
    "another plan": ("plan_code = 'pro'", 19_970, "refreshed"),
    "a custom amount": ("custom_credit_amount = 5000", 4_970, "refreshed"),
}


@pytest.mark.parametrize("what", TOGETHER)
def test_what_the_host_sets_together_with_the_spend_counts(spending: World, what: str) -> None:
    """A clawback and its hold come in one UPDATE: the hold stands, and nothing is granted under it."""
    ada = spending.user()
    assignment, balance, status = TOGETHER[what]
    spending.sql.execute(
        f"UPDATE users SET credit_balance = credit_balance - 30, {assignment} WHERE id = %s",  # noqa: S608
        (ada,),
    )
    user = spending.see(ada)
    assert user["credit_balance"] == balance
    assert [row["status"] for row in spending.history(ada)] == ([status] if status else [])
    assert user["credit_refresh_hold"] is ("hold" in what)
    assert user["hold_reason"] == ("chargeback" if what == "a hold" else None)
    check_ledger(spending, {ada: 370})


def test_a_release_together_with_the_spend_refreshes(spending: World) -> None:
    ada = spending.user(credit_refresh_hold=True)
    spending.refresh()
    spending.sql.execute("UPDATE users SET credit_balance = credit_balance - 30, credit_refresh_hold = false")
    # wake_at, which the trigger asks, is that of before; the scan does what is left to do.
    spending.refresh()
    assert [row["status"] for row in spending.history(ada)] == ["held", "refreshed"]
    check_ledger(spending, {ada: 370})


def test_a_window_that_was_granted_already_is_not_granted_by_a_spend(spending: World) -> None:
    ada = spending.user()
    due = due_at(spending, ada)
    spending.refresh()
    with behind_the_triggers(spending):
        spending.sql.execute("UPDATE users SET next_refresh_at = %s", (due,))
    spending.sql.execute(SPEND, (30, ada))
    user = spending.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"]) == (970, due + DAYS_30)
    assert [row["action"] for row in spending.audit(ada)] == ["refreshed", "already_granted"]


@pytest.mark.parametrize("grant_mode", MODES)
@pytest.mark.parametrize("path", ["scan", "if_due", "due"])
def test_our_own_statements_never_set_it_off(spending: World, path: str, grant_mode: str) -> None:
    """Under `reset` and `rollover` a refresh lowers a balance, as a spend does."""
    add_plans(spending)
    rich = spending.user("rich", credit_balance=9_000, plan_code=f"rolling-{grant_mode}")
    held = spending.user("held", credit_balance=9_000, plan_code=f"rolling-{grant_mode}", credit_refresh_hold=True)
    if path == "scan":
        spending.refresh()
    elif path == "due":
        spending.value("SELECT refresh_due(10)")
    else:
        spending.rows("SELECT refresh_credits_if_due(external_id) FROM users")
    (history,) = spending.history(rich)
    assert history["source"] == ("run" if path == "scan" else "function")
    balance = {"fill": 9_000, "reset": 1_000, "add": 10_000, "rollover": 1_300}[grant_mode]
    assert spending.see(rich)["credit_balance"] == balance
    assert [row["status"] for row in spending.history(held)] == ["held"]
    check_ledger(spending, {rich: 9_000, held: 9_000})


def test_many_spends_in_one_update(spending: World) -> None:
    spending.users(200)
    before = spending.value("SELECT sum(credit_balance) FROM users")
    spending.sql.execute("UPDATE users SET credit_balance = credit_balance - 1")
    assert spending.value("SELECT count(*) FROM users WHERE credit_balance = 999") == 200
    assert spending.value("SELECT sum(credits_added) FROM credit_refresh_histories") == 200_000 - before
    check_ledger(spending)


# --- dates -----------------------------------------------------------------------------------------------------------


def test_a_date_moved_back_stops_at_the_end_of_what_was_granted(world: World) -> None:
    ada = world.user()
    world.refresh()
    window_end = due_at(world, ada)
    for assignment in (
        "next_refresh_at = now()",
        "next_refresh_at = next_refresh_at - interval '1 microsecond'",
        "next_refresh_at = next_refresh_at - interval '1 year', plan_code = 'pro'",
        "next_refresh_at = now(), credit_refresh_day = 1",
    ):
        world.sql.execute(f"UPDATE users SET {assignment}")  # noqa: S608
        assert due_at(world, ada) >= window_end
    assert world.refresh().users_selected == 0


def test_a_date_may_move_on_and_back_to_that_end(world: World) -> None:
    ada = world.user()
    world.refresh()
    window_end = due_at(world, ada)
    for offset in ("90 days", "60 days", "1 day"):
        world.sql.execute("UPDATE users SET next_refresh_at = %s + %s::interval", (window_end, offset))
        assert due_at(world, ada) == world.value("SELECT %s::timestamptz + %s::interval", window_end, offset)
    world.sql.execute("UPDATE users SET next_refresh_at = NULL")
    world.sql.execute("UPDATE users SET next_refresh_at = now() - interval '1 hour'")
    assert due_at(world, ada) == window_end


def test_a_date_that_nothing_was_granted_for_is_the_hosts_to_set(world: World) -> None:
    ada = world.user()
    world.sql.execute("UPDATE users SET next_refresh_at = '2024-01-01 00:00+00'")
    assert due_at(world, ada) == world.value("SELECT '2024-01-01 00:00+00'::timestamptz")


def test_what_a_rollback_reopens_it_says(world: World) -> None:
    ada = world.user()
    due = due_at(world, ada)
    world.refresh()
    with world.database.transaction() as connection:
        connection.execute("SELECT set_config('credits.reopen', 'on', true)")
        connection.execute("UPDATE users SET next_refresh_at = %s", (due,))
    assert due_at(world, ada) == due
    world.sql.execute("UPDATE users SET next_refresh_at = next_refresh_at - interval '1 hour'")
    assert due_at(world, ada) == due + DAYS_30


def test_another_plan_begins_at_its_first_boundary_after_the_present_window(world: World) -> None:
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, cadence, day_of_month, time_of_day, timezone)"
        " VALUES ('first', 'First', 500, 'monthly', 1, '09:00', 'Europe/Berlin')"
    )
    ada = world.user()
    world.refresh()
    window_end = due_at(world, ada)
    world.sql.execute("UPDATE users SET plan_code = 'first'")
    berlin = world.row(
        "SELECT next_refresh_at, next_refresh_at AT TIME ZONE 'Europe/Berlin' AS local,"
        " next_refresh_at - interval '32 days' < %s AS first_one FROM users",
        window_end,
    )
    assert berlin["next_refresh_at"] >= window_end
    assert (berlin["local"].day, berlin["local"].hour, berlin["first_one"]) == (1, 9, True)
    on_the_grid = berlin["next_refresh_at"]
    world.sql.execute("UPDATE users SET timezone = 'America/New_York'")
    assert due_at(world, ada) > on_the_grid  # nine in New York is later than nine in Berlin
    world.sql.execute("UPDATE users SET credit_refresh_day = 1")
    assert due_at(world, ada) == world.value("SELECT %s::timestamptz + interval '6 hours'", on_the_grid)
    # A date that is set in the same UPDATE is taken as it is, where it earns nothing twice.
    world.sql.execute("UPDATE users SET credit_refresh_day = 20, next_refresh_at = %s", (on_the_grid,))
    assert due_at(world, ada) == on_the_grid


def test_a_boundary_on_the_present_windows_end_is_the_first(world: World) -> None:
    ada = world.user()
    world.sql.execute("UPDATE users SET next_refresh_at = '2031-05-01 00:00+00'")
    for _ in range(3):
        for day in (1, None):
            world.sql.execute("UPDATE users SET credit_refresh_day = %s", (day,))
            assert due_at(world, ada) == world.value("SELECT '2031-05-01 00:00+00'::timestamptz")


def test_a_change_that_changes_nothing_moves_nobody(world: World) -> None:
    ada = world.user()
    before = world.see(ada)
    world.sql.execute("UPDATE users SET plan_code = 'free', credit_refresh_day = NULL, timezone = NULL")
    assert world.see(ada) == before


def test_unscheduled_stays_unscheduled(world: World) -> None:
    """An import without dates waits to be staggered, whatever its plan."""
    ada = world.user(due_in=None)
    for assignment in ("plan_code = 'pro'", "credit_refresh_day = 3", "timezone = 'Asia/Kathmandu'"):
        world.sql.execute(f"UPDATE users SET {assignment}")  # noqa: S608
        assert due_at(world, ada) is None


@pytest.mark.parametrize("cadence", [cadence for cadence in CADENCES if cadence != "external"])
def test_to_an_external_plan_and_back(world: World, cadence: str) -> None:
    add_plans(world)
    ada = world.user(plan_code=f"{cadence}-fill")
    world.refresh()
    window_end = due_at(world, ada)
    for _ in range(3):
        world.sql.execute("UPDATE users SET plan_code = 'external-fill'")
        assert due_at(world, ada) is None
        assert world.refresh().users_selected == 0
        world.sql.execute("UPDATE users SET plan_code = %s", (f"{cadence}-fill",))
        assert due_at(world, ada) >= window_end
    if cadence == "rolling":
        assert due_at(world, ada) == window_end
    assert len(world.history(ada)) == 1
    check_ledger(world, {ada: 400})


# --- holds -----------------------------------------------------------------------------------------------------------


def holds(world: World, user_id: int) -> list[tuple[str, str | None]]:
    rows = [row for row in world.audit(user_id) if row["action"] in HOLD_ACTIONS]
    assert {row["actor"] for row in rows} <= {world.value("SELECT session_user")}
    assert all(row["credits"] == 0 and row["balance_before"] == row["balance_after"] for row in rows)
    return [(row["action"], row["detail"]["reason"]) for row in rows]


def test_a_hold_by_plain_update_is_on_record(world: World) -> None:
    ada = world.user()
    for assignment in (
        "credit_refresh_hold = true, hold_reason = 'fraud check'",
        "hold_reason = 'chargeback'",
        "hold_until = now() + interval '1 day'",
        "email = 'ada@example.org'",
        "credit_refresh_hold = true",
        "credit_refresh_hold = false, hold_reason = NULL, hold_until = NULL",
        "credit_refresh_hold = false",
        "hold_reason = 'nothing is held'",
    ):
        world.sql.execute(f"UPDATE users SET {assignment}")  # noqa: S608
    assert holds(world, ada) == [
        ("hold_set", "fraud check"),
        ("hold_changed", "chargeback"),
        ("hold_changed", "chargeback"),
        ("hold_released", "chargeback"),
    ]
    until = [row["detail"]["until"] for row in world.audit(ada)]
    assert [at is None for at in until] == [True, True, False, False]


@pytest.mark.parametrize("path", ["scan", "if_due", "due"])
def test_an_expiry_is_on_record_whoever_ends_the_hold(world: World, path: str) -> None:
    ada = world.user(credit_refresh_hold=True, hold_for="1 hour")
    world.sql.execute("UPDATE users SET hold_reason = 'fraud check'")
    world.refresh()
    world.sql.execute("UPDATE users SET hold_until = now() - interval '1 second'")
    if path == "scan":
        world.refresh()
    else:
        world.value("SELECT refresh_due(1)" if path == "due" else "SELECT refresh_credits_if_due('ada')")
    assert [action for action, _ in holds(world, ada)] == ["hold_set", "hold_changed", "hold_changed", "hold_expired"]
    assert holds(world, ada)[-1] == ("hold_expired", "fraud check")
    assert world.see(ada)["credit_balance"] == 1_000
    check_ledger(world, {ada: 400})


def test_a_refresh_of_nobody_held_is_no_hold_on_record(world: World) -> None:
    ada, bob = world.user(), world.user("bob", credit_refresh_hold=True)
    world.refresh()
    assert (holds(world, ada), holds(world, bob)) == ([], [("hold_set", None)])
