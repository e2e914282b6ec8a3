"""A real worker drains a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.service import Service

USERS = 1_000


def test_a_worker_refreshes_all_due_users_once(service: Service, ledger: Ledger) -> None:
    ledger.add_due_users(USERS)
    run_id = service.scan()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
