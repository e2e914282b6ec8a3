"""CREDIT_REFRESH_ENABLED=false: a worker that does nothing, and says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from celeryconfig import TaskNames
from refresh import runs
from tests.acceptance.service import Service

if TYPE_CHECKING:
    from db import Database
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import Launcher
    from tests.acceptance.service import ServiceSetup

USERS = 100


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str]) -> dict[str, str]:
    return default_worker_env | {"CREDIT_REFRESH_ENABLED": "false"}


@pytest.fixture
def service(
    celery_setup: ServiceSetup, launcher: Launcher, default_worker_env: dict[str, str], ledger: Ledger
) -> Service:
    """Without the wait for the first slot, which is not taken here."""
    return Service(celery_setup, launcher, default_worker_env, ledger)


def test_a_worker_that_is_switched_off_opens_nothing_and_grants_nothing(
    service: Service, ledger: Ledger, database: Database
) -> None:
    ledger.add_due_users(USERS)
    service.send(TaskNames.SCAN)
    service.send(TaskNames.UPKEEP)
    service.worker.wait_for_log("Nothing to open: CREDIT_REFRESH_ENABLED is false")
    # The first upkeep was the worker's own, at its start.
    service.until(lambda: service.taken(TaskNames.UPKEEP, service.worker) == 2, "upkeep was taken")
    assert ledger.value("SELECT count(*) FROM credit_refresh_runs") == 0

    # A batch that a process elsewhere opened waits for a worker that is switched on.
    with database.transaction() as connection:
        runs.open_run(connection, runs.Request("cli", "test", batch_size=USERS))
    (batch_id,) = ledger.batches("pending")
    service.send(TaskNames.BATCH, [batch_id])
    service.until(lambda: service.taken(TaskNames.BATCH, service.worker) == 1, "the batch was taken")
    assert ledger.batches("pending") == [batch_id]
    ledger.assert_nothing_granted()
