"""The outbox: what is written, in the transaction of what it tells, and nothing for nobody."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from refresh import cancel, totals
from refresh.batch import GRANT_ALL, GRANT_MANY, GRANT_ONE, TELL_ALL, TELL_MANY, TELL_ONE
from refresh.work import do_batch, pending_batches
from tests.integration import applying, rollbacks
from tests.integration.hooks import endpoint, outbox, told
from tests.integration.test_isolation import DEFERRED, TRIGGER, poison

if TYPE_CHECKING:
    from tests.integration.world import World


def iso(world: World, at: Any) -> str:
    return str(world.value("SELECT utc_text(%s)", at))


def test_a_refreshed_user_is_told_of_in_the_grants_transaction(world: World) -> None:
    ada = world.user(credit_balance=400)
    added, _ = endpoint(world, "user.refreshed")
    run = world.refresh()
    (history,) = world.history(ada)
    (row,) = outbox(world)
    assert (row["endpoint_id"], row["type"], row["status"], row["attempts"]) == (
        added.id, "user.refreshed", "pending", 0,
    )  # fmt: skip
    assert row["created_at"] == history["created_at"] == row["next_attempt_at"]
    assert row["payload"] == {
        "userId": "ada", "runId": str(run.run_id), "source": "run", "planCode": "free", "grantMode": "fill",
        "target": 1_000, "oldBalance": 400, "creditsAdded": 600, "newBalance": 1_000, "windowsPassed": 0,
        "windowStart": iso(world, history["window_start"]), "windowEnd": iso(world, history["window_end"]),
    }  # fmt: skip
    xmin = "SELECT (SELECT xmin FROM webhook_deliveries) = (SELECT xmin FROM credit_refresh_histories)"
    assert world.value(xmin)


def test_without_an_endpoint_that_asks_the_batch_knows_nothing_of_webhooks(world: World) -> None:
    world.users(3)
    endpoint(world, "run.finished", "verify.finding")
    idle, _ = endpoint(world, "user.refreshed", "user.held")
    world.sql.execute("UPDATE webhook_endpoints SET active = false WHERE id = %s", (idle.id,))
    ids = world.claim(world.scan())
    with world.database.statements() as connection:
        (pending,) = pending_batches(connection, ids)
        assert not pending.tells
        world.sql.execute("UPDATE webhook_endpoints SET active = true WHERE id = %s", (idle.id,))
        (pending,) = pending_batches(connection, ids)
        assert pending.tells
    for plain in (GRANT_MANY, GRANT_ONE, GRANT_ALL):
        assert "webhook" not in plain


def test_each_of_many_endpoints_gets_its_own_message(world: World) -> None:
    world.users(150)
    for _ in range(2):
        endpoint(world, "user.refreshed")
    endpoint(world, "user.held")
    world.refresh()
    assert len(outbox(world)) == 300
    per = "SELECT count(DISTINCT payload ->> 'userId') FROM webhook_deliveries GROUP BY endpoint_id"
    assert [row["count"] for row in world.rows(per)] == [150, 150]
    assert world.value("SELECT count(DISTINCT message_id) FROM webhook_deliveries") == 300


def test_whoever_falls_due_under_hold_is_told_of_once(world: World) -> None:
    ada = world.user(credit_refresh_hold=True, hold_for="90 days")
    world.sql.execute("UPDATE users SET hold_reason = 'fraud check' WHERE id = %s", (ada,))
    endpoint(world, "user.held", "user.refreshed")
    for _ in range(3):
        world.refresh()
    (payload,) = told(world, "user.held")
    user = world.see(ada)
    assert payload["userId"] == "ada"
    assert (payload["creditBalance"], payload["holdReason"]) == (400, "fraud check")
    assert payload["holdUntil"] == iso(world, user["hold_until"])
    assert payload["windowStart"] == iso(world, user["next_refresh_at"])
    assert told(world, "user.refreshed") == []


@pytest.mark.parametrize("trigger", [TRIGGER, DEFERRED], ids=["trigger", "deferred constraint trigger"])
def test_whose_grant_is_undone_is_told_of_by_nobody(world: World, trigger: str) -> None:
    world.users(20)
    poison(world, "user-7", "user-13", trigger=trigger)
    endpoint(world, "user.refreshed", "run.finished", "notice.run_failed")
    run = world.refresh()
    assert (run.status, run.users_refreshed, run.users_failed) == ("partial", 18, 2)
    names = {payload["userId"] for payload in told(world, "user.refreshed")}
    assert len(told(world, "user.refreshed")) == len(names) == 18
    assert not names & {"user-7", "user-13"}
    for type_ in ("run.finished", "notice.run_failed"):
        (payload,) = told(world, type_)
        assert (payload["status"], payload["usersFailed"]) == ("partial", 2)


def test_a_batch_of_all_or_none_that_fails_tells_nothing(world: World) -> None:
    world.users(20)
    poison(world, "user-7")
    endpoint(world, "user.refreshed")
    run = world.scan(atomic=True)
    world.work(world.claim(run))
    assert world.progress(run).status == "failed"
    assert outbox(world) == []
    world.sql.execute("DROP TRIGGER host_says_no ON users")
    again = world.scan(atomic=True)
    world.work(world.claim(again))
    assert len(told(world, "user.refreshed")) == 20


def test_delivered_twice_a_batch_tells_once(world: World) -> None:
    world.users(5)
    endpoint(world, "user.refreshed", "run.finished")
    ids = world.claim(world.scan())
    for _ in range(3):
        world.work(ids)
    assert len(told(world, "user.refreshed")) == 5
    assert len(told(world, "run.finished")) == 1


def test_an_endpoint_that_is_being_removed_keeps_no_batch_waiting_and_fails_none(world: World) -> None:
    """There is no foreign key: a grant has no business with the endpoint's row."""
    world.users(5)
    endpoint(world, "user.refreshed")
    run = world.scan()
    ids = world.claim(run)
    with world.host() as admin:
        admin.execute("DELETE FROM webhook_endpoints")
        world.sql.execute("SET lock_timeout = '1s'")
        with world.database.statements() as connection:
            connection.execute("SET lock_timeout = '1s'")
            (pending,) = pending_batches(connection, ids)
            assert pending.tells
            done = do_batch(connection, pending)
    assert done is not None
    assert done.users_refreshed == 5


def test_an_apply_tells_what_it_grants(world: World) -> None:
    world.users(5)
    endpoint(world, "user.refreshed", "run.finished")
    planned = applying.plan(world)
    assert told(world, "user.refreshed") == []
    applied = applying.applied(world, planned)
    assert applied.users_refreshed == 5
    assert {payload["runId"] for payload in told(world, "user.refreshed")} == {str(applied.run_id)}
    finished = {payload["kind"]: payload for payload in told(world, "run.finished")}
    assert (finished["refresh"]["dryRun"], finished["apply"]["dryRun"]) == (True, False)
    assert finished["apply"]["parentRunId"] == str(planned)


def test_a_rollback_tells_that_it_ended(world: World) -> None:
    world.users(5)
    run = rollbacks.refresh(world)
    endpoint(world, "user.refreshed", "run.finished")
    rollbacks.roll_back(world, run)
    (row,) = outbox(world)
    assert (row["type"], row["payload"]["kind"], row["payload"]["usersRefreshed"]) == ("run.finished", "rollback", 5)
    assert row["payload"]["creditsGranted"] < 0


def test_a_run_tells_that_it_ended_with_its_totals(world: World) -> None:
    world.users(120)
    endpoint(world, "run.finished", "notice.run_failed")
    run = world.scan(reason="a reason")
    ids = world.claim(run)
    world.work(ids[:1])
    assert outbox(world) == []
    world.work(ids[1:])
    (row,) = outbox(world)
    done = world.progress(run)
    stored = world.row("SELECT started_at, finished_at FROM credit_refresh_runs")
    assert row["type"] == "run.finished"
    assert row["payload"] == {
        "runId": str(run.run_id), "kind": "refresh", "work": "refresh", "source": "cli", "status": "succeeded",
        "dryRun": False, "slot": None, "parentRunId": None, "requestedBy": "test", "reason": "a reason",
        "usersSelected": 120, "usersRefreshed": 120, "usersHeld": 0, "usersSkipped": 0, "usersFailed": 0,
        "creditsGranted": done.credits_granted, "startedAt": iso(world, stored["started_at"]),
        "finishedAt": iso(world, stored["finished_at"]), "error": None, "correlationId": None,
    }  # fmt: skip


def test_a_run_that_finds_nobody_tells_nothing(world: World) -> None:
    endpoint(world, "run.finished", "notice.run_failed")
    run = world.scan()
    assert world.progress(run).status == "succeeded"
    assert outbox(world) == []


def test_of_two_who_end_a_run_at_once_one_tells(world: World) -> None:
    world.users(5)
    endpoint(world, "run.finished")
    run = world.scan()
    with world.database.statements() as connection:
        for pending in pending_batches(connection, world.claim(run)):
            do_batch(connection, pending)

    def finish() -> int:
        with world.database.statements() as connection:
            return len(totals.finish_runs(connection))

    with world.calls(*[finish] * 6) as calls:
        calls.start()
        assert sorted(calls.results()) == [0] * 5 + [1]
    assert len(outbox(world)) == 1


def test_a_cancelled_run_tells_so_where_the_cancelling_is_committed(world: World) -> None:
    world.users(5)
    endpoint(world, "run.finished", "notice.run_failed")
    run = world.scan()
    with world.host() as session:
        cancel.cancel_run(session, run.run_id, actor="kim", reason="no")
        session.rollback()
    assert outbox(world) == []
    with world.host() as session:
        cancel.cancel_run(session, run.run_id, actor="kim", reason="no")
    (row,) = outbox(world)
    assert (row["type"], row["payload"]["status"]) == ("run.finished", "cancelled")


def test_a_hosts_grant_that_is_rolled_back_tells_nothing(world: World) -> None:
    world.user("ada")
    endpoint(world, "user.refreshed")
    with world.host() as host:
        host.execute("SELECT refresh_credits_if_due('ada')")
        assert host.execute("SELECT count(*) FROM webhook_deliveries").fetchone() == (1,)
        host.rollback()
    assert outbox(world) == []


@pytest.mark.parametrize("statement", [TELL_MANY, TELL_ONE, TELL_ALL], ids=["many", "one", "all or none"])
def test_the_messages_text_is_inlined(world: World, statement: str) -> None:
    world.users(300)
    endpoint(world, "user.refreshed")
    world.scan()
    for name, value in (("batch_id", "1"), ("backoff_seconds", "5"), ("few", "10")):
        statement = statement.replace(f"%({name})s", value)
    plan = "\n".join(row["QUERY PLAN"] for row in world.rows(f"EXPLAIN (VERBOSE) {statement}"))
    assert "jsonb_build_object" in plan
    assert re.search(r"user_notice\(|utc_text\(", plan) is None
