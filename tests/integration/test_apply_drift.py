"""Whom an apply leaves alone: users for whom the rule decides otherwise by now, and those of rows tampered with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from psycopg.types.json import Jsonb

from refresh.apply import TAMPERED, count_tampered
from refresh.errors import RefusedError
from tests.integration.applying import applied, begin, drain, opened, plan, tamper
from tests.integration.ledger import behind_the_triggers, check_ledger

if TYPE_CHECKING:
    from refresh.totals import Progress
    from tests.integration.world import World

MONTHLY = "UPDATE plans SET cadence = 'monthly', day_of_month = 1, time_of_day = '00:00' WHERE code = 'free'"
DRIFTS: dict[str, tuple[str, list[str], str]] = {
    "hold": ("UPDATE users SET credit_refresh_hold = true", ["verdict"], "held"),
    "inactive": ("UPDATE users SET active = false", ["verdict"], "inactive"),
    "date": ("UPDATE users SET next_refresh_at = now() + interval '1 day'", ["verdict"], "not_due"),
    "no date": ("UPDATE users SET next_refresh_at = NULL", ["verdict"], "unscheduled"),
    "function": ("SELECT refresh_user(id, 'function', 'host') FROM users", ["verdict"], "not_due"),
    "external": ("UPDATE plans SET cadence = 'external'", ["verdict"], "external"),
    "retired": ("UPDATE plans SET active = false", ["verdict"], "no_plan"),
    "overflow": (
        "UPDATE users SET credit_balance = -9223372036854775807 - 1",
        ["verdict"],
        "overflow",
    ),
    "no plan": ("UPDATE users SET plan_code = NULL", ["verdict", "plan", "mode", "target"], "no_plan"),
    "plan": ("UPDATE users SET plan_code = 'pro'", ["plan", "target"], "due"),
    "custom amount": ("UPDATE users SET custom_credit_amount = 999", ["target"], "due"),
    "amount": ("UPDATE plans SET amount = 1001", ["target"], "due"),
    "shortfall": ("UPDATE users SET refresh_shortfall = 10", ["target"], "due"),
    "mode": ("UPDATE plans SET grant_mode = 'add'", ["mode"], "due"),
    "day": ("UPDATE users SET credit_refresh_day = 15", ["window"], "due"),
    "earlier": ("UPDATE users SET next_refresh_at = next_refresh_at - interval '1 second'", ["window"], "due"),
    "interval": ("UPDATE plans SET interval_days = 31", ["window"], "due"),
}


def is_drift(world: World, user_id: int, run: Progress, drifted: list[str], verdict: str) -> None:
    """One user, left alone with a row and a reason."""
    assert (run.status, run.users_refreshed, run.users_skipped, run.users_failed) == ("succeeded", 0, 1, 0)
    (planned,) = world.rows("SELECT * FROM credit_refresh_histories WHERE status = 'planned'")
    (skipped,) = world.rows("SELECT * FROM credit_refresh_histories WHERE run_id = %s", run.run_id)
    same = ("user_id", "window_start", "window_end", "plan_code", "grant_mode", "target")
    assert [skipped[name] for name in same] == [planned[name] for name in same]
    assert (skipped["status"], skipped["reason"], skipped["credits_added"]) == ("skipped", "drifted", 0)
    (audit,) = world.rows("SELECT * FROM credit_audit_logs WHERE run_id = %s AND action = 'skipped'", run.run_id)
    assert (audit["user_id"], audit["credits"], audit["occurred_at"]) == (user_id, 0, skipped["created_at"])
    assert audit["detail"] == {"reason": "approved", "drifted": drifted, "verdict": verdict}


@pytest.mark.parametrize("drift", DRIFTS)
def test_who_would_not_get_what_was_planned_is_left_alone(world: World, drift: str) -> None:
    change, drifted, verdict = DRIFTS[drift]
    ada = world.user(due_in="-95 days")
    dry = plan(world)
    world.sql.execute(change)
    before = world.see(ada)
    is_drift(world, ada, applied(world, dry), drifted, verdict)
    assert world.see(ada) == before


def test_another_zone_is_another_window(world: World) -> None:
    world.sql.execute(MONTHLY)
    ada = world.user(due_in="-95 days")
    dry = plan(world)
    world.sql.execute("UPDATE users SET timezone = 'Pacific/Kiritimati'")
    is_drift(world, ada, applied(world, dry), ["window"], "due")


def test_a_window_with_another_end(world: World) -> None:
    ada = world.user()
    dry = plan(world)
    world.sql.execute("UPDATE plans SET interval_days = 31")
    is_drift(world, ada, applied(world, dry), ["window"], "due")


def test_a_window_with_another_start(world: World) -> None:
    """The date put off to after the boundary that the window began at, and before now: it ends as planned."""
    world.sql.execute(
        "UPDATE plans SET cadence = 'daily', time_of_day = ((now() AT TIME ZONE 'UTC') - interval '3 hours')::time"
    )
    ada = world.user(due_in="-95 days")
    dry = plan(world)
    world.sql.execute("UPDATE users SET next_refresh_at = now() - interval '1 hour'")
    is_drift(world, ada, applied(world, dry), ["window"], "due")


def test_a_window_that_has_ended(world: World) -> None:
    """The same window again, for the run's instant is that of the dry run; but its time is over."""
    ada = world.user(due_in="-45 days")
    dry = plan(world, as_of=world.value("SELECT now() - interval '40 days'"))
    is_drift(world, ada, applied(world, dry), ["ended"], "due")
    assert world.refresh().users_refreshed == 1


def test_as_of_an_instant_of_the_past_while_the_window_lasts(world: World) -> None:
    ada = world.user(due_in="-5 days")
    run = applied(world, plan(world, as_of=world.value("SELECT now() - interval '4 days'")))
    assert run.users_refreshed == 1
    assert world.see(ada)["credit_balance"] == 1_000


def test_a_scan_that_came_in_between(world: World) -> None:
    ada = world.user()
    dry = plan(world)
    assert world.refresh().users_refreshed == 1
    is_drift(world, ada, applied(world, dry), ["verdict"], "not_due")
    check_ledger(world)


def test_a_scan_that_has_the_users_in_a_batch_still(world: World) -> None:
    world.users(30)
    dry = plan(world)
    scan = world.scan()
    run = applied(world, dry)
    assert run.users_refreshed == 30
    world.work(world.claim(scan))
    assert (world.progress(scan).users_refreshed, world.progress(scan).users_skipped) == (0, 30)
    check_ledger(world)


@pytest.mark.parametrize("keep_window", [False, True])
@pytest.mark.parametrize("cadence", ["rolling", "monthly", "external"])
def test_a_forced_user_whom_another_run_has_refreshed_since(world: World, cadence: str, *, keep_window: bool) -> None:
    """A forced grant's window begins when its run did: the key does not know that it is the same refresh again."""
    world.sql.execute("UPDATE plans SET cadence = %s, day_of_month = 1 WHERE code = 'free'", (cadence,))
    ada = world.user(due_in=None if cadence == "external" else "3 days")
    forced: dict[str, Any] = {"force": True, "keep_window": keep_window}
    dry = plan(world, **forced)
    assert world.refresh(**forced).users_refreshed == 1
    before = world.see(ada)
    run = applied(world, dry)
    assert (run.users_refreshed, run.users_skipped) == (0, 1)
    assert world.see(ada) == before
    (audit,) = world.rows("SELECT detail FROM credit_audit_logs WHERE action = 'skipped'")
    assert "refreshed" in audit["detail"]["drifted"]


def test_a_forced_dry_run_is_applied_to_the_window_that_it_saw(world: World) -> None:
    ada = world.user(due_in="3 days")
    dry = plan(world, force=True, amount=700)
    run = applied(world, dry)
    granted, as_of = world.history(ada)[-1], world.value("SELECT as_of FROM credit_refresh_runs WHERE id = %s", dry)
    assert (run.users_refreshed, granted["window_start"], granted["target"]) == (1, as_of, 700)
    assert world.see(ada)["next_refresh_at"] == granted["window_end"]
    world.sql.execute("UPDATE plans SET amount = 5")
    assert world.see(ada)["credit_balance"] == 700


def test_a_grant_that_was_taken_back_since_is_no_drift(world: World) -> None:
    ada = world.user(due_in="3 days", plan_code="pro")
    forced: dict[str, Any] = {"force": True, "keep_window": True}
    dry, other = plan(world, **forced), world.refresh(**forced)
    taken = world.refresh(dry_run=True).run_id
    world.sql.execute(
        "UPDATE credit_refresh_histories SET reversed_by_run_id = %s WHERE run_id = %s", (taken, other.run_id)
    )
    world.sql.execute("UPDATE users SET credit_balance = 400")
    assert applied(world, dry).users_refreshed == 1
    assert world.see(ada)["credit_balance"] == 20_000


def test_a_grant_that_the_dry_run_knew_of_is_no_drift(world: World) -> None:
    """Forced as of an instant before another forced grant: a run of that kind would grant it, and so does its apply."""
    world.user(due_in="3 days", plan_code="pro")
    before = world.value("SELECT now() - interval '1 minute'")
    world.refresh(force=True, keep_window=True)
    assert applied(world, plan(world, force=True, keep_window=True, as_of=before)).users_refreshed == 1


def test_an_amount_of_the_run_s_own_does_not_drift_with_the_plan_s(world: World) -> None:
    ada = world.user()
    dry = plan(world, force=True, amount=700)
    world.sql.execute("UPDATE plans SET amount = 5")
    assert applied(world, dry).users_refreshed == 1
    assert world.see(ada)["credit_balance"] == 700


def test_what_the_key_refuses_has_drifted_and_moves_on(world: World) -> None:
    """The users table was restored: the user is due again for the window that the ledger says is granted."""
    ada = world.user()
    dry, due = plan(world), world.see(ada)["next_refresh_at"]
    world.refresh()
    moved_to = world.see(ada)["next_refresh_at"]
    with behind_the_triggers(world):
        world.sql.execute("UPDATE users SET credit_balance = 400, next_refresh_at = %s", (due,))
    run = applied(world, dry)
    is_drift(world, ada, run, ["refreshed"], "due")
    user = world.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"]) == (400, moved_to)
    actions = world.rows("SELECT action FROM credit_audit_logs WHERE run_id = %s ORDER BY action", run.run_id)
    assert [row["action"] for row in actions] == ["already_granted", "skipped"]


DIGESTED = {
    "window": "window_start = window_start - interval '1 hour'",
    "end": "window_end = window_end + interval '1 day'",
    "no end": "window_end = NULL",
    "plan": "plan_code = 'pro'",
    "mode": "grant_mode = 'add'",
    "target": "target = 1000000",
    "no target": "target = NULL",
    "digest": "digest = sha256('')",
    "no digest": "digest = NULL",
}
WHOSE = " WHERE status = 'planned' AND user_id = %s"


def is_tampered(world: World, run: Progress, user_id: int, *, refreshed: int) -> None:
    """One user failed, with a row and a reason; the others were refreshed."""
    status = "partial" if refreshed else "failed"
    assert (run.status, run.users_refreshed, run.users_failed) == (status, refreshed, 1)
    (failed,) = world.rows("SELECT * FROM credit_refresh_histories WHERE status = 'failed'")
    assert (failed["user_id"], failed["run_id"], failed["error"]) == (user_id, run.run_id, TAMPERED)
    assert failed["credits_added"] == 0
    (audit,) = world.rows("SELECT * FROM credit_audit_logs WHERE action = 'refresh_failed'")
    assert (audit["user_id"], audit["credits"], audit["occurred_at"]) == (user_id, 0, failed["created_at"])
    with world.database.statements() as connection:
        assert count_tampered(connection, run.run_id) == 1
    assert world.see(user_id)["credit_balance"] == 400


@pytest.mark.parametrize("what", DIGESTED)
def test_a_row_tampered_with_is_refused_by_its_digest(world: World, what: str) -> None:
    ada, bob = world.user("ada"), world.user("bob")
    dry = plan(world)
    tamper(world, DIGESTED[what] + WHOSE, ada)
    is_tampered(world, applied(world, dry), ada, refreshed=1)
    assert world.see(bob)["credit_balance"] == 1_000


def test_a_row_made_over_to_another_user(world: World) -> None:
    ada, held, late = world.user("ada"), world.user("held", credit_refresh_hold=True), world.user("late", due_in="1 h")
    dry, other, third = plan(world), plan(world), plan(world)
    theirs = "user_id = %s WHERE status = 'planned' AND run_id = %s"
    tamper(world, theirs, late, other)  # who was not in the dry run
    with pytest.raises(RefusedError, match="rows of 0 of them are left"):
        begin(world, other)
    tamper(world, theirs, held, dry)  # who was, and got no row
    world.sql.execute("UPDATE users SET credit_refresh_hold = false")
    is_tampered(world, applied(world, dry), held, refreshed=0)
    assert world.see(ada)["credit_balance"] == 400
    assert applied(world, third).users_refreshed == 1


def test_a_row_made_over_to_a_user_who_has_one(world: World) -> None:
    ada, bob = world.user("ada"), world.user("bob")
    dry = plan(world)
    tamper(world, "user_id = %s" + WHOSE, bob, ada)
    with pytest.raises(RefusedError, match=r"2 users were planned by run .* and rows of 1 of them are left"):
        begin(world, dry)


def test_other_columns_of_a_planned_row_mean_nothing(world: World) -> None:
    ada = world.user()
    dry = plan(world)
    change = "credits_added = 5000, new_balance = old_balance + 5000, previous_next_refresh_at = NULL, shortfall = 9"
    tamper(world, change + WHOSE, ada)
    run = applied(world, dry)
    assert (run.status, run.users_refreshed, run.credits_granted) == ("succeeded", 1, 600)
    assert world.see(ada)["credit_balance"] == 1_000


def test_rows_deleted_or_added_after_the_opening(world: World) -> None:
    ada, bob = world.user("ada"), world.user("bob")
    dry, other = plan(world), plan(world)
    run = opened(world, dry)
    world.sql.execute("DELETE FROM credit_refresh_histories WHERE user_id = %s AND run_id = %s", (ada, dry))
    is_tampered(world, drain(world, run), ada, refreshed=1)
    world.sql.execute("DELETE FROM credit_refresh_histories WHERE status = 'failed'")
    world.sql.execute("UPDATE users SET credit_balance = 0")
    second = opened(world, other)
    theirs = "SELECT to_jsonb(h) AS h FROM credit_refresh_histories AS h WHERE user_id = %s AND run_id = %s"
    row = world.row(theirs, bob, other)
    copy = {**row["h"], "target": 9_000_000}
    world.sql.execute(
        """
        INSERT INTO credit_refresh_histories OVERRIDING SYSTEM VALUE
        SELECT * FROM jsonb_populate_record(NULL::credit_refresh_histories, %s || jsonb_build_object('id', 1000000))
        """,
        (Jsonb(copy),),
    )
    done = drain(world, second)
    assert (done.users_failed, done.users_refreshed) == (1, 1)
    assert world.see(bob)["credit_balance"] == 0


def test_of_all_or_none_a_row_tampered_with_is_everybody_s(world: World) -> None:
    ada = world.user("ada")
    world.user("bob")
    dry = plan(world, atomic=True)
    tamper(world, "target = 5000" + WHOSE, ada)
    done = applied(world, dry)
    assert (done.status, done.users_refreshed, done.users_failed) == ("failed", 0, 2)
    assert world.value("SELECT max(credit_balance) FROM users") == 400


def test_of_all_or_none_who_has_drifted_is_left_alone_and_the_others_are_not(world: World) -> None:
    ada = world.user("ada")
    world.user("bob")
    dry = plan(world, atomic=True)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true WHERE id = %s", (ada,))
    run = applied(world, dry)
    assert (run.status, run.users_refreshed, run.users_skipped) == ("succeeded", 1, 1)


def test_a_user_whom_the_database_refuses_does_not_cost_the_others_theirs(world: World) -> None:
    world.users(20)
    dry = plan(world)
    world.sql.execute("ALTER TABLE users ADD CHECK (external_id <> 'user-7' OR credit_balance < 1000)")
    run = applied(world, dry)
    assert (run.status, run.users_refreshed, run.users_failed, run.users_skipped) == ("partial", 19, 1, 0)
    with world.database.statements() as connection:
        assert count_tampered(connection, run.run_id) == 0
    check_ledger(world)
