"""Cancelling a run: what workers have is finished, nothing else is begun, and nobody is caught in a deadlock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from refresh import delivery, runs, totals
from refresh.cancel import Cancelled, cancel_run
from refresh.errors import RefusedError
from tests.integration.command import refused
from tests.integration.planning import MONTHLY, change, date, next_of

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

SPEND = "UPDATE users SET credit_balance = credit_balance - %s WHERE id = %s"


def cancel(world: World, run: runs.Opened, reason: str = "wrong amount") -> Cancelled:
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        return cancel_run(connection, run.run_id, actor="cli:ops", reason=reason)


def statuses(world: World) -> list[str]:
    return [row["status"] for row in world.rows("SELECT status FROM credit_refresh_batches ORDER BY id")]


def test_what_is_done_stays_and_what_is_not_is_never_begun(world: World) -> None:
    world.users(250)
    run = world.scan()
    first, second, third = world.claim(run)
    world.work([first])
    cancelled = cancel(world, run)
    assert (cancelled.status, cancelled.batches, cancelled.users) == ("cancelled", 2, 150)
    assert world.work([second, third]) == []
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_failed) == ("cancelled", 100, 0)
    assert (done.users_selected, done.users_done) == (250, 100)
    row = world.row("SELECT * FROM credit_refresh_runs")
    assert (row["users_refreshed"], row["batches_total"]) == (100, 3)
    assert row["credits_granted"] == world.value("SELECT sum(credits_added) FROM credit_refresh_histories")
    assert row["metadata"] == {"cancelledBy": "cli:ops", "cancelReason": "wrong amount"}
    assert row["finished_at"] is not None
    audit = world.row("SELECT * FROM credit_audit_logs WHERE action = 'run_cancelled'")
    assert (audit["actor"], audit["run_id"]) == ("cli:ops", run.run_id)
    assert audit["detail"] == {"reason": "wrong amount", "batchesCancelled": 2, "usersCancelled": 150}
    assert world.scan().users_selected == 150  # due as before


@pytest.mark.parametrize("batch_size", [1, 100])
def test_it_waits_for_the_batch_that_a_worker_has_and_for_whom_it_puts_off(world: World, batch_size: int) -> None:
    """The worker is held open in its middle by a lock of the host's trigger."""
    ada = world.user("ada")
    bob = world.user("bob")
    eve = world.user("eve")
    world.sql.execute(
        """
        CREATE FUNCTION host_trigger() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF current_setting('application_name') = 'test' THEN PERFORM pg_advisory_xact_lock_shared(77); END IF;
            RETURN new;
        END $$
        """
    )
    world.sql.execute("CREATE TRIGGER host_trigger BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION host_trigger()")
    run = world.scan(batch_size=batch_size)
    ids = world.claim(run)
    with world.host() as gate, world.host() as host, world.background(ids[:1]) as worker:
        gate.execute("SELECT pg_advisory_xact_lock(77)")
        if batch_size > 1:
            host.execute(SPEND, (1, bob))  # is put off to a batch that the first look cannot see
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the worker is in its batch")
        with world.calls(lambda: cancel(world, run)) as cancelling:
            cancelling.start()
            world.until(lambda: world.waiting("test") == 2, "the cancel waits for the worker")
            # Upkeep goes on meanwhile, and waits for nobody.
            with world.database.statements() as connection:
                delivery.give_up_batches(connection, max_attempts=1)
                delivery.record_failure(connection, ids[0], "not mine")
                assert totals.finish_runs(connection) == []
            assert world.claim(ring_again=True) == []
            gate.rollback()
            (cancelled,) = cancelling.results()
        (outcome,) = worker.result()
        host.commit()
    assert cancelled.status == "cancelled"
    if batch_size == 1:
        assert (outcome.users_refreshed, cancelled.users, statuses(world)) == (1, 2, ["done", "cancelled", "cancelled"])
    else:
        assert (outcome.users_refreshed, outcome.users_deferred, cancelled.users) == (2, 1, 1)
        assert statuses(world) == ["done", "cancelled"]
        assert [len(world.history(user)) for user in (ada, bob, eve)] == [1, 0, 1]
    assert world.progress(run).status == "cancelled"


def test_where_workers_had_the_last_batches_the_run_has_ended_by_itself(world: World) -> None:
    ada = world.user()
    run = world.scan()
    ids = world.claim(run)
    with world.host() as host, world.background(ids) as worker:
        host.execute(SPEND, (1, ada))
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the worker is in its batch")
        with world.calls(lambda: cancel(world, run)) as cancelling:
            cancelling.start()
            world.until(lambda: world.waiting("test") == 2, "the cancel waits for the worker")
            host.commit()
            (cancelled,) = cancelling.results()
        worker.result()
    assert (cancelled.status, cancelled.users, cancelled.ended.users_refreshed) == ("succeeded", 0, 1)
    assert world.progress(run).status == "succeeded"
    assert world.value("SELECT metadata FROM credit_refresh_runs") == {}
    assert world.value("SELECT count(*) FROM credit_audit_logs WHERE action = 'run_cancelled'") == 0


def test_two_who_cancel_at_once_and_workers_who_drain_the_run(world: World) -> None:
    world.users(400)
    run = world.scan(batch_size=5)
    ids = world.claim(run)

    def try_to_cancel() -> str:
        try:
            return cancel(world, run).status
        except RefusedError as error:
            return str(error)

    def drain(part: int) -> str:
        for id_ in ids[part::2]:
            world.work([id_])
        return "drained"

    calls: list[Any] = [lambda: drain(0), lambda: drain(1), try_to_cancel, try_to_cancel]
    with world.calls(*calls) as everybody:
        everybody.start()
        said = everybody.results()
    assert sorted(said[2:]) == ["cancelled", f"run {run.run_id} had ended already: cancelled"]
    done = world.progress(run)
    cancelled = world.value("SELECT sum(cardinality(user_ids)) FROM credit_refresh_batches WHERE status = 'cancelled'")
    assert done.users_refreshed + cancelled == 400
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == done.users_refreshed
    assert world.value("SELECT users_refreshed FROM credit_refresh_runs") == done.users_refreshed


def test_a_dry_run_and_a_paused_service(world: World) -> None:
    world.users(3)
    run = world.scan(dry_run=True)
    world.sql.execute("UPDATE settings SET enabled = false")
    cancelled = cancel(world, run)
    assert (cancelled.status, cancelled.users, cancelled.ended.dry_run) == ("cancelled", 3, True)
    world.sql.execute("UPDATE settings SET enabled = true")
    assert world.work(world.claim(run)) == []
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == 0


def test_a_regrid_leaves_users_on_their_old_date(world: World) -> None:
    ada = world.user()
    date(world, ada, "2099-02-10 00:00Z")
    run = change(world, MONTHLY)
    ids = world.claim(run)
    assert cancel(world, run).work == "regrid"
    assert world.work(ids) == []
    assert next_of(world, ada) == "2099-02-10 00:00"


def test_upkeep_leaves_a_cancelled_run_alone(world: World) -> None:
    world.users(3)
    run = world.scan()
    world.claim(run)
    world.sql.execute("UPDATE credit_refresh_batches SET attempts = 9, published_at = now() - interval '1 day'")
    cancel(world, run)
    with world.database.statements() as connection:
        assert delivery.give_up_batches(connection, max_attempts=1) == []
        assert totals.finish_runs(connection) == []
    assert world.claim(ring_again=True) == []
    assert statuses(world) == ["cancelled"]


def test_what_cannot_be_cancelled(world: World) -> None:
    run = world.scan()  # nobody is due
    with pytest.raises(RefusedError, match=f"run {run.run_id} had ended already: succeeded"):
        cancel(world, run)
    unknown = runs.Opened(uuid4(), dry_run=False, users_selected=0, batches_total=0)
    with pytest.raises(RefusedError, match=f"there is no run {unknown.run_id}"):
        cancel(world, unknown)


def test_the_command(world: World, cli: Cli) -> None:
    world.users(3)
    run = world.scan()
    name = str(run.run_id)
    refused(cli("runs", "cancel", name, "--yes"), 2, "--reason")
    refused(cli("runs", "cancel", name, "--reason", "wrong"), 2, "has 3 users left. Cancel it?")
    refused(cli("runs", "cancel", str(uuid4()), "--reason", "wrong", "--yes"), 2, "there is no run")
    facts = cli.facts("runs", "cancel", name[:8], "--reason", "wrong", "--yes")
    assert facts["runId"] == name
    assert (facts["status"], facts["usersCancelled"], facts["work"]) == ("cancelled", 3, "refresh")
    refused(cli("runs", "cancel", name, "--reason", "x", "--yes"), 2, "had ended already: cancelled")
    again = world.scan()
    said = cli.says("runs", "cancel", str(again.run_id), "--reason", "wrong", "--yes")
    assert said.strip() == (
        f"Run {again.run_id} is cancelled: 3 users not refreshed, due as before; "
        f"`credits runs retry {again.run_id}` takes them up."
    )
