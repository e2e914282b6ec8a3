"""The product: a scan through Celery, Redis and two worker processes."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING
from unittest.mock import patch

from bench.worlds import SLOT
from cli.processes import Service
from db import Database, one
from embedded import Servers
from embedded.processes import Supervisor
from refresh import delivery, runs
from tasks.app import app, use_broker
from tasks.publish import publish_batches

if TYPE_CHECKING:
    from psycopg import Connection

WORKERS = 2
PATIENCE_SECONDS = 600.0


def refresh_by_service(
    running: Servers, url: str, *, events: bool, ids_a_message: int = delivery.MESSAGE_IDS_MAX
) -> float:
    """Refresh everybody; returns the seconds from the scan's start to the run's finish, publishing included.

    Args:
        running: the servers.
        url: the database.
        events: whether workers send task events, as Flower needs them.
        ids_a_message: how many batches a message carries at most.
    """
    servers = Servers(database_url=url, redis_url=running.redis_url, state=running.state)
    variables = {
        "CREDIT_REFRESH_TASK_EVENTS": str(events).lower(),
        "CREDIT_REFRESH_INTERVAL_HOURS": str(SLOT // timedelta(hours=1)),
        "LOG_LEVEL": "WARNING",
    }
    with Supervisor() as supervisor, Database(url, "credits").statements() as connection:
        service = Service(supervisor, servers, logs=running.state, **variables)
        for number in range(1, WORKERS + 1):
            service.start_worker(f"worker{number}")
        use_broker(running.redis_url)
        _until_ready(supervisor)
        database = Database(url, "credits")
        with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as opening:
            run = runs.open_run(opening, runs.Request("cli", "bench", 100))
        if not isinstance(run, runs.Opened):
            raise SystemExit(run.text)
        with patch.object(delivery, "MESSAGE_IDS_MAX", ids_a_message):
            publish_batches(database, max_attempts=5, run_id=run.run_id)
        return _seconds(connection, supervisor)


def _until_ready(supervisor: Supervisor) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(app.control.ping(timeout=1.0) or ()) < WORKERS:
        _check(supervisor, deadline)


def _seconds(connection: Connection, supervisor: Supervisor) -> float:
    """The run's own time, from its scan to its finish, once it has one."""
    query = "SELECT extract(epoch FROM finished_at - started_at)::float FROM credit_refresh_runs WHERE slot IS NULL"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (seconds := one(connection.execute(query))[0]) is None:
        _check(supervisor, deadline)
        time.sleep(0.1)
    return float(seconds)


def _check(supervisor: Supervisor, deadline: float) -> None:
    ended = supervisor.check()
    if ended is not None or time.monotonic() > deadline:
        raise SystemExit(f"the benchmark's workers did not do it: {ended or 'no end in sight'}")
