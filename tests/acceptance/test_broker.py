"""Redis loses everything in the middle of a run: late, but all, and nobody twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.ledger import Ledger
    from tests.acceptance.service import Service

USERS = 1_000


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str]) -> dict[str, str]:
    """With beat, whose upkeep comes as often as its scan."""
    return default_worker_env | {"CREDIT_REFRESH_INTERVAL_SECONDS": "2"}


@pytest.mark.parametrize("loss", ["restart", "flushall"])
def test_a_run_survives_the_loss_of_all_messages(service: Service, ledger: Ledger, tmp_path: Path, loss: str) -> None:
    ledger.add_due_users(USERS)
    service.start_beat(CREDITS_STATE_DIR=str(tmp_path))
    with ledger.gate() as gate:
        service.until(lambda: len(gate.held()) == 1, "the worker is inside a batch")
        (run_id,) = ledger.runs_with_users()
        if loss == "restart":
            service.broker.restart()
        else:
            service.redis.flushall()
        assert len(gate.held()) == 1
    service.until(lambda: len(ledger.batches("done")) >= 1, "the batch is done")
    assert ledger.run_status(run_id) == "running"

    ledger.a_minute_passes()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    assert ledger.value("SELECT count(*) FROM credit_refresh_batches WHERE attempts = 1") == 9
    # Beat and worker go on: another slot gets its run.
    runs = ledger.value("SELECT count(*) FROM credit_refresh_runs")
    service.until(lambda: ledger.value("SELECT count(*) FROM credit_refresh_runs") > runs, "the next slot has a run")
    assert ledger.runs_with_users() == [run_id]
