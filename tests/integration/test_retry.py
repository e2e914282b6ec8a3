"""Retrying a run: whoever failed is taken up by a new run, asked for the same, and nobody is granted twice."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from refresh import delivery, runs, totals
from refresh import retry as retrying
from refresh.apply import open_apply
from refresh.cancel import cancel_run
from refresh.errors import RefusedError
from refresh.rollback import Asked, open_rollback
from refresh.selection import Selection
from tests.integration.bulk import opened
from tests.integration.command import refused
from tests.integration.planning import MONTHLY, change, date, next_of
from tests.integration.test_isolation import id_of, poison

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

SPENT = "UPDATE users SET credit_balance = 500 WHERE id = %s"
MEND = "DROP TRIGGER host_says_no ON users"


def retry(world: World, run_id: UUID, **request: Any) -> runs.Opened:
    asked = runs.Request(
        **{"source": "cli", "requested_by": "cli:ops", "batch_size": 100, "reason": "mended", **request}
    )
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        return retrying.open_retry(connection, run_id, asked)


def cancel(world: World, run: runs.Opened) -> None:
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        cancel_run(connection, run.run_id, actor="test", reason="test")


def give_up(world: World, batch_id: int) -> None:
    with world.database.statements() as connection:
        delivery.record_failure(connection, batch_id, "boom")
        delivery.give_up_batches(connection, max_attempts=1)
        totals.finish_runs(connection)


def carried_out(world: World, run: runs.Opened) -> totals.Progress:
    world.work(world.claim(run))
    return world.progress(run)


def test_failed_users_and_batches_that_were_given_up_are_taken_up(world: World) -> None:
    world.users(150)
    poison(world, "user-7")
    run = world.scan()
    first, second = world.claim(run)
    world.work([first])
    give_up(world, second)
    assert world.progress(run).users_failed == 51
    world.sql.execute(MEND)
    made = retry(world, run.run_id)
    assert (made.users_selected, made.batches_total) == (51, 1)
    row = world.row("SELECT * FROM credit_refresh_runs WHERE id = %s", made.run_id)
    assert (row["kind"], row["work"], row["parent_run_id"], row["reason"]) == ("retry", "refresh", run.run_id, "mended")
    done = carried_out(world, made)
    assert (done.status, done.users_refreshed) == ("succeeded", 51)
    assert world.value("SELECT count(*) FROM users WHERE credit_balance <> 1000") == 0
    assert [row["status"] for row in world.history(id_of(world, "user-7"))] == ["failed", "refreshed"]
    again = retry(world, run.run_id)  # as often as somebody likes: they are not due any more
    assert carried_out(world, again).users_skipped == 51
    with pytest.raises(RefusedError, match=f"nobody failed in run {made.run_id}"):
        retry(world, made.run_id)


def test_a_retry_that_fails_is_retried_itself(world: World) -> None:
    world.users(3)
    poison(world, "user-2")
    run = world.scan()
    assert carried_out(world, run).status == "partial"
    second = retry(world, run.run_id)
    assert carried_out(world, second).status == "failed"
    world.sql.execute(MEND)
    third = retry(world, second.run_id)
    assert carried_out(world, third).status == "succeeded"
    assert world.value("SELECT parent_run_id FROM credit_refresh_runs WHERE id = %s", third.run_id) == second.run_id


def test_of_a_cancelled_run_those_who_were_not_reached(world: World) -> None:
    world.users(30)
    run = world.scan(batch_size=10)
    world.work(world.claim(run)[:1])
    cancel(world, run)
    made = retry(world, run.run_id)
    assert made.users_selected == 20
    assert carried_out(world, made).users_refreshed == 20
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == 30


def test_what_was_asked_for_is_asked_for_again_and_a_forced_grant_is_made_once(world: World) -> None:
    """The second retry finds the users with their grants of the first: the run's instant is their key."""
    world.users(5, due_in="10 days")
    with world.database.transaction() as connection:
        request = runs.Request("cli", "test", 100, force=True, keep_window=True, amount=70_000)
        run = runs.open_run(connection, request)
    assert isinstance(run, runs.Opened)
    (batch_id,) = world.claim(run)
    give_up(world, batch_id)
    first = retry(world, run.run_id)
    columns = "force, keep_window, amount, as_of, atomic"
    asked, again = (
        world.row(f"SELECT {columns} FROM credit_refresh_runs WHERE id = %s", id_)  # noqa: S608 - names of columns
        for id_ in (run.run_id, first.run_id)
    )
    assert asked == again
    assert asked["as_of"] is not None
    with pytest.raises(RefusedError, match="unfinished batches of other runs"):
        retry(world, run.run_id)
    assert carried_out(world, first).users_refreshed == 5
    second = retry(world, run.run_id)
    assert carried_out(world, second).users_skipped == 5
    assert world.value("SELECT min(credit_balance) FROM users") == 70_000
    assert world.value("SELECT count(*) FROM credit_refresh_histories WHERE status = 'refreshed'") == 5


def test_users_of_an_unfinished_run_are_left_to_it(world: World) -> None:
    world.users(4)
    poison(world, "user-1", "user-2")
    run = world.scan()
    carried_out(world, run)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true WHERE external_id = 'user-1'")
    other = world.scan()  # both are due again
    world.sql.execute(
        "UPDATE credit_refresh_batches SET user_ids = ARRAY[%s::bigint] WHERE run_id = %s",
        (id_of(world, "user-2"), other.run_id),
    )
    with world.database.statements() as connection:
        found = retrying.read_retriable(connection, run.run_id)
    assert (found.users, found.users_elsewhere) == (1, 1)
    assert retry(world, run.run_id).users_selected == 1


def test_all_or_none_again(world: World) -> None:
    world.users(30)
    poison(world, "user-3")
    run = world.scan(atomic=True)
    assert carried_out(world, run).status == "failed"
    world.sql.execute(MEND)
    made = retry(world, run.run_id, batch_size=10)
    columns = "atomic, cardinality(user_ids) AS users"
    batch = world.row(f"SELECT {columns} FROM credit_refresh_batches WHERE run_id = %s", made.run_id)  # noqa: S608 - the same
    assert batch == {"atomic": True, "users": 30}
    assert carried_out(world, made).users_refreshed == 30


def test_all_or_none_where_one_of_them_is_in_another_run(world: World) -> None:
    world.users(3)
    world.sql.execute("UPDATE plans SET atomic = true WHERE code = 'pro'")
    for name in ("ada", "bob", "cyd"):
        world.user(name, plan_code="pro")
    poison(world, "user-2", "bob")
    run = world.scan()
    assert carried_out(world, run).users_failed == 4
    world.sql.execute(MEND)
    other = opened(world, Selection(user="cyd"))
    with world.database.statements() as connection:
        counted = retrying.read_retriable(connection, run.run_id)
    assert (counted.users, counted.users_elsewhere) == (1, 3)
    first = retry(world, run.run_id)
    assert (first.users_selected, carried_out(world, first).users_refreshed) == (1, 1)
    assert world.value("SELECT count(*) FROM users WHERE plan_code = 'pro' AND credit_balance <> 400") == 0
    assert carried_out(world, other).users_refreshed == 1
    rest = carried_out(world, retry(world, run.run_id))  # all whom this run has failed, once nobody else has one
    assert (rest.users_selected, rest.users_refreshed, rest.users_skipped) == (4, 2, 2)


def test_all_or_none_with_nobody_else_to_take_is_refused(world: World) -> None:
    world.users(5)
    poison(world, "user-2")
    run = world.scan(atomic=True)
    carried_out(world, run)
    opened(world, Selection(user="user-4"))
    with pytest.raises(RefusedError, match="unfinished batches of other runs"):
        retry(world, run.run_id)


def test_an_apply_goes_on_with_the_plans_of_its_dry_run(world: World) -> None:
    world.users(10)
    dry = world.scan(dry_run=True)
    carried_out(world, dry)
    poison(world, "user-4")
    with world.database.transaction() as connection:
        run = open_apply(connection, dry.run_id, runs.Request("cli", "test", 100))
    assert isinstance(run, runs.Opened)
    assert carried_out(world, run).status == "partial"
    world.sql.execute(MEND)
    made = retry(world, run.run_id)
    row = world.row(
        "SELECT kind, work, parent_run_id, subject_run_id FROM credit_refresh_runs WHERE id = %s", made.run_id
    )
    assert row == {"kind": "retry", "work": "apply", "parent_run_id": run.run_id, "subject_run_id": dry.run_id}
    assert carried_out(world, made).users_refreshed == 1
    assert world.see(id_of(world, "user-4"))["credit_balance"] == 1_000


def test_a_rollback_goes_on_with_what_it_was_asked_for(world: World) -> None:
    world.users(10)
    granted = world.scan()
    carried_out(world, granted)
    world.sql.execute(SPENT, (id_of(world, "user-4"),))
    poison(world, "user-4")
    asked = Asked(run_id=granted.run_id, reopen=True)
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        run = open_rollback(connection, asked.request(runs.Request("cli", "test", 100)), asked)
    assert isinstance(run, runs.Opened)
    done = carried_out(world, run)
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 9, 1)
    world.sql.execute(MEND)
    made = retry(world, run.run_id)
    columns = "kind, work, parent_run_id, subject_run_id, selection -> 'reopen' AS reopen"
    row = world.row(f"SELECT {columns} FROM credit_refresh_runs WHERE id = %s", made.run_id)  # noqa: S608 - the same
    assert row == {
        "kind": "retry", "work": "rollback", "parent_run_id": run.run_id, "subject_run_id": granted.run_id,
        "reopen": True,
    }  # fmt: skip
    assert carried_out(world, made).users_refreshed == 1
    user = world.see(id_of(world, "user-4"))
    assert (user["credit_balance"], user["refresh_shortfall"]) == (0, 496)
    assert [row["status"] for row in world.history(user["id"])] == ["refreshed", "failed", "reversed"]


def test_a_regrid_goes_on_with_its_plan(world: World) -> None:
    ada, bob = world.user("ada"), world.user("bob")
    date(world, ada, "2099-02-10 00:00Z")
    date(world, bob, "2099-02-10 00:00Z")
    poison(world, "bob")
    run = change(world, MONTHLY)
    assert carried_out(world, run).status == "partial"
    world.sql.execute(MEND)
    assert carried_out(world, retry(world, run.run_id)).users_refreshed == 1
    assert next_of(world, ada) == next_of(world, bob) == "2099-02-28 08:00"


def test_the_same_key_is_the_same_run(world: World) -> None:
    world.users(3)
    poison(world, "user-2")
    run = world.scan()
    carried_out(world, run)
    made = retry(world, run.run_id, idempotency_key="k")
    again = retry(world, run.run_id, idempotency_key="k")
    assert (again.run_id, again.existing) == (made.run_id, True)
    with pytest.raises(RefusedError, match="belongs to run"):
        retry(world, run.run_id, idempotency_key="k", reason="another")


def test_two_who_retry_at_once_open_one_run(world: World) -> None:
    world.users(3)
    poison(world, "user-2")
    run = world.scan()
    carried_out(world, run)

    def try_to_retry() -> str:
        try:
            return str(retry(world, run.run_id).users_selected)
        except RefusedError as error:
            return str(error)

    with world.calls(try_to_retry, try_to_retry) as both:
        both.start()
        said = sorted(both.results())
    assert said == ["1", f"all users of run {run.run_id} who failed are in unfinished batches of other runs"]


def test_what_cannot_be_retried(world: World) -> None:
    with pytest.raises(RefusedError, match="there is no run"):
        retry(world, uuid4())
    world.users(3)
    dry = world.scan(dry_run=True)
    with pytest.raises(RefusedError, match="is a dry run: make a new one"):
        retry(world, dry.run_id)
    run = world.scan()
    with pytest.raises(RefusedError, match="still running"):
        retry(world, run.run_id)
    carried_out(world, run)
    with pytest.raises(RefusedError, match="nobody failed"):
        retry(world, run.run_id)
    world.sql.execute("UPDATE settings SET enabled = false")
    with pytest.raises(RefusedError, match="paused"):
        retry(world, run.run_id)
    world.sql.execute("UPDATE settings SET enabled = true, dry_run = true")
    with pytest.raises(RefusedError, match="every run is a dry one"):
        retry(world, run.run_id)
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 2


def test_users_who_were_deleted_since_are_nobodys_failure(world: World) -> None:
    world.users(2)
    poison(world, "user-2")
    run = world.scan()
    carried_out(world, run)
    world.sql.execute("DELETE FROM users WHERE external_id = 'user-2'")
    with pytest.raises(RefusedError, match="nobody failed"):
        retry(world, run.run_id)


def test_the_command(world: World, cli: Cli) -> None:
    world.users(3)
    poison(world, "user-2")
    run = world.scan()
    carried_out(world, run)
    name = str(run.run_id)
    refused(cli("runs", "retry", name), 2, f"Retry 1 user of run {name}?")
    refused(cli("runs", "retry", str(uuid4()), "--yes"), 2, "there is no run")
    refused(cli("runs", "retry", name, "--yes", CREDIT_REFRESH_ENABLED="false"), 2, "CREDIT_REFRESH_ENABLED is false")

    def work() -> None:
        world.until(lambda: bool(pending()), "the retry is open")
        world.work(pending())

    def pending() -> list[int]:
        rows = world.sql.execute("SELECT id FROM credit_refresh_batches WHERE status = 'pending'").fetchall()
        return [row["id"] for row in rows]

    for code, status in ((3, "failed"), (0, "succeeded")):
        worker = threading.Thread(target=work)
        worker.start()
        done = cli("runs", "retry", name[:8], "--yes", "--wait", "--json")
        worker.join()
        assert done.returncode == code, done
        assert f'"status": "{status}"' in done.stdout
        assert f'"retriedRunId": "{name}"' in done.stdout
        if code:
            world.sql.execute(MEND)
    assert "1 user, 1 batches published" in cli.says("runs", "retry", name, "--yes")
