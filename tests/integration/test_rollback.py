"""Rollback: what it takes, from whom it keeps away, and what becomes of the dates. Its runs: test_rollback_runs.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refresh import runs
from tests.integration.ledger import check_ledger
from tests.integration.rollbacks import (
    REASON,
    call_function,
    dates,
    expect,
    grant,
    last,
    opened,
    refresh,
    roll_back,
    spend,
    work_off,
)

if TYPE_CHECKING:
    from tests.integration.world import World

LARGEST = 2**63 - 1


# --- what is taken --------------------------------------------------------------------------------------------------


def test_what_is_there_is_taken_and_what_was_spent_is_the_shortfall(world: World) -> None:
    ada, bob = world.user(), world.user("bob", credit_balance=0)
    run = refresh(world)
    spend(world, ada, 100)
    spend(world, bob, 700)
    done = roll_back(world, run)
    assert (done.kind, done.status) == ("rollback", "succeeded")
    assert (done.users_refreshed, done.users_skipped, done.credits_granted) == (2, 0, -900)
    assert [world.see(id_)["credit_balance"] for id_ in (ada, bob)] == [300, 0]
    assert [(row["status"], row["credits_added"], row["shortfall"]) for row in world.history(bob)] == [
        ("refreshed", 1_000, 0),
        ("reversed", -300, 700),
    ]
    assert [world.see(id_)["refresh_shortfall"] for id_ in (ada, bob)] == [0, 0]
    check_ledger(world, {ada: 300, bob: -700})


def test_the_rows_say_what_was_done_by_whom_and_why(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    spend(world, ada, 900)
    before = world.see(ada)
    undone = opened(world, run.run_id)
    work_off(world, undone)
    given, row = world.history(ada)
    assert given["reversed_by_run_id"] == undone.run_id == row["run_id"]
    same = ("window_start", "window_end", "plan_code", "grant_mode", "target")
    assert [row[name] for name in same] == [given[name] for name in same]
    assert (row["old_balance"], row["credits_added"], row["new_balance"], row["shortfall"]) == (100, -100, 0, 500)
    assert row["previous_next_refresh_at"] == before["next_refresh_at"]
    assert row["previous_last_refresh"] == before["last_credit_refresh"]
    assert row["reason"] == REASON
    audit = world.audit(ada)[-1]
    assert (audit["action"], audit["actor"], audit["run_id"]) == ("reversed", "cli:ops", undone.run_id)
    assert (audit["balance_before"], audit["balance_after"], audit["credits"]) == (100, 0, -100)
    assert audit["detail"] == {"reason": REASON, "reversedRun": str(run.run_id), "shortfall": 500}
    stored = world.row("SELECT * FROM credit_refresh_runs WHERE id = %s", undone.run_id)
    assert (stored["parent_run_id"], stored["subject_run_id"], stored["work"]) == (run.run_id, run.run_id, "rollback")
    assert stored["selection"] == {"run": str(run.run_id), "reopen": False, "allowNegative": False}


@pytest.mark.parametrize(
    ("spent", "policy", "balance", "shortfall"),
    [
        (0, False, 400, 0),
        (400, False, 0, 0),
        (401, False, 0, 1),
        (1_000, False, 0, 600),
        (1_200, False, -200, 600),
        (401, True, -1, 0),
        (1_200, True, -800, 0),
    ],
)
def test_below_zero_by_the_policy_alone(world: World, spent: int, policy: bool, balance: int, shortfall: int) -> None:  # noqa: FBT001
    ada = world.user()
    run = refresh(world)
    spend(world, ada, spent)
    expected = expect(world, run.run_id, allow_negative=policy)
    done = roll_back(world, run, allow_negative=policy)
    assert (expected.users, -expected.credits_taken, expected.shortfall) == (1, done.credits_granted, shortfall)
    assert (world.see(ada)["credit_balance"], last(world, ada)["shortfall"]) == (balance, shortfall)
    check_ledger(world, {ada: 400 - spent})


def test_what_a_reset_took_is_given_back(world: World) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'reset' WHERE code = 'free'")
    ada = world.user(credit_balance=5_000)
    run = refresh(world)
    assert world.see(ada)["credit_balance"] == 1_000
    spend(world, ada, 1_500)
    assert roll_back(world, run).credits_granted == 4_000
    assert world.see(ada)["credit_balance"] == 3_500
    check_ledger(world, {ada: 3_500})


def test_a_balance_that_would_not_fit_fails_its_user_alone(world: World) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'reset' WHERE code = 'free'")
    ada, bob = world.user(credit_balance=5_000), world.user("bob")
    run = refresh(world)
    world.sql.execute("UPDATE users SET credit_balance = %s WHERE id = %s", (LARGEST - 10, ada))
    assert expect(world, run.run_id).failing == 1
    done = roll_back(world, run)
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 1, 1)
    row = last(world, ada)
    assert (row["status"], row["credits_added"], row["error"]) == ("failed", 0, "the balance would not fit 64 bits")
    assert world.audit(ada)[-1]["action"] == "refresh_failed"
    assert grant(world, ada)["reversed_by_run_id"] is None
    assert world.see(ada)["credit_balance"] == LARGEST - 10
    assert world.see(bob)["credit_balance"] == 400


def test_one_user_whom_the_host_refuses_does_not_keep_the_others(world: World) -> None:
    ids = [world.user(name) for name in ("ada", "bob", "cyd")]
    run = refresh(world)
    for id_ in ids:
        spend(world, id_, 700)
    spend(world, ids[1], 300)
    world.sql.execute("ALTER TABLE users ADD CONSTRAINT host CHECK (credit_balance >= -400)")
    done = roll_back(world, run, allow_negative=True)
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 2, 1)
    assert [world.see(id_)["credit_balance"] for id_ in ids] == [-300, 0, -300]
    assert "violates check constraint" in last(world, ids[1])["error"]


# --- from whom ------------------------------------------------------------------------------------------------------


def test_who_was_refreshed_since_is_left_alone_and_reported(world: World) -> None:
    ada, bob = world.user(), world.user("bob")
    run = refresh(world)
    spend(world, ada, 100)
    world.restore("UPDATE users SET next_refresh_at = now() - interval '1 minute' WHERE id = %s", ada)
    assert call_function(world, "ada")["refreshed"]
    before = world.see(ada)
    assert (expect(world, run.run_id).users, expect(world, run.run_id).refreshed_since) == (1, 1)
    done = roll_back(world, run)
    assert (done.status, done.users_refreshed, done.users_skipped) == ("succeeded", 1, 1)
    assert world.see(ada) == before
    row, audit = last(world, ada), world.audit(ada)[-1]
    assert (row["status"], row["reason"], row["credits_added"], row["shortfall"]) == (
        "skipped",
        "refreshed_since",
        0,
        0,
    )
    assert (audit["action"], audit["credits"], audit["detail"]["skipped"]) == ("skipped", 0, "refreshed_since")
    assert world.see(bob)["credit_balance"] == 400


def test_a_grant_that_was_itself_taken_back_does_not_count_as_since(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    forced = refresh(world, force=True, amount=5_000)
    roll_back(world, forced)
    roll_back(world, run)
    assert world.see(ada)["credit_balance"] == 400
    check_ledger(world, {ada: 400})


def test_the_held_and_the_inactive_are_taken_back_and_the_deleted_are_skipped(world: World) -> None:
    ada, bob, cyd = (world.user(name) for name in ("ada", "bob", "cyd"))
    run = refresh(world)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true WHERE id = %s", (ada,))
    world.sql.execute("UPDATE users SET active = false WHERE id = %s", (bob,))
    world.sql.execute("DELETE FROM users WHERE id = %s", (cyd,))
    assert expect(world, run.run_id).deleted == 1
    done = roll_back(world, run)
    assert (done.status, done.users_refreshed, done.users_skipped) == ("succeeded", 2, 1)
    assert [world.see(id_)["credit_balance"] for id_ in (ada, bob)] == [400, 400]
    assert world.see(ada)["credit_refresh_hold"]
    assert [row["status"] for row in world.history(cyd)] == ["refreshed"]


def test_who_was_only_held_by_the_run_is_none_of_its(world: World) -> None:
    ada, _held = world.user(), world.user("bob", credit_refresh_hold=True)
    run = refresh(world)
    assert opened(world, run.run_id).users_selected == 1
    assert ada


def test_an_apply_is_rolled_back_like_any_run(world: World) -> None:
    from refresh.apply import open_apply  # noqa: PLC0415 - for this test alone

    ada = world.user()
    plan = refresh(world, dry_run=True)
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        applied = open_apply(connection, plan.run_id, runs.Request("cli", "cli:ops", 100, reason="planned"))
    assert isinstance(applied, runs.Opened)
    assert work_off(world, applied).users_refreshed == 1
    assert roll_back(world, applied).users_refreshed == 1
    assert world.see(ada)["credit_balance"] == 400


# --- dates ----------------------------------------------------------------------------------------------------------


def test_a_window_stays_closed_for_the_scan_and_the_function_and_another_plan(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    closed_until, _ = dates(world, ada)
    roll_back(world, run)
    assert dates(world, ada) == (closed_until, None)
    assert world.scan().users_selected == 0
    assert not call_function(world, "ada")["refreshed"]
    world.sql.execute("UPDATE users SET plan_code = 'pro' WHERE id = %s", (ada,))
    world.sql.execute("UPDATE users SET plan_code = 'free' WHERE id = %s", (ada,))
    assert dates(world, ada) == (closed_until, None)
    assert world.see(ada)["credit_balance"] == 400


def test_the_next_window_is_granted_in_full(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    spend(world, ada, 1_000)
    roll_back(world, run)
    world.restore("UPDATE users SET next_refresh_at = now() - interval '1 minute' WHERE id = %s", ada)
    refresh(world)
    assert world.see(ada)["credit_balance"] == 1_000


@pytest.mark.parametrize("due_in", ["10 days", None])
@pytest.mark.parametrize("keep_window", [False, True])
def test_what_a_forced_refresh_had_restarted_goes_back(world: World, due_in: str | None, keep_window: bool) -> None:  # noqa: FBT001
    ada = world.user(due_in=due_in)
    world.sql.execute("UPDATE users SET last_credit_refresh = '2026-01-01Z' WHERE id = %s", (ada,))
    before = dates(world, ada)
    run = refresh(world, force=True, keep_window=keep_window)
    assert dates(world, ada) != before
    roll_back(world, run)
    assert dates(world, ada) == before
    assert world.see(ada)["credit_balance"] == 400


def test_a_date_that_moved_on_since_stays_where_it_is(world: World) -> None:
    ada = world.user(due_in="10 days")
    run = refresh(world, force=True)
    world.sql.execute("UPDATE users SET next_refresh_at = now() + interval '90 days' WHERE id = %s", (ada,))
    moved, _ = dates(world, ada)
    roll_back(world, run, reopen=True)
    assert dates(world, ada) == (moved, None)


def test_a_date_goes_back_no_further_than_to_the_end_of_another_grant(world: World) -> None:
    ada = world.user()
    refresh(world)
    end, _ = dates(world, ada)
    world.restore("UPDATE users SET next_refresh_at = next_refresh_at - interval '5 days' WHERE id = %s", ada)
    forced = refresh(world, force=True)
    roll_back(world, forced)
    assert dates(world, ada)[0] == end


def test_a_later_refresh_of_the_host_keeps_its_last_credit_refresh(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    world.sql.execute("UPDATE users SET last_credit_refresh = '2027-01-01Z' WHERE id = %s", (ada,))
    roll_back(world, run)
    assert dates(world, ada)[1].year == 2027


# --- reopen ---------------------------------------------------------------------------------------------------------


def test_reopen_gives_the_window_back_and_the_regrant_is_the_target_less_the_shortfall(world: World) -> None:
    ada = world.user(credit_balance=0)
    before = dates(world, ada)
    run = refresh(world)
    window = grant(world, ada)["window_start"]
    spend(world, ada, 700)
    roll_back(world, run, reopen=True)
    assert dates(world, ada) == before
    assert (world.see(ada)["credit_balance"], world.see(ada)["refresh_shortfall"]) == (0, 700)
    refresh(world)
    again = grant(world, ada)
    assert (again["window_start"], again["target"], again["shortfall"]) == (window, 300, 700)
    assert (world.see(ada)["credit_balance"], world.see(ada)["refresh_shortfall"]) == (300, 0)
    check_ledger(world, {ada: -700})


@pytest.mark.parametrize("mode", ["fill", "add", "reset", "rollover"])
@pytest.mark.parametrize("policy", [False, True])
def test_round_and_round_again_gains_nobody_anything(world: World, mode: str, policy: bool) -> None:  # noqa: FBT001
    """All that was ever granted for the window and not taken back is at most the amount."""
    world.sql.execute("UPDATE plans SET grant_mode = %s, rollover_cap = 300 WHERE code = 'free'", (mode,))
    ada = world.user(credit_balance=0)
    run = refresh(world)
    for spent in (700, 200, 0, 1_000):
        spend(world, ada, min(spent, world.see(ada)["credit_balance"]))
        roll_back(world, run, reopen=True, allow_negative=policy)
        run = refresh(world)
        net = "SELECT sum(credits_added) FROM credit_refresh_histories WHERE user_id = %s"
        assert world.value(net, ada) == 1_000
    assert world.see(ada)["credit_balance"] == 0


def test_a_forced_refresh_that_made_up_for_a_shortfall_gives_that_back_too(world: World) -> None:
    ada = world.user(credit_balance=0)
    run = refresh(world)
    spend(world, ada, 700)
    roll_back(world, run, reopen=True)
    world.restore("UPDATE users SET next_refresh_at = now() + interval '1 hour' WHERE id = %s", ada)
    forced = refresh(world, force=True)
    assert (world.see(ada)["credit_balance"], world.see(ada)["refresh_shortfall"]) == (300, 0)
    roll_back(world, forced)
    assert (world.see(ada)["credit_balance"], world.see(ada)["refresh_shortfall"]) == (0, 700)
    assert last(world, ada)["shortfall"] == 0


@pytest.mark.parametrize("due_in", ["-1 hour", "1 hour", None])
def test_so_does_one_under_an_external_plan_whatever_date_it_left(world: World, due_in: str | None) -> None:
    ada = world.user(credit_balance=0, due_in=due_in)
    world.sql.execute("UPDATE plans SET cadence = 'external' WHERE code = 'free'")
    world.sql.execute("UPDATE users SET refresh_shortfall = 300 WHERE id = %s", (ada,))
    before = dates(world, ada)
    forced = refresh(world, force=True)
    assert (world.see(ada)["credit_balance"], world.see(ada)["refresh_shortfall"]) == (700, 0)
    roll_back(world, forced)
    assert (world.see(ada)["credit_balance"], world.see(ada)["refresh_shortfall"]) == (0, 300)
    assert dates(world, ada) == before


def test_a_reopened_user_under_hold_is_noted_again_and_refreshed_after_it(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true WHERE id = %s", (ada,))
    roll_back(world, run, reopen=True)
    refresh(world)
    assert last(world, ada)["status"] == "held"
    world.sql.execute("UPDATE users SET credit_refresh_hold = false WHERE id = %s", (ada,))
    refresh(world)
    assert world.see(ada)["credit_balance"] == 1_000
