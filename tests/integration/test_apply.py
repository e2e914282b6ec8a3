"""Dry run → apply: what can be applied, by whom and how often, and that it is what a scan would have done."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from refresh import runs
from refresh.errors import RefusedError
from tests.integration.applying import applied, begin, drain, opened, plan
from tests.integration.ledger import check_ledger
from tests.integration.population import PLANS, add_plans, add_users

if TYPE_CHECKING:
    from uuid import UUID

    from tests.integration.world import World

PEOPLE: list[dict[str, Any]] = [
    {
        "plan": plan_code,
        "balance": balance,
        "due": due,
        "hold": hold,
        "hold_for": "-10 minutes" if hold else None,
        "custom": custom,
        "day": day,
        "zone": zone,
        "active": True,
        "shortfall": shortfall,
    }
    for plan_code in PLANS
    for balance, due, hold, custom, day, zone, shortfall in [
        (400, "-10 minutes", False, None, None, None, 0),
        (5_000, "-100 days", True, 7_777, 31, "Asia/Kathmandu", 150),
        (-20, "3 days", False, None, 15, "America/New_York", 0),
        (0, None, False, 1, None, None, 0),
    ]
]
WRITTEN = """
SELECT
    substr(u.external_id, 3) AS who, u.credit_balance, u.next_refresh_at, u.credit_refresh_hold, u.held_window,
    u.last_credit_refresh IS NOT NULL AS refreshed, h.status, h.window_start, h.window_end, h.first_missed_at,
    h.windows_passed, h.plan_code, h.grant_mode, h.target, h.old_balance, h.credits_added, h.new_balance,
    h.previous_next_refresh_at, h.previous_last_refresh, h.shortfall, a.action, a.balance_before, a.balance_after,
    a.credits
FROM users AS u
LEFT JOIN credit_refresh_histories AS h ON h.user_id = u.id AND h.status <> 'planned'
LEFT JOIN credit_audit_logs AS a ON a.user_id = u.id AND a.action = h.status
WHERE u.external_id LIKE %s
ORDER BY u.id, h.id
"""


def refuses(world: World, run_id: UUID, says: str) -> None:
    before = world.value("SELECT count(*) FROM credit_refresh_runs")
    with pytest.raises(RefusedError, match=says):
        begin(world, run_id)
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == before


@pytest.mark.parametrize(
    "asked",
    [{}, {"force": True}, {"force": True, "keep_window": True}, {"force": True, "amount": 50}, {"atomic": True}],
    ids=lambda asked: " ".join(asked) or "scan",
)
def test_a_dry_run_that_is_applied_at_once_writes_what_the_run_would_have(world: World, asked: dict[str, Any]) -> None:
    add_plans(world)
    at = world.value("SELECT now()")
    as_of = world.value("SELECT now() - interval '1 minute'") if "force" in asked else None
    add_users(world, "a", PEOPLE, at)
    users = world.rows("SELECT * FROM users ORDER BY id")
    dry = plan(world, as_of=as_of, **asked)
    assert world.rows("SELECT * FROM users ORDER BY id") == users
    planned = world.progress(opened(world, dry))  # opened, and not done: the scan of the others leaves these alone
    assert planned.users_selected > 20
    add_users(world, "b", PEOPLE, at)
    straight = world.refresh(as_of=as_of, **asked)
    run_id = world.value("SELECT id FROM credit_refresh_runs WHERE kind = 'apply'")
    world.work(world.claim())
    done = world.row("SELECT * FROM credit_refresh_runs WHERE id = %s", run_id)
    assert (done["status"], done["users_skipped"], done["users_failed"]) == ("succeeded", 0, 0)
    assert (done["users_refreshed"], done["credits_granted"]) == (straight.users_refreshed, straight.credits_granted)
    assert world.rows(WRITTEN, "a-%") == world.rows(WRITTEN, "b-%")
    check_ledger(world)


def test_the_run_and_its_rows_say_who_applied_what_and_why(world: World) -> None:
    ada = world.user()
    dry = plan(world)
    (planned,) = world.history(ada)
    run = applied(world, dry)
    row = world.row("SELECT * FROM credit_refresh_runs WHERE id = %s", run.run_id)
    assert (row["kind"], row["work"], row["parent_run_id"], row["subject_run_id"]) == ("apply", "apply", dry, dry)
    assert (row["requested_by"], row["reason"], row["as_of"]) == ("kim", "approved", None)
    (_, granted) = world.history(ada)
    assert (granted["run_id"], granted["status"], granted["dry_run"]) == (run.run_id, "refreshed", False)
    same = ("window_start", "window_end", "plan_code", "grant_mode", "target", "credits_added")
    assert [granted[name] for name in same] == [planned[name] for name in same]
    (audit,) = world.audit(ada)
    assert (audit["action"], audit["actor"], audit["run_id"]) == ("refreshed", "kim", run.run_id)
    assert audit["detail"] == {"reason": "approved"}


def test_what_the_user_spent_since_is_no_drift(world: World) -> None:
    ada, bob = world.user("ada"), world.user("bob", credit_balance=900)
    dry = plan(world)
    world.sql.execute("UPDATE users SET credit_balance = credit_balance - 150 WHERE id = %s", (ada,))
    world.sql.execute("UPDATE users SET credit_balance = credit_balance + 5000 WHERE id = %s", (bob,))
    run = applied(world, dry)
    assert (run.users_refreshed, run.users_skipped, run.credits_granted) == (2, 0, 750)
    assert [world.see(id_)["credit_balance"] for id_ in (ada, bob)] == [1_000, 5_900]
    assert world.value("SELECT credits_granted FROM credit_refresh_runs WHERE id = %s", dry) == 700


def test_nobody_is_touched_who_was_not_in_the_dry_run(world: World) -> None:
    world.user()
    dry = plan(world)
    late = world.user("late")
    before = world.see(late)
    assert applied(world, dry).users_selected == 1
    assert world.see(late) == before
    assert world.history(late) == []


def test_a_user_deleted_since_is_skipped(world: World) -> None:
    world.users(3)
    dry = plan(world)
    world.sql.execute("DELETE FROM users WHERE external_id = 'user-2'")
    run = applied(world, dry)
    assert (run.status, run.users_refreshed, run.users_skipped) == ("succeeded", 2, 1)


def test_a_dry_run_is_applied_once(world: World) -> None:
    world.user()
    dry = plan(world)
    first = opened(world, dry)
    refuses(world, dry, rf"was applied already, by run {first.run_id} \(running\)")
    drain(world, first)
    refuses(world, dry, rf"was applied already, by run {first.run_id} \(succeeded\)")


def test_of_two_operators_at_once_one_applies_it(world: World) -> None:
    world.users(250)
    dry = plan(world)

    def press() -> runs.Opened | str:
        try:
            return opened(world, dry)
        except RefusedError as error:
            return str(error)

    with world.calls(press, press) as operators:
        operators.start()
        answers = operators.results()
    (run,) = (answer for answer in answers if isinstance(answer, runs.Opened))
    (line,) = (answer for answer in answers if isinstance(answer, str))
    assert line == f"run {dry} was applied already, by run {run.run_id} (running)"
    assert drain(world, run).users_refreshed == 250
    check_ledger(world)


def test_a_repeated_request_with_its_key_finds_its_run(world: World) -> None:
    world.user()
    dry, other = plan(world), plan(world)
    run = opened(world, dry, idempotency_key="k")
    again = opened(world, dry, idempotency_key="k")
    assert (again.run_id, again.existing) == (run.run_id, True)
    with pytest.raises(RefusedError, match="belongs to run"):
        begin(world, other, idempotency_key="k")
    refuses(world, dry, "was applied already")


def test_an_unknown_run_and_one_that_is_no_dry_run(world: World) -> None:
    world.user()
    refuses(world, uuid4(), "there is no run")
    refuses(world, world.refresh().run_id, "is no dry run")


def test_a_dry_run_of_something_else(world: World) -> None:
    world.user()
    dry = plan(world)
    world.sql.execute("UPDATE credit_refresh_runs SET kind = 'rollback', work = 'rollback', subject_run_id = id")
    refuses(world, dry, "is the dry run of a rollback")


@pytest.mark.parametrize(("status", "says"), [("cancelled", "was cancelled: make a new"), ("failed", "failed: make")])
def test_a_dry_run_that_has_not_ended_well(world: World, status: str, says: str) -> None:
    world.user()
    run = world.scan(dry_run=True)
    refuses(world, run.run_id, "is still running")
    world.sql.execute("UPDATE credit_refresh_runs SET status = %s, finished_at = now()", (status,))
    refuses(world, run.run_id, says)


def test_a_dry_run_that_planned_nothing_or_ahead(world: World) -> None:
    world.user(due_in="1 hour")
    refuses(world, plan(world), "planned nothing")
    ahead = plan(world, as_of=world.value("SELECT now() + interval '2 hours'"))
    refuses(world, ahead, "which has not come: apply it after that")


def test_rows_that_were_deleted_or_added(world: World) -> None:
    world.users(3)
    dry, other = plan(world), plan(world)
    gone = "DELETE FROM credit_refresh_histories WHERE run_id = %s AND user_id = (SELECT min(id) FROM users)"
    world.sql.execute(gone, (dry,))
    refuses(world, dry, "3 users were planned by run .* and rows of 2 of them are left: make a new dry run")
    world.sql.execute("UPDATE credit_refresh_histories SET run_id = %s", (other,))
    refuses(world, other, "3 users were planned by run .* and rows of 5")


def test_while_paused_or_all_dry_nothing_is_opened(world: World) -> None:
    world.user()
    dry = plan(world)
    world.sql.execute("UPDATE settings SET enabled = false")
    assert begin(world, dry) == runs.NotOpened("paused")
    world.sql.execute("UPDATE settings SET enabled = true, dry_run = true")
    refuses(world, dry, "every run is a dry one at present")


def test_a_pause_stops_what_is_left_and_resume_goes_on(world: World) -> None:
    world.user()
    run = opened(world, plan(world))
    ids = world.claim(run)
    world.sql.execute("UPDATE settings SET enabled = false")
    assert world.work(ids) == []
    world.sql.execute("UPDATE settings SET enabled = true")
    (done,) = world.work(ids)
    assert done.users_refreshed == 1
    assert world.work(ids) == []


def test_beats_dry_runs_can_be_applied_each_with_its_own_rows(world: World) -> None:
    ada = world.user("ada")

    def hour() -> runs.Opened:
        run = world.scheduled(dry_run=True)
        assert isinstance(run, runs.Opened)
        world.work(world.claim(run))
        world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 hour'")
        return run

    first, empty = hour(), hour()
    bob = world.user("bob")
    last = hour()
    refuses(world, empty.run_id, "planned nothing")
    run = applied(world, last.run_id)
    assert (run.users_selected, run.users_refreshed) == (1, 1)
    assert [world.see(id_)["credit_balance"] for id_ in (ada, bob)] == [400, 1_000]
    assert applied(world, first.run_id).users_refreshed == 1


def test_a_dry_run_that_is_partial_for_an_overflow_is_applied_to_the_others(world: World) -> None:
    world.user("ada")
    world.user("over", credit_balance=-(2**63))
    dry = plan(world)
    assert world.value("SELECT status FROM credit_refresh_runs") == "partial"
    run = applied(world, dry)
    assert (run.status, run.users_selected, run.users_refreshed) == ("succeeded", 1, 1)


def test_users_whom_the_host_has_locked_are_put_off(world: World) -> None:
    ada, bob, _cyd = world.user("ada"), world.user("bob"), world.user("cyd")
    run = opened(world, plan(world))
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = credit_balance - 30 WHERE id = %s", (bob,))
        (done,) = world.work(world.claim(run))
        assert (done.users_refreshed, done.users_deferred) == (2, 1)
        host.commit()
    end = drain(world, run)
    assert (end.status, end.users_refreshed, end.credits_granted) == ("succeeded", 3, 1_830)
    assert [world.see(id_)["credit_balance"] for id_ in (ada, bob)] == [1_000, 1_000]


def test_a_batch_of_one_waits_its_turn_and_decides_on_what_it_then_finds(world: World) -> None:
    """The host refreshes the user in the meantime: rows read before the lock would grant the window twice."""
    ada = world.user()
    ids = world.claim(opened(world, plan(world)))
    with world.host() as host, world.background(ids) as worker:
        host.execute("SELECT refresh_user(%s, 'function', 'host')", (ada,))
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the batch waits for the host's lock")
        host.commit()
        (done,) = worker.result()
    assert (done.users_refreshed, done.users_skipped) == (0, 1)
    assert world.see(ada)["credit_balance"] == 1_000
    check_ledger(world)


def test_a_scan_and_an_apply_of_the_same_users_at_once_grant_each_of_them_once(world: World) -> None:
    world.users(300)
    dry = plan(world)
    scan = world.scan(batch_size=20)
    run = opened(world, dry, batch_size=30)
    with world.calls(*[partial(world.work, world.claim(each)) for each in (scan, run)]) as workers:
        workers.start()
        workers.results()
    one, other = drain(world, scan), drain(world, run)
    assert one.users_refreshed + other.users_refreshed == 300
    assert one.users_skipped + other.users_skipped == 300
    assert world.value("SELECT count(*) FROM users WHERE credit_balance <> 1000") == 0
    check_ledger(world)


def test_a_worker_that_dies_in_the_middle_has_changed_nothing(world: World) -> None:
    world.users(20)
    before = world.rows("SELECT * FROM users ORDER BY id")
    ids = world.claim(opened(world, plan(world)))
    world.sql.execute(
        """
        CREATE FUNCTION host_trigger() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock_shared(77); RETURN new; END $$
        """
    )
    world.sql.execute("CREATE TRIGGER host_trigger BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION host_trigger()")
    with world.host() as gate, world.background(ids) as worker:
        gate.execute("SELECT pg_advisory_xact_lock(77)")
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the batch is in its middle")
        world.sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'advisory'")
        with pytest.raises(psycopg.OperationalError):
            worker.result()
    assert world.rows("SELECT * FROM users ORDER BY id") == before
    (done,) = world.work(ids)
    assert done.users_refreshed == 20
    check_ledger(world)


def test_all_or_none_stays_all_or_none(world: World) -> None:
    world.users(5)
    run = opened(world, plan(world, atomic=True), batch_size=2)
    assert run.batches_total == 1
    ids = world.claim(run)
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = 0 WHERE external_id = 'user-3'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            world.work(ids)
    assert world.value("SELECT count(*) FROM credit_refresh_histories WHERE status = 'refreshed'") == 0
    (done,) = world.work(ids)
    assert done.users_refreshed == 5


def test_a_plan_that_is_atomic_stays_in_one_batch(world: World) -> None:
    world.users(5)
    world.sql.execute("UPDATE plans SET atomic = true WHERE code = 'free'")
    world.user("pro", plan_code="pro")
    run = opened(world, plan(world), batch_size=2)
    rows = world.rows(
        "SELECT atomic, cardinality(user_ids) AS n FROM credit_refresh_batches WHERE run_id = %s", run.run_id
    )
    assert sorted((row["atomic"], row["n"]) for row in rows) == [(False, 1), (True, 5)]
