"""Users whom the database refuses stand alone: the others of their batch are refreshed by the same message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from refresh import isolation, switch, totals
from refresh.closing import Outcome
from refresh.work import do_batch, pending_batches
from tests.integration.planning import MONTHLY, change, date, next_of

if TYPE_CHECKING:
    from refresh.work import Pending
    from tests.integration.command import Cli
    from tests.integration.world import World

SPEND = "UPDATE users SET credit_balance = credit_balance - %s WHERE id = %s"
HUGE = 2**63 - 1
RAISED = psycopg.errors.RaiseException("no")

RAISES = """
CREATE FUNCTION host_says_no() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF new.email = 'poison' THEN RAISE EXCEPTION 'no credits for %', new.external_id; END IF;
    RETURN new;
END $$
"""
TRIGGER = (
    "CREATE TRIGGER host_says_no BEFORE UPDATE OF credit_balance, next_refresh_at ON users FOR EACH ROW"
    " EXECUTE FUNCTION host_says_no()"
)
DEFERRED = (
    "CREATE CONSTRAINT TRIGGER host_says_no AFTER UPDATE ON users DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
    " EXECUTE FUNCTION host_says_no()"
)


def poison(world: World, *names: str, trigger: str = TRIGGER) -> None:
    world.sql.execute("UPDATE users SET email = 'poison' WHERE external_id = ANY (%s)", (list(names),))
    world.sql.execute(RAISES)
    world.sql.execute(trigger)


def id_of(world: World, external_id: str) -> int:
    return int(world.value("SELECT id FROM users WHERE external_id = %s", external_id))


def counted(world: World) -> dict[str, int]:
    """History rows by status; and for each an audit row, an untouched balance where it failed."""
    assert (
        world.value(
            """
            SELECT count(*) FROM credit_refresh_histories AS h
            LEFT JOIN credit_audit_logs AS a ON a.user_id = h.user_id AND a.run_id = h.run_id
                AND a.occurred_at = h.created_at AND a.balance_after = h.new_balance
                AND a.action = CASE h.status WHEN 'failed' THEN 'refresh_failed' ELSE h.status END
            WHERE a.id IS NULL
            """
        )
        == 0
    )
    rows = world.rows("SELECT status, count(*) AS rows FROM credit_refresh_histories GROUP BY status")
    return {row["status"]: row["rows"] for row in rows}


def accounted(world: World) -> None:
    """Each user of the run is in one closed batch, the batches that were halved aside."""
    row = world.row(
        """
        SELECT (SELECT users_selected FROM credit_refresh_runs) AS selected,
            sum(cardinality(user_ids) - users_deferred) AS done, count(*) FILTER (WHERE status <> 'done') AS open
        FROM credit_refresh_batches
        """
    )
    assert (row["done"], row["open"]) == (row["selected"], 0)


@pytest.mark.parametrize("trigger", [TRIGGER, DEFERRED], ids=["trigger", "deferred constraint trigger"])
def test_a_hosts_trigger_that_raises_for_one_user_costs_the_other_99_nothing(world: World, trigger: str) -> None:
    world.users(100)
    poison(world, "user-37", trigger=trigger)
    run = world.scan(reason="credits scan")
    (outcome,) = world.work(world.claim(run))
    assert outcome == Outcome(run.run_id, 0, 99, 0, 0, 1, 0, outcome.credits_granted)
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_failed, done.users_done) == ("partial", 99, 1, 100)
    assert done.credits_granted == outcome.credits_granted == sum(1_000 - n for n in range(1, 101) if n != 37)
    assert done.error == "no credits for user-37 (SQLSTATE P0001)"
    assert counted(world) == {"refreshed": 99, "failed": 1}
    accounted(world)
    user = world.see(id_of(world, "user-37"))
    (failed,) = world.history(user["id"])
    assert user["credit_balance"] == 37
    assert user["next_refresh_at"] == failed["window_start"] == failed["previous_next_refresh_at"]
    assert (failed["old_balance"], failed["credits_added"], failed["new_balance"]) == (37, 0, 37)
    assert (failed["error"], failed["reason"]) == (done.error, "credits scan")
    (audit,) = world.audit(user["id"])
    assert audit["detail"] == {"reason": "credits scan", "error": done.error}
    assert (audit["actor"], audit["credits"]) == ("test", 0)


def test_a_constraint_of_the_hosts(world: World) -> None:
    world.users(9)
    rich = world.user("rich", custom_credit_amount=5_000)
    world.sql.execute("ALTER TABLE users ADD CONSTRAINT host_limit CHECK (credit_balance <= 2000)")
    done = world.refresh()
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 9, 1)
    (failed,) = world.history(rich)
    assert failed["error"] == ('new row for relation "users" violates check constraint "host_limit" (SQLSTATE 23514)')
    accounted(world)


def test_a_number_that_overflows_in_the_hosts_trigger(world: World) -> None:
    world.users(9)
    rich = world.user("rich", custom_credit_amount=HUGE)
    world.sql.execute("ALTER TABLE users ADD COLUMN cents bigint GENERATED ALWAYS AS (credit_balance * 100) STORED")
    done = world.refresh()
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 9, 1)
    assert world.history(rich)[0]["error"] == "bigint out of range (SQLSTATE 22003)"


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_user_over_whom_the_rule_itself_raises_fails_alone_in_dry_runs_too(world: World, *, dry_run: bool) -> None:
    world.users(9)
    world.sql.execute("UPDATE plans SET cadence = 'monthly', day_of_month = 1 WHERE code = 'pro'")
    lost = world.user("lost", plan_code="pro")
    world.restore("UPDATE users SET timezone = 'Mars/Olympus' WHERE id = %s", lost)
    run = world.scan(dry_run=dry_run)
    world.work(world.claim(run))
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 9, 1)
    assert done.error == 'time zone "Mars/Olympus" not recognized (SQLSTATE 22023)'
    # A dry run counts whom the real one will fail, and has rows for its plans alone.
    assert [row["status"] for row in world.history(lost)] == ([] if dry_run else ["failed"])
    assert [row["action"] for row in world.audit(lost)] == ([] if dry_run else ["refresh_failed"])
    assert world.value("SELECT count(*) FROM credit_refresh_histories WHERE status = 'planned'") == (9 * dry_run)
    accounted(world)


@pytest.mark.parametrize("bad", [("user-1", "user-2"), ("user-50", "user-51"), ("user-1", "user-100")])
def test_two_of_100(world: World, bad: tuple[str, str]) -> None:
    world.users(100)
    poison(world, *bad)
    done = world.refresh()
    assert (done.status, done.users_refreshed, done.users_failed, done.users_selected) == ("partial", 98, 2, 100)
    failed = world.rows(
        "SELECT u.external_id FROM credit_refresh_histories AS h JOIN users AS u ON u.id = h.user_id"
        " WHERE h.status = 'failed' ORDER BY u.id"
    )
    assert [row["external_id"] for row in failed] == list(bad)
    assert counted(world) == {"refreshed": 98, "failed": 2}
    accounted(world)


def test_all_of_them(world: World) -> None:
    world.users(100)
    poison(world, *(f"user-{n}" for n in range(1, 101)))
    done = world.refresh()
    assert (done.status, done.users_refreshed, done.users_failed) == ("failed", 0, 100)
    assert counted(world) == {"failed": 100}
    accounted(world)


def test_a_failed_user_is_due_again_and_has_one_row_a_run(world: World) -> None:
    world.users(3)
    poison(world, "user-2")
    world.refresh()
    again = world.refresh()
    assert (again.users_selected, again.status, again.users_failed) == (1, "failed", 1)
    bad = id_of(world, "user-2")
    assert [row["status"] for row in world.history(bad)] == ["failed", "failed"]
    world.sql.execute("DROP TRIGGER host_says_no ON users")
    assert world.refresh().status == "succeeded"
    assert [row["status"] for row in world.history(bad)] == ["failed", "failed", "refreshed"]
    assert world.see(bad)["credit_balance"] == 1_000


def test_a_locked_user_beside_a_poisoned_one_is_put_off_and_nobody_waits(world: World) -> None:
    world.users(20)
    poison(world, "user-7")
    busy = id_of(world, "user-12")
    run = world.scan()
    ids = world.claim(run)
    with world.host() as host:
        host.execute(SPEND, (1, busy))
        (outcome,) = world.work(ids)  # a lock timeout of 10 seconds would end this otherwise
        assert (outcome.users_refreshed, outcome.users_failed, outcome.users_deferred) == (18, 1, 1)
        assert world.progress(run).status == "running"
        host.commit()
    world.work([row["id"] for row in world.rows("SELECT id FROM credit_refresh_batches WHERE status = 'pending'")])
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 19, 1)
    assert counted(world) == {"refreshed": 19, "failed": 1}
    accounted(world)


def test_a_poisoned_user_who_is_locked_when_it_would_be_noted_is_put_off(world: World) -> None:
    """The host takes the user between the statement that failed and the note."""
    ada = world.user()
    poison(world, "ada")
    run = world.scan()
    (batch_id,) = world.claim(run)
    with world.host() as host, world.database.statements() as connection:
        host.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (ada,))
        (found,) = pending_batches(connection, [batch_id])
        outcome = isolation.isolate(connection, found, RAISED, do_batch)
        assert outcome is not None
        assert (outcome.users_failed, outcome.users_deferred) == (0, 1)
    row = world.row("SELECT status, attempts, error, next_attempt_at > now() AS later FROM credit_refresh_batches")
    assert row == {"status": "pending", "attempts": 1, "error": "no (SQLSTATE P0001)", "later": True}
    assert world.history(ada) == []
    world.work([batch_id])
    assert world.progress(run).status == "failed"
    assert len(world.history(ada)) == 1


def test_a_user_whom_the_host_deletes_meanwhile_is_skipped(world: World) -> None:
    world.user()
    run = world.scan()
    (batch_id,) = world.claim(run)
    with world.database.statements() as connection:
        (found,) = pending_batches(connection, [batch_id])
        world.sql.execute("DELETE FROM users")
        isolation.isolate(connection, found, RAISED, do_batch)
        totals.finish_runs(connection)
    done = world.progress(run)
    assert (done.status, done.users_skipped, done.users_failed, done.error) == ("succeeded", 1, 0, None)


def test_two_deliveries_at_once_refresh_each_user_once_and_note_each_failure_once(world: World) -> None:
    world.users(100)
    poison(world, "user-3", "user-88")
    run = world.scan()
    ids = world.claim(run)
    with world.calls(*(lambda: world.work(ids) for _ in range(4))) as workers:
        workers.start()
        outcomes = [outcome for done in workers.results() for outcome in done]
    assert len(outcomes) == 1
    assert counted(world) == {"refreshed": 98, "failed": 2}
    assert world.work(ids) == []
    accounted(world)


def test_a_worker_that_dies_in_the_middle_has_changed_nothing(world: World) -> None:
    world.users(50)
    poison(world, "user-50")
    run = world.scan()
    ids = world.claim(run)

    def dying(connection: psycopg.Connection[Any], half: Pending) -> Outcome | None:
        outcome = do_batch(connection, half)
        assert outcome is not None
        assert outcome.users_refreshed == 25
        world.sql.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
        return outcome

    with psycopg.connect(world.sql.info.dsn, autocommit=True, options="-c search_path=credits") as connection:
        (found,) = pending_batches(connection, ids)
        with pytest.raises(psycopg.OperationalError):
            isolation.isolate(connection, found, RAISED, dying)
    assert counted(world) == {}
    assert world.value("SELECT count(*) FROM credit_refresh_batches") == 1
    assert world.work(ids)[0].users_refreshed == 49  # as upkeep delivers it again
    assert world.progress(run).status == "partial"
    assert counted(world) == {"refreshed": 49, "failed": 1}


@pytest.mark.parametrize("sqlstate", ["40001", "53100", "55P03", "57014", "42883"])
def test_an_error_that_is_not_about_a_user_undoes_the_isolation_and_counts_as_an_attempt(
    world: World, sqlstate: str
) -> None:
    world.users(10)
    poison(world, "user-3")
    world.sql.execute(
        RAISES.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION").replace(
            "RETURN new",
            f"IF new.external_id = 'user-9' THEN RAISE 'not now' USING ERRCODE = '{sqlstate}'; END IF; RETURN new",
        )
    )
    run = world.scan()
    ids = world.claim(run)
    with world.database.statements() as connection:
        (found,) = pending_batches(connection, ids)
        with pytest.raises(psycopg.Error, match="not now"):
            do_batch(connection, found)
    assert counted(world) == {}
    assert world.value("SELECT count(*) FROM credit_refresh_batches") == 1
    assert world.value("SELECT status FROM credit_refresh_batches") == "pending"


def test_a_regrid_moves_the_others(world: World) -> None:
    ada, bob, eve = (world.user(name) for name in ("ada", "bob", "eve"))
    for user in (ada, bob, eve):
        date(world, user, "2099-02-10 00:00Z")
    poison(world, "bob")
    run = change(world, MONTHLY)
    world.work(world.claim(run))
    done = world.progress(run)
    assert (done.kind, done.status, done.users_refreshed, done.users_failed) == ("regrid", "partial", 2, 1)
    assert [next_of(world, user) for user in (ada, bob, eve)] == [
        "2099-02-28 08:00", "2099-02-10 00:00", "2099-02-28 08:00"
    ]  # fmt: skip
    assert [row["status"] for row in world.history(bob)] == ["failed"]
    accounted(world)


def test_a_pause_in_the_middle_leaves_the_rest_pending(world: World) -> None:
    world.users(8)
    run = world.scan()
    (batch_id,) = world.claim(run)
    calls: list[int] = []

    def pausing(connection: psycopg.Connection[Any], half: Pending) -> Outcome | None:
        calls.append(half.id)
        outcome = do_batch(connection, half)
        if len(calls) == 1:
            with world.database.transaction() as other:
                switch.turn(other, enabled=False, actor="test")
        return outcome

    with world.database.statements() as connection:
        (found,) = pending_batches(connection, [batch_id])
        outcome = isolation.isolate(connection, found, RAISED, pausing)
    assert outcome is not None
    assert (outcome.users_refreshed, outcome.users_deferred) == (4, 4)
    with world.database.transaction() as connection:
        switch.turn(connection, enabled=True, actor="test")
    world.work(world.claim())
    assert world.progress(run).status == "succeeded"
    accounted(world)


def test_the_scan_that_waits_says_so_by_its_exit_code(world: World, cli: Cli) -> None:
    world.users(100)
    poison(world, "user-37")
    pending = "SELECT id FROM credit_refresh_batches WHERE published_at IS NOT NULL"

    def work() -> None:
        world.until(lambda: bool(world.rows(pending)), "the scan is published")
        world.work([row["id"] for row in world.rows(pending)])

    with world.calls(work) as worker:
        worker.start()
        done = cli("scan", "--wait")
        worker.results()
    assert done.returncode == 3
    assert "partial" in done.stdout
    assert "99 refreshed" in done.stdout
    assert "1 failed" in done.stdout
