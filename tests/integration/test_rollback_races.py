"""A rollback and whoever else has its users, or presses the button, in the same instant."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg

from refresh import runs, switch
from refresh.errors import RefusedError
from refresh.work import do_batch, pending_batches
from tests.integration import applying
from tests.integration.ledger import check_ledger
from tests.integration.rollbacks import (
    last,
    opened,
    pending,
    refresh,
    roll_back,
    spend,
    work_off,
)

if TYPE_CHECKING:
    from tests.integration.world import World


# --- at the same time -----------------------------------------------------------------------------------------------


def test_a_spend_in_the_same_instant_is_kept_whichever_comes_first(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    undone = opened(world, run.run_id)
    with world.host() as host, world.background(pending(world, undone)) as worker:
        host.execute("UPDATE users SET credit_balance = credit_balance - 950 WHERE id = %s", (ada,))
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the rollback waits for the spend")
        host.commit()
        assert [outcome.credits_granted for outcome in worker.result()] == [-50]
    assert (world.see(ada)["credit_balance"], last(world, ada)["shortfall"]) == (0, 550)
    check_ledger(world, {ada: -550})


def test_a_refresh_that_commits_while_the_rollback_waits_counts_as_since(world: World) -> None:
    """Decided on rows read after the locks: a snapshot from before them would not show the new grant."""
    ada = world.user()
    run = refresh(world)
    undone = opened(world, run.run_id)
    world.restore("UPDATE users SET next_refresh_at = now() - interval '1 minute' WHERE id = %s", ada)
    with world.host() as host, world.background(pending(world, undone)) as worker:
        host.execute("SELECT refresh_credits_if_due('ada')")
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the rollback waits for the refresh")
        host.commit()
        assert [outcome.users_skipped for outcome in worker.result()] == [1]
    assert last(world, ada)["reason"] == "refreshed_since"
    assert world.see(ada)["credit_balance"] == 1_000


def test_another_rollback_of_the_same_user_in_the_same_instant_takes_nothing_again(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    one, other = opened(world, run.run_id, users=["ada"]), opened(world, run.run_id)
    with world.host() as host, world.background(pending(world, other)) as worker:
        (batch,) = pending_batches(host, pending(world, one))
        assert do_batch(host, batch) is not None
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the second waits for the first")
        host.commit()
        (outcome,) = worker.result()
    assert (outcome.users_refreshed, outcome.users_skipped) == (0, 1)
    assert world.see(ada)["credit_balance"] == 400
    assert [row["status"] for row in world.history(ada)] == ["refreshed", "reversed"]


def test_a_batch_of_many_leaves_whom_somebody_has_locked_to_a_batch_of_their_own(world: World) -> None:
    ids = [world.user(name) for name in ("ada", "bob", "cyd")]
    run = refresh(world)
    undone = opened(world, run.run_id)
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = credit_balance - 30 WHERE id = %s", (ids[1],))
        (outcome,) = world.work(pending(world, undone))
        assert (outcome.users_refreshed, outcome.users_deferred) == (2, 1)
        host.commit()
    assert work_off(world, undone).status == "succeeded"
    assert [world.see(id_)["credit_balance"] for id_ in ids] == [400, 370, 400]
    check_ledger(world, {ids[0]: 400, ids[1]: 370, ids[2]: 400})


def test_a_second_delivery_finds_the_batch_taken_and_then_done(world: World) -> None:
    ada, _bob = world.user(), world.user("bob")
    run = refresh(world)
    undone = opened(world, run.run_id)
    ids = pending(world, undone)
    with world.host() as host:
        (batch,) = pending_batches(host, ids)
        assert do_batch(host, batch) is not None
        assert world.work(ids) == []
        host.commit()
    assert world.work(ids) == []
    assert world.see(ada)["credit_balance"] == 400


def test_a_worker_that_dies_in_the_middle_has_changed_nothing(world: World) -> None:
    ada, bob = world.user(), world.user("bob")
    run = refresh(world)
    undone = opened(world, run.run_id)
    users, books = world.rows("SELECT * FROM users ORDER BY id"), world.history(ada)
    with suppress(psycopg.errors.AdminShutdown), world.host() as worker:
        (batch,) = pending_batches(worker, pending(world, undone))
        outcome = do_batch(worker, batch)
        assert outcome is not None
        assert outcome.users_refreshed == 2
        world.sql.execute("SELECT pg_terminate_backend(%s)", (worker.info.backend_pid,))
    world.until(lambda: len(world.rows("SELECT FROM users FOR UPDATE SKIP LOCKED")) == 2, "its locks are gone")
    assert (world.rows("SELECT * FROM users ORDER BY id"), world.history(ada)) == (users, books)
    assert work_off(world, undone).users_refreshed == 2
    assert [world.see(id_)["credit_balance"] for id_ in (ada, bob)] == [400, 400]


def test_of_two_operators_one_rolls_back_and_the_other_is_told_by_whom(world: World) -> None:
    world.user()
    run = refresh(world)

    def press() -> runs.Opened | str:
        try:
            return opened(world, run.run_id)
        except RefusedError as error:
            return str(error)

    with world.host() as gate, world.calls(press, press) as operators:
        runs.lock_door(gate)
        operators.start()
        world.until(lambda: world.waiting("test") == 2, "both wait at the door")
        gate.rollback()
        results = operators.results()
    (undone,) = [result for result in results if isinstance(result, runs.Opened)]
    (told,) = [result for result in results if isinstance(result, str)]
    assert told == f"run {run.run_id} was rolled back already, by run {undone.run_id}"


def test_a_scan_beside_a_rollback_leaves_its_users_to_it(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    undone = opened(world, run.run_id, reopen=True)
    world.restore("UPDATE users SET next_refresh_at = now() - interval '1 minute' WHERE id = %s", ada)
    assert world.scan().users_selected == 0
    work_off(world, undone)
    assert world.see(ada)["credit_balance"] == 400


def test_a_rollback_is_no_spend_and_sets_off_no_refresh(world: World) -> None:
    """Of a user who is due by now: the next window's grant comes after the rollback, on what it has left."""
    ada = world.user(credit_balance=0)
    run = refresh(world)
    with world.database.transaction(lock_timeout=timedelta(seconds=5)) as connection:
        assert switch.turn_trigger(connection, on=True, actor="test")
    world.restore("UPDATE users SET next_refresh_at = now() - interval '1 minute' WHERE id = %s", ada)
    roll_back(world, run)
    assert world.see(ada)["credit_balance"] == 0
    assert [row["status"] for row in world.history(ada)] == ["refreshed", "reversed"]
    spend(world, ada, 30)
    assert world.see(ada)["credit_balance"] == 970


def test_one_operator_applies_while_another_rolls_the_apply_back(world: World) -> None:
    """Both pressed at the same time, with workers draining: whatever the order, each grant is there or taken back."""
    users = [world.user(f"user-{number}") for number in range(12)]
    dry_run = applying.plan(world, batch_size=1)
    applied = applying.opened(world, dry_run, batch_size=1)
    with (
        world.calls(
            lambda: world.work(pending(world, applied)[:6]),
            lambda: world.work(pending(world, applied)[6:]),
            lambda: opened(world, applied.run_id),
        ) as pressed,
        suppress(RefusedError),
    ):
        pressed.start()
        pressed.results()
    # The rollback may come before the first grant: then it cancels the apply, and finds nothing to take back.
    for row in world.rows("SELECT id FROM credit_refresh_batches WHERE status = 'pending'"):
        world.work([row["id"]])
    assert world.rows("SELECT id FROM credit_refresh_runs WHERE status = 'running'") == []
    assert world.progress(applied).status in {"succeeded", "cancelled"}
    live = "status = 'refreshed' AND reversed_by_run_id IS NULL"
    assert world.value(f"SELECT count(*) FROM credit_refresh_histories WHERE {live}") == 0  # noqa: S608 - our own text
    assert [world.see(user_id)["credit_balance"] for user_id in users] == [400] * len(users)
    check_ledger(world, dict.fromkeys(users, 400))
