"""Paced runs by real workers: no second has more users than the pace allows, whatever happens to the workers.

The bounds are upper ones, which a slow machine cannot miss. A worker has one batch in hand: where turns are so many
seconds apart, what ends within a second began its turn within it, but for one batch of each worker, and the turn at
whose instant the second begins.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from celeryconfig import QueueNames, TaskNames
from refresh import runs
from refresh.cancel import cancel_run
from tasks.app import use_broker
from tasks.publish import publish_asked

if TYPE_CHECKING:
    from uuid import UUID

    from db import Database
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.service import Service

PACE = 2_000
USERS = 6_000
BATCH_SIZE = 100
WORKERS = 2


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str]) -> dict[str, str]:
    return {**default_worker_env, "CREDIT_REFRESH_MAX_USERS_PER_SECOND": str(PACE)}


def most_within_a_second(ledger: Ledger, run_id: object) -> int:
    """Users of the batches that ended within the busiest second, wherever that begins."""
    users: int = ledger.value(
        """
        SELECT max(within) FROM (
            SELECT sum(cardinality(user_ids)) OVER (
                ORDER BY finished_at RANGE BETWEEN CURRENT ROW AND interval '0.999999 seconds' FOLLOWING
            ) AS within
            FROM credit_refresh_batches WHERE run_id = %s
        ) AS seconds
        """,
        run_id,
    )
    return users


def asked_for(service: Service, ledger: Ledger, database: Database, users: int, pace: int) -> UUID:
    """A paced run that somebody asked for, published."""
    ledger.add_due_users(users)
    with database.transaction() as connection:
        run = runs.open_run(connection, runs.Request("cli", "test", BATCH_SIZE, max_users_per_second=pace))
    assert isinstance(run, runs.Opened)
    use_broker(service.app.conf.broker_url)
    publish_asked(database, run.run_id, max_attempts=5)
    return run.run_id


def test_a_scheduled_run_goes_no_faster_than_its_pace_though_a_worker_dies(service: Service, ledger: Ledger) -> None:
    victim = service.start_worker()
    ledger.add_due_users(USERS)
    run_id = service.scan()
    service.until(lambda: len(ledger.batches("done")) >= 10, "the run is under way")
    victim.kill()
    service.until(lambda: service.waiting() == 0, "the queue is empty")
    # What the dead worker had fetched is found by upkeep, once nobody has taken a turn for a while.
    before = service.taken(TaskNames.UPKEEP, service.worker)
    service.send(TaskNames.UPKEEP)
    service.until(
        lambda: service.taken(TaskNames.UPKEEP, service.worker) > before, "the worker has done what it had fetched"
    )
    ledger.a_minute_passes()
    service.send(TaskNames.UPKEEP)
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    assert ledger.value("SELECT max_users_per_second FROM credit_refresh_runs WHERE id = %s", run_id) == PACE
    assert most_within_a_second(ledger, run_id) <= PACE + (1 + WORKERS) * BATCH_SIZE
    seconds, attempts = ledger.rows(
        """
        SELECT extract(epoch FROM r.finished_at - r.started_at)::float, max(b.attempts)
        FROM credit_refresh_runs AS r JOIN credit_refresh_batches AS b ON b.run_id = r.id
        WHERE r.id = %s GROUP BY r.id
        """,
        run_id,
    )[0]
    assert seconds >= (USERS - BATCH_SIZE) / PACE
    assert attempts <= 1


def test_a_dead_workers_batches_are_done_before_the_runs_end(
    service: Service, ledger: Ledger, database: Database
) -> None:
    """While messages still wait: those that came behind them are done, so theirs are gone."""
    service.worker.kill()
    victim = service.start_worker()
    with ledger.gate() as gate:
        run_id = asked_for(service, ledger, database, 300, 30)
        service.until(lambda: len(gate.held()) == 1, "the worker is inside its first batch")
        victim.kill()
        (pid,) = gate.held()
        ledger.value("SELECT pg_terminate_backend(%s)", pid)
    service.start_worker()
    service.until(lambda: len(ledger.batches("done")) >= 3, "another worker goes on")
    ledger.execute(
        "UPDATE credit_refresh_batches SET finished_at = finished_at - interval '1 minute' WHERE status = 'done'"
    )
    assert service.redis.llen(QueueNames.BULK) > 0
    service.send(TaskNames.UPKEEP)
    service.until(lambda: ledger.value("SELECT max(attempts) FROM credit_refresh_batches") == 1, "upkeep missed them")
    assert ledger.run_status(run_id) == "running"
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    # None of those that merely waited was counted, and nobody overtook what was lost twice.
    counted = ledger.rows("SELECT seq FROM credit_refresh_batches WHERE attempts = 1 ORDER BY seq")
    assert [seq for (seq,) in counted] == list(range(len(counted)))
    assert len(counted) < 10


def test_a_worker_that_is_told_to_stop_does_the_batch_that_it_waits_for(
    service: Service, ledger: Ledger, database: Database
) -> None:
    run_id = asked_for(service, ledger, database, 5, 1)
    service.until(lambda: len(ledger.batches("done")) >= 1, "the first batch is done")
    service.worker.kill(signal.SIGTERM)
    service.until(lambda: service.worker.container.status == "exited", "the worker ended")
    assert service.worker.container.exit_code == 0
    done = len(ledger.batches("done"))
    assert ledger.value("SELECT count(*) FROM credit_refresh_histories WHERE run_id = %s", run_id) == done
    assert done < 5


def test_a_paced_run_leaves_a_worker_time_for_others(service: Service, ledger: Ledger, database: Database) -> None:
    bulk = asked_for(service, ledger, database, 200, 10)
    ledger.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at) VALUES"
        " ('hourly', 'free', 0, now() - interval '1 hour')"
    )
    hourly = None
    service.until(lambda: len(ledger.batches("done")) >= 1, "the paced run is under way")
    ledger.an_hour_passes()
    service.send(TaskNames.SCAN)
    service.until(lambda: len(ledger.runs_with_users()) == 2, "the scan opened a run")
    hourly = ledger.runs_with_users()[-1]
    service.until_finished(hourly)
    assert ledger.run_status(bulk) == "running"
    with database.transaction() as connection:
        cancelled = cancel_run(connection, bulk, actor="test", reason="test")
    assert cancelled.users > 0
    service.until(lambda: service.waiting() == 0, "the messages of a cancelled run are soon gone")
    done = ledger.value("SELECT sum(cardinality(user_ids)) FROM credit_refresh_batches WHERE status = 'done'")
    assert ledger.value("SELECT count(*) FROM credit_refresh_histories") == done
