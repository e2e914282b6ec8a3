"""Messages that come twice. Those that are none of ours: test_refused_messages.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celeryconfig import TaskNames

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
