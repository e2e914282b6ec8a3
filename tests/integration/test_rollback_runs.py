"""A rollback is a run: dry, refused, repeated, of single users, of a run that is still running."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from refresh import runs, switch
from refresh.cancel import cancel_run
from refresh.errors import RefusedError
from tests.integration.ledger import check_ledger
from tests.integration.rollbacks import (
    REASON,
    call_function,
    expect,
    grant,
    open_rollback,
    opened,
    pending,
    refresh,
    roll_back,
    spend,
    work_off,
)

if TYPE_CHECKING:
    from uuid import UUID

    from tests.integration.world import World


# --- a run like any other -------------------------------------------------------------------------------------------


def test_a_dry_run_records_what_would_be_taken_and_changes_nothing(world: World) -> None:
    ada, bob, cyd = (world.user(name) for name in ("ada", "bob", "cyd"))
    run = refresh(world)
    spend(world, ada, 900)
    world.restore("UPDATE users SET next_refresh_at = now() - interval '1 minute' WHERE id = %s", bob)
    call_function(world, "bob")
    world.sql.execute("DELETE FROM users WHERE id = %s", (cyd,))
    before = world.rows("SELECT * FROM users ORDER BY id")
    for _ in range(2):
        plan = opened(world, run.run_id, request={"dry_run": True})
        done = work_off(world, plan)
        assert (done.status, done.users_refreshed, done.users_skipped, done.credits_granted) == (
            "succeeded",
            1,
            2,
            -100,
        )
    assert world.rows("SELECT * FROM users ORDER BY id") == before
    assert grant(world, ada)["reversed_by_run_id"] is None
    rows = world.rows("SELECT * FROM credit_refresh_histories WHERE run_id = %s", plan.run_id)
    assert [(row["user_id"], row["status"], row["credits_added"], row["shortfall"]) for row in rows] == [
        (ada, "planned", -100, 500)
    ]
    assert world.value("SELECT count(*) FROM credit_audit_logs WHERE run_id = %s", plan.run_id) == 1
    assert roll_back(world, run).credits_granted == -100


def test_where_all_runs_are_dry_so_is_a_rollback(world: World) -> None:
    world.user()
    run = refresh(world)
    world.sql.execute("UPDATE settings SET dry_run = true")
    assert opened(world, run.run_id).dry_run


def refusal(world: World, run_id: UUID, **options: Any) -> str:
    count = "SELECT count(*) FROM credit_refresh_runs"
    before = world.value(count)
    with pytest.raises(RefusedError) as refused:
        open_rollback(world, run_id, **options)
    assert world.value(count) == before
    if not options.get("request"):
        with pytest.raises(RefusedError) as unexpected:
            expect(world, run_id, **options)
        assert str(unexpected.value) == str(refused.value)
    return str(refused.value)


def test_what_cannot_be_rolled_back_is_refused(world: World) -> None:
    world.user()
    dry = refresh(world, dry_run=True)
    run = refresh(world)
    empty = refresh(world)
    undone = opened(world, run.run_id)
    regrid = world.value(
        "INSERT INTO credit_refresh_runs (kind, work, source, requested_by, batches_total)"
        " VALUES ('regrid', 'regrid', 'cli', 'test', 1) RETURNING id"
    )
    assert "was a dry run" in refusal(world, dry.run_id)
    assert f"rolled back already, by run {undone.run_id}" in refusal(world, run.run_id)
    assert "it has no grant of it" in refusal(world, empty.run_id)
    assert "a rollback cannot be rolled back" in refusal(world, undone.run_id)
    assert "moved dates" in refusal(world, regrid)
    nobody = world.value("SELECT gen_random_uuid()")
    assert refusal(world, nobody) == f"there is no run {nobody}"


def test_a_retry_of_a_rollback_is_a_rollback_too(world: World) -> None:
    world.user()
    run = refresh(world)
    undone = opened(world, run.run_id)
    retry = world.value(
        "INSERT INTO credit_refresh_runs (kind, work, source, requested_by, batches_total, parent_run_id,"
        " subject_run_id) VALUES ('retry', 'rollback', 'cli', 'test', 1, %s, %s) RETURNING id",
        undone.run_id,
        run.run_id,
    )
    assert "a rollback cannot be rolled back" in refusal(world, retry)


def test_while_paused_no_rollback_opens_and_none_goes_on(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    undone = opened(world, run.run_id)
    with world.database.transaction() as connection:
        switch.turn(connection, enabled=False, actor="test")
    assert open_rollback(world, run.run_id) == runs.NotOpened("paused")
    work_off(world, undone)
    assert world.see(ada)["credit_balance"] == 1_000
    with world.database.transaction() as connection:
        switch.turn(connection, enabled=True, actor="test")
    work_off(world, undone)
    assert world.see(ada)["credit_balance"] == 400


def test_one_key_is_one_rollback(world: World) -> None:
    world.user()
    run = refresh(world)
    key = {"idempotency_key": "k1"}
    first = opened(world, run.run_id, request=key)
    work_off(world, first)
    again = opened(world, run.run_id, request=key)
    assert (again.run_id, again.existing) == (first.run_id, True)
    assert "was asked for something else" in refusal(world, run.run_id, reopen=True, request=key)


def test_single_users_first_and_the_rest_later(world: World) -> None:
    ids = {name: world.user(name) for name in ("ada", "bob", "cyd")}
    run = refresh(world)
    assert expect(world, run.run_id, users=["ada", "nobody"]).users == 1
    assert roll_back(world, run, users=["ada", "nobody"]).users_refreshed == 1
    assert roll_back(world, run, users=["ada", "bob"]).users_selected == 1
    assert "the users in the file have no grant of it" in refusal(world, run.run_id, users=["ada"])
    assert roll_back(world, run).users_selected == 1
    assert "rolled back already" in refusal(world, run.run_id)
    assert "no grant of it" in refusal(world, run.run_id, users=["cyd"])
    assert [world.see(id_)["credit_balance"] for id_ in ids.values()] == [400, 400, 400]
    check_ledger(world, dict.fromkeys(ids.values(), 400))


def test_single_users_whom_the_whole_rollback_left_alone(world: World) -> None:
    ada = world.user()
    run = refresh(world)
    forced = refresh(world, force=True, amount=5_000)
    assert roll_back(world, run).users_skipped == 1
    roll_back(world, forced)
    assert roll_back(world, run, users=["ada"]).users_refreshed == 1
    assert world.see(ada)["credit_balance"] == 400


def test_the_key_itself_refuses_a_second_rollback(world: World) -> None:
    world.user()
    run = refresh(world)
    opened(world, run.run_id)
    insert = """
        INSERT INTO credit_refresh_runs (
            kind, work, source, requested_by, batches_total, parent_run_id, subject_run_id, selection
        ) VALUES ('rollback', 'rollback', 'cli', 'test', 1, %s, %s, %s)
    """
    with pytest.raises(psycopg.errors.UniqueViolation, match="uq_credit_refresh_runs_parent"):
        world.sql.execute(insert, (run.run_id, run.run_id, "{}"))
    world.sql.execute(insert, (run.run_id, run.run_id, '{"users": {"ids": 1}}'))


def test_what_a_cancelled_rollback_left_can_be_rolled_back_again(world: World) -> None:
    ids = [world.user(name) for name in ("ada", "bob")]
    run = refresh(world)
    undone = opened(world, run.run_id, request={"batch_size": 1})
    world.work(pending(world, undone)[:1])
    with world.database.transaction(lock_timeout=timedelta(seconds=10)) as connection:
        assert cancel_run(connection, undone.run_id, actor="test", reason="second thoughts").status == "cancelled"
    assert roll_back(world, run).users_selected == 1
    assert [world.see(id_)["credit_balance"] for id_ in ids] == [400, 400]


# --- a run that is still running ------------------------------------------------------------------------------------


def test_a_running_run_is_cancelled_first(world: World) -> None:
    ids = [world.user(name) for name in ("ada", "bob", "cyd")]
    run = world.scan(batch_size=1)
    world.work(pending(world, run)[:1])
    expected = expect(world, run.run_id)
    assert (expected.users, expected.running) == (1, True)
    done = roll_back(world, run)
    assert (done.users_selected, done.users_refreshed) == (1, 1)
    assert world.progress(run).status == "cancelled"
    assert pending(world, run) == []
    assert [world.see(id_)["credit_balance"] for id_ in ids] == [400, 400, 400]
    noted = world.row("SELECT metadata FROM credit_refresh_runs WHERE id = %s", run.run_id)["metadata"]
    assert noted == {"cancelledBy": "cli:ops", "cancelReason": f"rolled back: {REASON}"}


def test_a_run_that_has_granted_nothing_yet_is_stopped(world: World) -> None:
    world.user()
    run = world.scan()
    assert expect(world, run.run_id).users == 0
    undone = opened(world, run.run_id)
    assert (undone.users_selected, world.progress(undone).status) == (0, "succeeded")
    assert world.progress(run).status == "cancelled"


def test_a_dry_rollback_of_a_running_run_stops_nothing(world: World) -> None:
    for name in ("ada", "bob"):
        world.user(name)
    run = world.scan(batch_size=1)
    world.work(pending(world, run)[:1])
    assert opened(world, run.run_id, request={"dry_run": True}).users_selected == 1
    assert world.progress(run).status == "running"


def test_the_batch_that_a_worker_has_is_waited_for_and_taken_back(world: World) -> None:
    ada = world.user()
    run = world.scan()
    with world.host() as host, world.background(pending(world, run)) as worker:
        host.execute("UPDATE users SET credit_balance = credit_balance - 1 WHERE id = %s", (ada,))
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the worker waits for the host")
        with world.calls(lambda: opened(world, run.run_id)) as rollback:
            rollback.start()
            world.until(lambda: world.waiting("test") == 2, "the rollback waits for the worker")
            host.commit()
            (undone,) = rollback.results()
        worker.result()
    assert undone.users_selected == 1
    work_off(world, undone)
    assert world.see(ada)["credit_balance"] == 399
    check_ledger(world, {ada: 399})
