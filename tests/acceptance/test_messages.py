"""Messages that come twice, name nothing, or are none at all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from celeryconfig import QueueNames, TaskNames

if TYPE_CHECKING:
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.service import Service

USERS = 100


def test_a_batch_that_is_delivered_again_grants_once(service: Service, ledger: Ledger) -> None:
    workers = service.worker, service.start_worker()
    ledger.add_due_users(USERS)
    with ledger.gate() as gate:
        run_id = service.scan()
        service.until(lambda: len(gate.held()) == 1, "a worker is inside the batch")
        (batch_id,) = ledger.batches("pending")
        service.send(TaskNames.BATCH, [batch_id])
        service.send(TaskNames.BATCH, [batch_id, batch_id])
        # The first worker is busy until the gate opens, so it is the other who takes them.
        service.until(lambda: service.waiting() == 0, "the other worker took both messages")
        assert len(gate.held()) == 1
        ledger.assert_nothing_granted()
    service.until_finished(run_id)
    assert service.taken(TaskNames.BATCH, *workers) == 3
    ledger.assert_all_granted_once(run_id)

    for _ in range(4):
        service.send(TaskNames.BATCH, [batch_id])
    service.until(lambda: service.taken(TaskNames.BATCH, *workers) == 7, "the late messages were taken")
    ledger.assert_all_granted_once(run_id)
    assert ledger.rows("SELECT status, attempts FROM credit_refresh_batches") == [("done", 0)]


def test_messages_with_other_arguments_do_no_harm(service: Service, ledger: Ledger) -> None:
    ledger.add_due_users(USERS)
    unknown: list[tuple[object, ...]] = [([10**15, 0, -1],), ([10**30],), ([],), (None,)]
    wrong: list[tuple[object, ...]] = [(), ("all",), (["one"],), ({"id": 1},), ([1], [2])]
    for arguments in unknown + wrong:
        service.send(TaskNames.BATCH, *arguments)
    sent = len(unknown) + len(wrong)
    service.until(lambda: service.taken(TaskNames.BATCH, service.worker) == sent, "the messages were taken")
    ledger.assert_nothing_granted()
    assert service.worker.logs().count("raised unexpected") == len(wrong)

    run_id = service.scan()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)


def test_messages_that_are_not_ours_are_discarded(service: Service, ledger: Ledger) -> None:
    ledger.add_due_users(USERS)
    foreign = [
        # Pickled, it could be code: `accept_content` refuses it.
        {"body": "gASVAAAu", "content-type": "application/x-python-serialize", "content-encoding": "binary"},
        {"body": "not json", "content-type": "application/json", "content-encoding": "utf-8"},
        {"body": "[[], {}, {}]", "content-type": "application/json", "content-encoding": "utf-8"},
    ]
    properties = {"delivery_tag": "1", "delivery_info": {"exchange": "", "routing_key": QueueNames.BATCHES}}
    for message in foreign:
        service.redis.lpush(QueueNames.BATCHES, json.dumps({"headers": {}, "properties": properties, **message}))
    service.send("tasks.no_such_task")
    service.until(lambda: service.waiting() == 0, "the messages were taken")

    run_id = service.scan()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    assert service.worker.container.status == "running"


def test_bytes_that_are_no_message_at_all_end_a_worker_and_no_run(service: Service, ledger: Ledger) -> None:
    """What kombu pops from Redis it unpacks before Celery can refuse it. The next start finds the bytes gone."""
    ledger.add_due_users(USERS)
    service.redis.lpush(QueueNames.BATCHES, b"\xff\x00 no JSON")
    service.until(lambda: service.worker.container.status == "exited", "the worker ended")
    assert service.worker.container.exit_code == 1

    service.worker.restart()
    run_id = service.scan()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
