"""A real worker drains a scan."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.service import Service

USERS = 1_000


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str]) -> dict[str, str]:
    return default_worker_env | {"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"}


def events(log: str, run_id: object) -> list[dict[str, Any]]:
    """The log lines that carry a run's id."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("run_id") == str(run_id)]


def test_a_worker_refreshes_all_due_users_once_and_says_so(service: Service, ledger: Ledger) -> None:
    credits_due = ledger.add_due_users(USERS)
    not_due = ledger.value(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)"
        " VALUES ('later', 'free', 1, now() + interval '1 hour') RETURNING id"
    )
    run_id = service.scan()
    service.until_finished(run_id)

    assert ledger.value("SELECT credit_balance FROM users WHERE id = %s", not_due) == 1
    ledger.execute("DELETE FROM users WHERE id = %s", not_due)
    ledger.assert_all_granted_once(run_id)
    assert ledger.rows("SELECT status, count(*), sum(attempts) FROM credit_refresh_batches GROUP BY status") == [
        ("done", 10, 0)
    ]

    service.worker.wait_for_log("Batch refresh completed")
    logged = events(service.worker.logs(), run_id)
    assert logged[0]["event"] == "[CreditRefresh] Starting batch refresh..."
    assert (logged[0]["users_selected"], logged[0]["batches_total"]) == (USERS, 10)
    assert logged[-1]["event"] == "[CreditRefresh] Batch refresh completed"
    totals = {key: logged[-1][key] for key in ("status", "users_refreshed", "users_failed", "credits_granted")}
    assert totals == {
        "status": "succeeded",
        "users_refreshed": USERS,
        "users_failed": 0,
        "credits_granted": credits_due,
    }
    granted = Counter(line["event"] for line in logged[1:-1] if line["level"] == "debug")
    assert granted == {
        f"[CreditRefresh] Successfully refreshed {1_000 - number % 1_000} credits for user user-{number}": 1
        for number in range(1, USERS + 1)
    }
