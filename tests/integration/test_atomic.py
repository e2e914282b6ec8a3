"""All or none: one user who cannot be refreshed, and nobody is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from refresh import delivery, runs
from refresh.errors import RefusedError
from refresh.work import do_batch, pending_batches
from tests.integration.test_isolation import DEFERRED, TRIGGER, poison

if TYPE_CHECKING:
    from tests.integration.world import World

HUGE = 2**63 - 1
SPEND = "UPDATE users SET credit_balance = credit_balance - %s WHERE id = %s"
ALL_OR_NONE = (
    "one of its users failed (credits that do not fit 64 bits, or in an apply a planned row that was changed): "
    "it is all users or none, so nobody was changed"
)


# A batch asks settings once, after its snapshot and before it locks a user: there it waits for us.
GATE = """
ALTER TABLE settings RENAME TO stored_settings;
CREATE VIEW settings AS SELECT * FROM stored_settings WHERE pg_advisory_xact_lock_shared(7) IS NOT NULL
"""


def untouched(world: World) -> None:
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == 0
    assert world.value("SELECT count(*) FROM credit_audit_logs") == 0
    assert world.value("SELECT count(*) FROM users WHERE last_credit_refresh IS NOT NULL") == 0


def test_all_users_are_refreshed_in_one_transaction_however_small_batches_are(world: World) -> None:
    world.users(250)
    run = world.scan(atomic=True, batch_size=10)
    assert (run.users_selected, run.batches_total) == (250, 1)
    world.work(world.claim(run))
    done = world.progress(run)
    assert (done.status, done.users_refreshed) == ("succeeded", 250)
    assert world.value("SELECT count(DISTINCT xmin::text) FROM users") == 1


@pytest.mark.parametrize("trigger", [TRIGGER, DEFERRED], ids=["trigger", "deferred constraint trigger"])
def test_one_whom_the_database_refuses_fails_all_at_once_and_for_good(world: World, trigger: str) -> None:
    world.users(50)
    poison(world, "user-37", trigger=trigger)
    run = world.scan(atomic=True)
    (outcome,) = world.work(world.claim(run))
    done = world.progress(run)
    assert (outcome.users_refreshed, outcome.users_failed) == (0, 50)
    assert (done.status, done.users_failed, done.users_done) == ("failed", 50, 50)
    assert done.error == "no credits for user-37 (SQLSTATE P0001)"
    batch = world.row("SELECT status, attempts, next_attempt_at FROM credit_refresh_batches")
    assert batch == {"status": "failed", "attempts": 1, "next_attempt_at": None}
    untouched(world)
    assert world.claim(ring_again=True) == []
    assert world.scan().users_selected == 50


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_balance_that_does_not_fit_fails_all_in_dry_runs_too(world: World, *, dry_run: bool) -> None:
    world.users(50)
    world.sql.execute("UPDATE plans SET grant_mode = 'add'")
    world.user("rich", credit_balance=HUGE)
    run = world.scan(atomic=True, dry_run=dry_run)
    world.work(world.claim(run))
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_failed) == ("failed", 0, 51)
    assert done.error == ALL_OR_NONE
    untouched(world)


def test_held_and_inactive_users_are_no_failure(world: World) -> None:
    world.users(3)
    held, gone = world.user("held", credit_refresh_hold=True), world.user("gone")
    run = world.scan(atomic=True)
    world.sql.execute("UPDATE users SET active = false WHERE id = %s", (gone,))
    world.work(world.claim(run))
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_held, done.users_skipped) == ("succeeded", 3, 1, 1)
    assert [row["status"] for row in world.history(held)] == ["held"]


def test_one_who_is_deleted_between_the_snapshot_and_the_lock_is_no_failure(world: World) -> None:
    world.users(50)
    run = world.scan(atomic=True)
    ids = world.claim(run)
    world.sql.execute(GATE)
    with world.host() as host, world.background(ids) as worker:
        host.execute("SELECT pg_advisory_xact_lock(7)")
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the batch has its snapshot")
        world.sql.execute("DELETE FROM users WHERE external_id = 'user-9'")
        host.commit()
        (outcome,) = worker.result()
    assert (outcome.users_refreshed, outcome.users_skipped, outcome.users_deferred) == (49, 1, 0)
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_skipped) == ("succeeded", 49, 1)
    assert world.value("SELECT count(*) FROM users WHERE credit_balance <> 1000") == 0


def test_where_one_is_locked_all_wait_for_the_next_attempt_and_hold_nobody_up(world: World) -> None:
    world.users(50)
    busy = world.value("SELECT id FROM users WHERE external_id = 'user-9'")
    run = world.scan(atomic=True)
    (batch_id,) = world.claim(run)
    with world.host() as host, world.database.statements() as connection:
        host.execute(SPEND, (1, busy))
        (pending,) = pending_batches(connection, [batch_id])
        with pytest.raises(psycopg.errors.LockNotAvailable):
            do_batch(connection, pending)
        assert delivery.record_failure(connection, batch_id, "locked") == 1
        untouched(world)
        host.commit()
    world.sql.execute("UPDATE credit_refresh_batches SET next_attempt_at = now()")
    world.work(world.claim())
    done = world.progress(run)
    assert (done.status, done.users_refreshed) == ("succeeded", 50)
    assert world.value("SELECT count(*) FROM credit_refresh_batches") == 1


def test_users_of_an_atomic_plan_are_one_batch_and_the_others_are_not(world: World) -> None:
    world.users(30)
    world.sql.execute("UPDATE plans SET atomic = true WHERE code = 'pro'")
    for n in range(25):
        world.user(f"pro-{n}", plan_code="pro")
    poison(world, "pro-7", "user-3")
    run = world.scan(batch_size=10)
    batches = world.rows("SELECT atomic, cardinality(user_ids) AS users FROM credit_refresh_batches ORDER BY seq")
    assert [(row["atomic"], row["users"]) for row in batches] == [(False, 10)] * 3 + [(True, 25)]
    world.work(world.claim(run))
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 29, 26)
    assert world.value("SELECT count(*) FROM users WHERE plan_code = 'pro' AND credit_balance <> 400") == 0


def test_a_large_atomic_plan_is_cut_and_a_large_atomic_run_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "ATOMIC_USERS_MAX", 20)
    world.users(50)
    with pytest.raises(RefusedError, match=r"50 users are too many for all or nothing.* 20 at most; no run was opened"):
        world.scan(atomic=True)
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0
    world.sql.execute("UPDATE plans SET atomic = true")
    run = world.scan()
    batches = world.rows("SELECT cardinality(user_ids) AS users FROM credit_refresh_batches WHERE atomic ORDER BY seq")
    assert [row["users"] for row in batches] == [20, 20, 10]
    world.work(world.claim(run))
    assert world.progress(run).users_refreshed == 50


def test_the_database_admits_no_atomic_batch_that_is_done_without_one_of_its_users(world: World) -> None:
    world.users(2)
    world.scan(atomic=True)
    for column in ("users_failed", "users_deferred"):
        with pytest.raises(psycopg.errors.CheckViolation, match="all_or_none"):
            world.sql.execute(f"UPDATE credit_refresh_batches SET status = 'done', users_refreshed = 1, {column} = 1")  # noqa: S608


def test_two_deliveries_at_once_fail_it_once(world: World) -> None:
    world.users(50)
    poison(world, "user-1")
    run = world.scan(atomic=True)
    ids = world.claim(run)
    with world.calls(*(lambda: world.work(ids) for _ in range(4))) as workers:
        workers.start()
        workers.results()
    assert world.value("SELECT attempts FROM credit_refresh_batches") == 1
    assert world.progress(run).status == "failed"
    untouched(world)
