"""Delivery: what is lost is published again, what fails is retried a few times, what is done ends its run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from celeryconfig import QueueNames
from refresh import delivery, runs, totals
from refresh.switch import turn
from tasks.app import app, use_broker
from tasks.publish import messages_waiting, publish_asked, publish_queue

if TYPE_CHECKING:
    import embedded
    from tests.integration.world import World

LATER = "UPDATE credit_refresh_batches SET published_at = published_at - interval '31 seconds'"
BACKOFF_OVER = "UPDATE credit_refresh_batches SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL"


def upkeep(world: World, *, max_attempts: int = 3) -> list[int]:
    """What upkeep does between two looks at an empty queue; returns the batches that it publishes."""
    with world.database.statements() as connection:
        for scheduled in (True, False):
            delivery.record_losses(connection, scheduled=scheduled)
        delivery.give_up_batches(connection, max_attempts=max_attempts)
        totals.finish_runs(connection)
    return world.claim(max_attempts=max_attempts)


def test_a_batch_is_published_once_and_then_left_alone(world: World) -> None:
    world.users(150)
    run = world.scan()
    assert len(world.claim(run)) == 2
    assert world.claim(run) == []
    assert upkeep(world) == []


def test_a_scan_that_died_before_it_published_is_made_up_for(world: World) -> None:
    world.users(150)
    run = world.scan()
    ids = upkeep(world)
    assert len(ids) == 2
    world.work(ids)
    assert world.progress(run).status == "succeeded"
    assert world.value("SELECT max(attempts) FROM credit_refresh_batches") == 0


def test_a_lost_batch_is_published_again_and_counts_as_an_attempt(world: World) -> None:
    ada = world.user()
    run = world.scan()
    ids = world.claim(run)
    world.sql.execute(LATER)
    assert upkeep(world) == ids
    assert world.value("SELECT attempts FROM credit_refresh_batches") == 1
    world.work(ids)
    assert world.progress(run).status == "succeeded"
    assert len(world.history(ada)) == 1


def test_a_batch_in_a_workers_hands_is_not_lost_however_long_it_takes(world: World) -> None:
    ada = world.user()
    ids = world.claim(world.scan())
    world.sql.execute(LATER)
    with world.host() as host, world.background(ids) as worker:
        host.execute("UPDATE users SET credit_balance = 1 WHERE id = %s", (ada,))
        worker.start()
        world.until(lambda: world.waiting("test") == 1, "the batch waits for the host")
        assert upkeep(world) == []
        host.commit()
        worker.result()
    assert world.value("SELECT attempts FROM credit_refresh_batches") == 0


def test_with_messages_in_the_queue_a_batch_is_rung_for_much_later_and_it_is_nobodys_attempt(world: World) -> None:
    world.user()
    ids = world.claim(world.scan())
    world.sql.execute(LATER)
    assert world.claim(ring_again=True) == []
    world.sql.execute("UPDATE credit_refresh_batches SET published_at = now() - interval '11 minutes'")
    assert world.claim() == []  # the queue is long: it may well be in there
    assert world.claim(ring_again=True) == ids
    assert world.value("SELECT attempts FROM credit_refresh_batches") == 0


def test_a_run_is_rung_for_again_as_a_whole_so_that_its_order_tells_who_was_overtaken(world: World) -> None:
    world.users(4)
    ids = world.claim(world.scan(batch_size=1))
    older, younger = ids[:2], ids[2:]
    published = "UPDATE credit_refresh_batches SET published_at = now() - %s::interval WHERE id = ANY (%s)"
    world.sql.execute(published, ("11 minutes", older))
    world.sql.execute(published, ("9 minutes", younger))
    assert world.claim(ring_again=True) == []
    # By their first messages, while the others still wait in the queue.
    world.work(older)
    world.sql.execute("UPDATE credit_refresh_batches SET finished_at = now() - interval '31 s' WHERE status = 'done'")
    with world.database.statements() as connection:
        assert delivery.record_losses(connection, scheduled=False, queue_empty=False) == 0
    world.sql.execute(published, ("11 minutes", younger))
    assert world.claim(ring_again=True) == younger


def test_a_worker_that_dies_with_a_batch_each_time_makes_it_fail_after_so_many_attempts(world: World) -> None:
    ada = world.user()
    run = world.scan()
    deliveries = len(world.claim(run))
    for _ in range(5):
        world.sql.execute(LATER)
        deliveries += len(upkeep(world, max_attempts=3))
        world.sql.execute(BACKOFF_OVER)
        deliveries += len(upkeep(world, max_attempts=3))
    done = world.progress(run)
    assert deliveries == 3
    assert (done.status, done.users_failed, done.users_selected) == ("failed", 1, 1)
    assert done.error == "its worker died, or its message was lost"
    assert world.value("SELECT error FROM credit_refresh_runs") == done.error
    assert world.history(ada) == []
    assert world.scan().users_selected == 1  # due again


def test_a_failing_statement_is_retried_with_growing_pauses_then_given_up(world: World) -> None:
    ada = world.user()
    world.user("bob")
    run = world.scan()
    (batch_id,) = world.claim(run)
    pauses = []
    for _ in range(3):
        with world.database.statements() as connection:
            delivery.record_failure(connection, batch_id, "host trigger says no")
        pauses.append(
            world.value("SELECT round(extract(epoch FROM next_attempt_at - now())) FROM credit_refresh_batches")
        )
        assert world.claim() == []  # not before its time
        world.sql.execute(BACKOFF_OVER)
        upkeep(world, max_attempts=3)
    assert pauses == [10, 20, 40]
    done = world.progress(run)
    assert (done.status, done.users_failed, done.error) == ("failed", 2, "host trigger says no")
    assert world.see(ada)["credit_balance"] == 400


def test_a_retry_that_works_leaves_no_trace_of_the_failure_but_its_attempts(world: World) -> None:
    world.user()
    run = world.scan()
    (batch_id,) = world.claim(run)
    with world.database.statements() as connection:
        assert delivery.record_failure(connection, batch_id, "server closed the connection") == 1
    world.sql.execute(BACKOFF_OVER)
    world.work(upkeep(world))
    assert world.progress(run).status == "succeeded"
    row = world.row("SELECT attempts, error FROM credit_refresh_batches")
    assert (row["attempts"], row["error"]) == (1, None)


def test_a_failure_that_comes_after_somebody_else_did_the_batch_is_not_noted(world: World) -> None:
    world.user()
    (batch_id,) = world.claim(world.scan())
    world.work([batch_id])
    with world.database.statements() as connection:
        assert delivery.record_failure(connection, batch_id, "too late") == 0
    assert world.row("SELECT status, error FROM credit_refresh_batches") == {"status": "done", "error": None}


def test_what_the_broker_did_not_take_is_published_by_the_next_upkeep(world: World) -> None:
    world.user()
    ids = world.claim(world.scan())
    with world.database.statements() as connection:
        delivery.unclaim_batches(connection, ids)
    assert upkeep(world) == ids
    assert world.value("SELECT attempts FROM credit_refresh_batches") == 0


def test_some_batches_failed_and_some_done_is_partial(world: World) -> None:
    world.users(150)
    run = world.scan()
    first, second = world.claim(run)
    world.work([first])
    with world.database.statements() as connection:
        delivery.record_failure(connection, second, "boom")
    upkeep(world, max_attempts=1)
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_failed) == ("partial", 100, 50)
    totals = world.row("SELECT users_refreshed, users_failed, batches_total, status FROM credit_refresh_runs")
    assert totals == {"users_refreshed": 100, "users_failed": 50, "batches_total": 2, "status": "partial"}


@pytest.mark.parametrize("paused", [True, False])
def test_while_paused_nothing_is_published_or_counted(world: World, *, paused: bool) -> None:
    world.user()
    world.claim(world.scan())
    world.sql.execute(LATER)
    world.sql.execute("UPDATE settings SET enabled = %s", (not paused,))
    assert len(upkeep(world)) == (0 if paused else 1)
    assert world.value("SELECT attempts FROM credit_refresh_batches") == (0 if paused else 1)


def test_two_workers_that_close_the_last_two_batches_at_once_end_the_run_once(world: World) -> None:
    one, two = world.user("one"), world.user("two")
    run = world.scan(batch_size=1)
    ids = world.claim(run)
    with world.host() as host, world.calls(*(lambda id_=id_: world.work([id_]) for id_ in ids)) as both:
        host.execute("UPDATE users SET credit_balance = 0 WHERE id = ANY (%s)", ([one, two],))
        both.start()
        world.until(lambda: world.waiting("test") == 2, "both are in their batch")
        host.commit()
        both.results()
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.credits_granted) == ("succeeded", 2, 2_000)
    with world.database.statements() as connection:
        assert totals.finish_runs(connection) == []


def test_a_pause_is_nobodys_attempt(world: World) -> None:
    world.user()
    run = world.scan()
    ids = world.claim(run)
    with world.database.transaction() as connection:
        turn(connection, enabled=False, actor="test")
    assert world.work(ids) == []  # the worker puts it down
    with world.database.transaction() as connection:
        turn(connection, enabled=True, actor="test")
    world.sql.execute(LATER)
    assert upkeep(world, max_attempts=1) == ids
    world.work(ids)
    assert world.progress(run).status == "succeeded"


def test_resuming_waits_for_no_worker_that_has_a_batch(world: World) -> None:
    world.users(150)
    ids = world.claim(world.scan())
    with world.database.transaction() as connection:
        turn(connection, enabled=False, actor="test")
    with world.host() as worker:
        worker.execute("SELECT id FROM credit_refresh_batches WHERE id = %s FOR UPDATE", (ids[0],))
        with world.database.transaction(lock_timeout=timedelta(milliseconds=50)) as connection:
            assert turn(connection, enabled=True, actor="test")
        published = world.rows("SELECT id FROM credit_refresh_batches WHERE published_at IS NOT NULL")
        assert [row["id"] for row in published] == ids[:1]
        assert upkeep(world) == ids[1:]


def test_a_broker_that_is_gone_costs_a_delay_and_no_attempt(world: World) -> None:
    world.users(150)
    run = world.scan()
    use_broker("redis://127.0.0.1:1/0")
    assert publish_asked(world.database, run.run_id, max_attempts=5) == 0
    batches = world.rows("SELECT published_at, attempts FROM credit_refresh_batches")
    assert batches == [{"published_at": None, "attempts": 0}] * 2


def test_a_run_of_more_batches_than_are_claimed_at_once_is_published_whole(
    world: World, servers: embedded.Servers
) -> None:
    world.users(delivery.CLAIM_LIMIT + 1)
    run = world.scan(batch_size=1)
    use_broker(servers.redis_url)
    app.control.purge()  # other tests leave their messages in the same Redis
    try:
        assert publish_asked(world.database, run.run_id, max_attempts=5) == delivery.CLAIM_LIMIT + 1
        assert messages_waiting(QueueNames.BULK) == len(delivery.messages(list(range(delivery.CLAIM_LIMIT)))) + 1
    finally:
        app.control.purge()
    assert messages_waiting(QueueNames.BULK) == 0


def test_a_cancelled_run_gives_its_users_back(world: World) -> None:
    world.users(3)
    world.scan()
    world.sql.execute("UPDATE credit_refresh_runs SET status = 'cancelled', finished_at = now()")
    assert world.scan().users_selected == 3


def test_a_batch_that_may_not_be_tried_any_more_is_given_up_wherever_it_stands(world: World) -> None:
    world.user()
    run = world.scan()
    world.claim(run)
    world.sql.execute("UPDATE credit_refresh_batches SET attempts = 3, published_at = NULL")
    assert upkeep(world, max_attempts=3) == []
    assert world.progress(run).status == "failed"


def test_publishing_waits_while_the_queue_is_deep(
    world: World, servers: embedded.Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no room stays unpublished, and costs no attempt, until upkeep finds the queue shorter."""
    monkeypatch.setattr(delivery, "QUEUE_DEEP_MESSAGES", 3)
    users = 3 * delivery.MESSAGE_IDS_MAX + 2
    world.users(users)
    use_broker(servers.redis_url)
    app.control.purge()
    try:
        world.scan(batch_size=1)
        first = publish_queue(world.database, QueueNames.BULK, max_attempts=5)
        waiting = world.value("SELECT count(*) FROM credit_refresh_batches WHERE published_at IS NULL AND attempts = 0")
        assert (first, waiting) == (3 * delivery.MESSAGE_IDS_MAX, 2)
        assert messages_waiting(QueueNames.BULK) >= delivery.QUEUE_DEEP_MESSAGES
        assert publish_queue(world.database, QueueNames.BULK, max_attempts=5) == 0
        app.control.purge()
        assert publish_queue(world.database, QueueNames.BULK, max_attempts=5) == waiting
    finally:
        app.control.purge()


def test_each_kind_of_run_has_its_queue(world: World, servers: embedded.Servers) -> None:
    use_broker(servers.redis_url)
    app.control.purge()
    try:
        world.user("asked")
        world.scan()
        world.user("due")
        scheduled = world.scheduled()
        assert isinstance(scheduled, runs.Opened)
        assert scheduled.users_selected == 1
        for queue in QueueNames.WORK:
            assert publish_queue(world.database, queue, max_attempts=5) == 1
        assert [messages_waiting(queue) for queue in QueueNames.WORK] == [1, 1]
    finally:
        app.control.purge()
