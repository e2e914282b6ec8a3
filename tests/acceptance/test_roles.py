"""A worker whose role has the workers' rights alone does all that workers do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from celeryconfig import TaskNames
from tests import roles
from tests.integration.forked import credits  # noqa: A004
from tests.integration.test_isolation import RAISES, TRIGGER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from db import Database
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.service import Service

USERS = 300
NEXT_PARTITION = """SELECT to_char(now() + interval '1 month', '"credit_refresh_histories_y"YYYY"m"MM')"""


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str], database: Database) -> Iterator[dict[str, str]]:
    with database.statements() as connection, roles.made(connection, "worker") as role:
        yield default_worker_env | {"DATABASE_URL": roles.url(default_worker_env["DATABASE_URL"], role)}


def ask(service: Service, *arguments: str) -> Any:
    """What a command answers that runs beside the worker, as its role."""
    done = credits([*arguments, "--json"], service.env)
    assert done.returncode in {0, 3}, done
    return json.loads(done.stdout)


def test_it_scans_grants_isolates_rolls_back_retries_and_keeps_house(service: Service, ledger: Ledger) -> None:
    partition = ledger.value(NEXT_PARTITION)
    ledger.execute(f"DROP TABLE {partition}")
    ledger.add_due_users(USERS)
    ledger.execute("UPDATE users SET email = 'poison' WHERE external_id = 'user-7'")
    ledger.execute(RAISES)
    ledger.execute(TRIGGER)
    run_id = service.scan()
    service.until_finished(run_id)
    assert ledger.run_status(run_id) == "partial"
    granted = "SELECT count(*) FROM credit_refresh_histories WHERE status = 'refreshed' AND reversed_by_run_id IS NULL"
    assert ledger.value(granted) == USERS - 1

    ledger.execute("DROP TRIGGER host_says_no ON users")
    assert ask(service, "runs", "retry", str(run_id), "--yes", "--wait")["usersRefreshed"] == 1
    assert ledger.value(granted) == USERS
    assert ask(service, "runs", "rollback", str(run_id), "--yes", "--wait", "--reason", "x")["usersFailed"] == 0
    assert ledger.value(granted) == 1
    everybody = ("bulk-refresh", "--all", "--force", "--reason", "x", "--yes", "--wait")
    assert ask(service, *everybody, "--dry-run")["usersSelected"] == USERS
    assert ask(service, *everybody)["usersRefreshed"] == USERS
    assert ask(service, "hold", "user-1", "--reason", "x")["changed"]
    assert ask(service, "release", "user-1")

    service.send(TaskNames.UPKEEP)
    missing = "SELECT to_regclass(%s) IS NULL"
    service.until(lambda: not ledger.value(missing, partition), "upkeep made the partition that was missing")
    owners = "SELECT count(DISTINCT relowner) FROM pg_class WHERE relnamespace = 'credits'::regnamespace"
    assert ledger.value(owners) == 1

    service.send(TaskNames.RETENTION)
    service.send(TaskNames.VERIFY)
    verified = "SELECT count(*) FROM credit_audit_logs WHERE action = 'verified'"
    service.until(lambda: ledger.value(verified) == 1, "the auditor has been through")
    logs = service.worker.logs()
    assert "Verified: " in logs
    assert "permission denied" not in logs
    assert "must be owner" not in logs
    # But for the user whom the host refused.
    assert "Traceback" not in logs
