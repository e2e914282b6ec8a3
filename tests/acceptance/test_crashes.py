"""Workers that die with a batch, and messages that are lost: another worker finishes the run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit, urlunsplit

from celeryconfig import QueueNames, TaskNames
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.service import Service

ONE_BATCH = 100
TEN_BATCHES = 1_000
FORTY_BATCHES = 4_000
NO_TURNS = "SELECT paced_until < now() - interval '1 second' FROM credit_refresh_runs WHERE id = %s"
"""The run is paced, and what waits for its turn is in hand."""


def test_the_server_completes_the_statement_of_a_killed_worker(service: Service, ledger: Ledger) -> None:
    """The statement is the transaction, so the server commits it by itself; all that is missing is the run's end."""
    ledger.add_due_users(ONE_BATCH)
    with ledger.gate() as gate:
        run_id = service.scan()
        service.until(lambda: len(gate.held()) == 1, "the worker is inside the batch")
        service.worker.kill()
        assert len(gate.held()) == 1
        ledger.assert_nothing_granted()
    service.until(lambda: ledger.batches("pending") == [], "the server committed the batch")
    assert ledger.run_status(run_id) == "running"
    other = service.start_worker()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    assert service.taken(TaskNames.BATCH, other) == 0


def test_another_worker_does_the_batch_of_a_killed_worker(service: Service, ledger: Ledger) -> None:
    """Here the server notices that its client is gone, and rolls back."""
    ledger.add_due_users(ONE_BATCH)
    with ledger.gate() as gate:
        run_id = service.scan()
        service.until(lambda: len(gate.held()) == 1, "the worker is inside the batch")
        service.worker.kill()
        (pid,) = gate.held()
        assert ledger.value("SELECT pg_terminate_backend(%s)", pid)
        service.until(lambda: gate.held() == [], "the server gave the batch up")
    ledger.assert_nothing_granted()
    assert service.waiting() == 0
    (batch_id,) = ledger.batches("pending")
    ledger.a_minute_passes()

    other = service.start_worker()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    assert service.taken(TaskNames.BATCH, other) == 1
    # The worker that died with it counts as an attempt.
    assert ledger.rows("SELECT id, status, attempts FROM credit_refresh_batches") == [(batch_id, "done", 1)]


def test_a_worker_outlives_its_connection_to_the_database(service: Service, ledger: Ledger) -> None:
    """As when PostgreSQL restarts: the failure cannot be noted, so the batch counts as lost."""
    ledger.add_due_users(ONE_BATCH)
    with ledger.gate() as gate:
        run_id = service.scan()
        service.until(lambda: len(gate.held()) == 1, "the worker is inside the batch")
        (pid,) = gate.held()
        assert ledger.value("SELECT pg_terminate_backend(%s)", pid)
        service.worker.wait_for_log("[CreditRefresh] Error refreshing credits")
    ledger.assert_nothing_granted()
    ledger.a_minute_passes()
    service.send(TaskNames.UPKEEP)
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)


def test_the_rest_of_a_run_is_done_by_another_worker(service: Service, ledger: Ledger) -> None:
    """Killed in the first of ten batches: the others' messages still wait."""
    ledger.add_due_users(TEN_BATCHES)
    with ledger.gate() as gate:
        run_id = service.scan()
        service.until(lambda: len(gate.held()) == 1, "the worker is inside a batch")
        service.worker.kill()
    other = service.start_worker()
    service.until(lambda: service.waiting() == 0, "the other worker took the messages")
    # Whatever the dead worker had fetched and not begun is lost; upkeep finds it as soon as it may.
    service.until(lambda: service.taken(TaskNames.UPKEEP, other) == 1, "the other worker looked around")
    ledger.a_minute_passes()
    service.send(TaskNames.UPKEEP)
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)


def test_messages_that_are_lost_are_published_again(service: Service, ledger: Ledger) -> None:
    ledger.add_due_users(TEN_BATCHES)
    with ledger.gate() as gate:
        run_id = service.scan()
        service.until(lambda: len(gate.held()) == 1, "the worker is inside a batch")
        service.until(lambda: service.redis.llen(QueueNames.BATCHES) == 9, "the others wait")
        assert service.redis.delete(QueueNames.BATCHES) == 1
    service.until(lambda: len(ledger.batches("done")) == 1, "the first batch is done")
    assert len(ledger.batches("pending")) == 9

    # Before its time nothing is called lost: the message may be in a worker's hands.
    service.send(TaskNames.UPKEEP)
    service.until(lambda: service.taken(TaskNames.UPKEEP, service.worker) == 2, "upkeep looked")
    assert ledger.value("SELECT sum(attempts) FROM credit_refresh_batches") == 0

    ledger.a_minute_passes()
    service.start_worker()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    assert ledger.rows("SELECT attempts, count(*) FROM credit_refresh_batches GROUP BY attempts ORDER BY attempts") == [
        (0, 1),
        (1, 9),
    ]


def test_a_worker_that_is_told_to_stop_finishes_its_batch(service: Service, ledger: Ledger) -> None:
    ledger.add_due_users(ONE_BATCH)
    with ledger.gate() as gate:
        run_id = service.scan()
        service.until(lambda: len(gate.held()) == 1, "the worker is inside the batch")
        service.worker.kill(signal.SIGTERM)
    service.until(lambda: service.worker.container.status == "exited", "the worker ended")
    assert service.worker.container.exit_code == 0
    ledger.assert_all_granted_once(run_id)


def test_a_worker_without_the_database_leaves_the_messages_to_others(service: Service, ledger: Ledger) -> None:
    """It fails each message in no time, where the others take milliseconds: unhindered, it would have most of them."""
    ledger.add_due_users(FORTY_BATCHES)
    url = urlsplit(service.env["DATABASE_URL"])
    with Proxy(Path(parse_qs(url.query)["host"][0]) / f".s.PGSQL.{url.port or 5432}") as proxy:
        cut_off = service.start_worker(
            DATABASE_URL=urlunsplit(url._replace(netloc=f"{url.username}@127.0.0.1:{proxy.port}", query=""))
        )
        with ledger.gate() as gate:
            run_id = service.scan()
            service.until(lambda: len(gate.held()) == 2, "both workers are inside a batch")
            proxy.cut()
        service.until(lambda: len(ledger.batches("pending")) <= 3, "the other one did the rest")
        service.until(lambda: ledger.value(NO_TURNS, run_id) is True, "the other one has nothing in hand")
        cut_off.kill()
    assert "The database cannot be reached" in cut_off.logs()
    ledger.a_minute_passes()
    service.start_worker()  # it looks around as it starts; a message might be given to the dead one
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
