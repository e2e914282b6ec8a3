"""A host that locks users in any order, for any time, is never our victim and never waits for our waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from db import Database
from refresh import delivery

if TYPE_CHECKING:
    from tests.integration.world import World

SPEND = "UPDATE users SET credit_balance = credit_balance - %s WHERE id = %s"


def test_users_whom_the_host_has_locked_go_to_a_batch_of_their_own_and_the_others_do_not_wait(world: World) -> None:
    ada, bob, cyd = world.user("ada"), world.user("bob"), world.user("cyd")
    run = world.scan()
    with world.host() as host:
        host.execute(SPEND, (30, bob))
        (done,) = world.work(world.claim(run))
        assert world.value("SELECT state FROM pg_stat_activity WHERE pid = %s", host.info.backend_pid) == (
            "idle in transaction"
        )
        assert (done.users_refreshed, done.users_deferred) == (2, 1)
        assert [world.see(id_)["credit_balance"] for id_ in (ada, bob, cyd)] == [1_000, 400, 1_000]
        assert world.progress(run).status == "running"
        host.commit()
    rest = world.row("SELECT * FROM credit_refresh_batches WHERE status = 'pending'")
    assert (rest["user_ids"], rest["attempts"], rest["run_id"]) == ([bob], 1, run.run_id)
    world.work([rest["id"]])
    done_run = world.progress(run)
    assert (done_run.status, done_run.users_refreshed, done_run.users_selected) == ("succeeded", 3, 3)
    assert [row["credits_added"] for row in world.history(bob)] == [630]


def test_a_batch_of_one_waits_its_turn_and_grants_on_what_the_host_left(world: World) -> None:
    ada = world.user()
    ids = world.claim(world.scan())
    with world.host() as host, world.background(ids) as worker:
        host.execute(SPEND, (399, ada))
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the batch waits for the host's lock")
        host.commit()
        assert [outcome.credits_granted for outcome in worker.result()] == [999]
    assert world.see(ada)["credit_balance"] == 1_000


def test_a_host_that_locks_in_the_other_order_is_never_the_deadlock_victim(world: World) -> None:
    """The batch is held open in its middle, with user 1 locked; the host has user 2 and asks for user 1."""
    ada, bob = world.user("ada"), world.user("bob")
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
    world.sql.execute("ALTER DATABASE " + world.sql.info.dbname + " SET deadlock_timeout = '100ms'")
    ids = world.claim(world.scan())
    with world.host() as host, world.host() as gate, world.background(ids) as worker:
        gate.execute("SELECT pg_advisory_xact_lock(77)")
        host.execute(SPEND, (10, bob))
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the batch is in its middle")
        with world.calls(lambda: host.execute(SPEND, (10, ada)).rowcount) as spend:
            spend.start()
            world.until(lambda: world.waiting("host") == 1, "the host waits for the batch's user")
            gate.rollback()
            assert spend.results() == [1]
        host.commit()
        (done,) = worker.result()
    assert (done.users_refreshed, done.users_deferred) == (1, 1)
    assert world.see(ada)["credit_balance"] == 990
    assert world.see(bob)["credit_balance"] == 390


def test_waiting_for_a_lock_ends_before_postgresql_looks_for_deadlocks(world: World, database_url: str) -> None:
    with world.database.statements() as connection:
        assert connection.execute("SHOW lock_timeout").fetchone() == ("10s",)
    world.sql.execute("ALTER DATABASE " + world.sql.info.dbname + " SET deadlock_timeout = '600ms'")
    ada = world.user()
    ids = world.claim(world.scan())
    other = Database(database_url, "credits", name="other")
    with world.host() as host, other.statements() as connection:
        assert connection.execute("SHOW lock_timeout").fetchone() == ("300ms",)
        host.execute(SPEND, (1, ada))
        from refresh.batch import GRANT_ONE  # noqa: PLC0415 - the statement is wanted here alone
        from refresh.closing import close_batch  # noqa: PLC0415 - the same

        with pytest.raises(psycopg.errors.LockNotAvailable):
            close_batch(connection, ids[0], GRANT_ONE)
    assert world.history(ada) == []


def test_users_who_are_locked_again_get_a_batch_each_and_wait_their_turn(world: World) -> None:
    ids = [world.user(name) for name in ("ada", "bob", "cyd")]
    run = world.scan()
    pending = "SELECT id, user_ids, attempts FROM credit_refresh_batches WHERE status = 'pending' ORDER BY user_ids"
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = 1 WHERE id = ANY (%s)", (ids[:2],))
        world.work(world.claim(run))
        (again,) = world.rows(pending)
        assert (again["user_ids"], again["attempts"]) == (ids[:2], 1)
        world.work([again["id"]])
        assert [row["user_ids"] for row in world.rows(pending)] == [[id_] for id_ in ids[:2]]
        host.commit()
    world.work([row["id"] for row in world.rows(pending)])
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_selected) == ("succeeded", 3, 3)


def test_of_a_batch_that_somebody_else_has_no_failure_is_noted(world: World) -> None:
    ada = world.user()
    ids = world.claim(world.scan())
    with world.host() as host, world.background(ids) as worker:
        host.execute(SPEND, (1, ada))
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the batch waits for the host")
        with world.database.statements() as connection:
            assert delivery.record_failure(connection, ids[0], "not mine") == 0
            delivery.unclaim_batches(connection, ids)
        host.commit()
        worker.result()
    assert world.value("SELECT attempts FROM credit_refresh_batches") == 0
