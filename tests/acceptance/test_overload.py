"""The hourly refresh and a large run that somebody asked for, on one worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celeryconfig import QueueNames
from refresh import runs
from tasks.app import use_broker
from tasks.publish import publish_queue

if TYPE_CHECKING:
    from db import Database
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.service import Service

BULK_USERS = 20_000
BATCH_SIZE = 10
HOURLY_USERS = 1_000


def test_the_hourly_refresh_does_not_wait_behind_a_bulk_run(
    service: Service, ledger: Ledger, database: Database
) -> None:
    ledger.add_due_users(BULK_USERS)
    with database.transaction() as connection:
        bulk = runs.open_run(connection, runs.Request("cli", "test", BATCH_SIZE))
    assert isinstance(bulk, runs.Opened)
    ledger.execute(
        """
        INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)
        SELECT 'hourly-' || n, 'free', 0, now() - interval '1 hour' FROM generate_series(1, %s) AS n
        """,
        HOURLY_USERS,
    )
    with ledger.gate() as gate:
        use_broker(service.app.conf.broker_url)
        assert publish_queue(database, QueueNames.BULK, max_attempts=5) == BULK_USERS // BATCH_SIZE
        service.until(lambda: len(gate.held()) == 1, "the worker is busy with the bulk run")
        # The scan's message waits for the worker as well; whoever opens the slot, its batches come second.
        with database.transaction() as connection:
            hourly = runs.open_run(
                connection, runs.Request("beat", "beat", 100, slot=ledger.value("SELECT now() + interval '1 hour'"))
            )
        assert isinstance(hourly, runs.Opened)
        assert hourly.users_selected == HOURLY_USERS
        assert publish_queue(database, QueueNames.BATCHES, max_attempts=5) == HOURLY_USERS // 100
    service.until_finished(hourly.run_id)
    behind = ledger.value(
        """
        SELECT count(*) FROM credit_refresh_batches AS b
        WHERE run_id = %s AND (
            b.status = 'pending' OR b.finished_at > (SELECT finished_at FROM credit_refresh_runs WHERE id = %s)
        )
        """,
        bulk.run_id,
        hourly.run_id,
    )
    assert behind > BULK_USERS // BATCH_SIZE / 2
    service.until_finished(bulk.run_id)
    granted = ledger.rows(
        "SELECT count(*), count(DISTINCT user_id) FROM credit_refresh_histories WHERE status = 'refreshed'"
    )
    assert granted == [(BULK_USERS + HOURLY_USERS, BULK_USERS + HOURLY_USERS)]
