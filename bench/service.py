"""The product: a scan through Celery, a broker and two worker processes."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from unittest.mock import patch

from bench.worlds import SLOT
from cli.processes import Service
from db import Database, one, transaction
from embedded import Servers
from embedded.processes import Supervisor
from refresh import delivery, runs
from tasks.app import app, use_broker
from tasks.publish import publish_asked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from uuid import UUID

WORKERS = 2
PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Scanned:
    """A run that was opened and published."""

    run_id: UUID
    opening_seconds: float
    publishing_seconds: float


def refresh_by_service(
    running: Servers, url: str, *, events: bool, ids_a_message: int = delivery.MESSAGE_IDS_MAX
) -> float:
    """Refresh everybody; returns the seconds from the scan's start to the run's finish, publishing included.

    Args:
        running: the servers; the broker may be RabbitMQ where CELERY_BROKER_URL names it too (brokers.py).
        url: the database.
        events: whether workers send task events, as Flower needs them.
        ids_a_message: how many batches a message carries at most.
    """
    with workers(running, url, events=events) as supervisor:
        with patch.object(delivery, "MESSAGE_IDS_MAX", ids_a_message):
            scanned = scan(url)
        return run_seconds(url, scanned.run_id, supervisor)


@contextmanager
def workers(running: Servers, url: str, *, events: bool = False) -> Iterator[Supervisor]:
    """Two workers over a database, ready for work."""
    servers = Servers(database_url=url, redis_url=running.redis_url, state=running.state)
    variables = {
        "CREDIT_REFRESH_TASK_EVENTS": str(events).lower(),
        "CREDIT_REFRESH_INTERVAL_HOURS": str(SLOT // timedelta(hours=1)),
        "LOG_LEVEL": "WARNING",
    }
    with Supervisor() as supervisor:
        service = Service(supervisor, servers, logs=running.state, **variables)
        for number in range(1, WORKERS + 1):
            service.start_worker(f"worker{number}")
        use_broker(running.redis_url)
        if app.conf.broker_write_url != running.redis_url:
            raise SystemExit("CELERY_BROKER_URL is set, and Celery would publish there: unset it")
        await_workers(supervisor)
        yield supervisor


def open_timed(database: Database, as_of: datetime | None = None) -> tuple[runs.Opened, float]:
    """Open a run over all who are due, or were then; returns it with the seconds of its transaction."""
    with database.statements() as connection:
        started = time.perf_counter()
        with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
            run = runs.open_run(connection, runs.Request("cli", "bench", 100, as_of=as_of))
        seconds = time.perf_counter() - started
    if not isinstance(run, runs.Opened):
        raise SystemExit(run.text)
    return run, seconds


def scan(url: str, as_of: datetime | None = None) -> Scanned:
    """Open a run and publish it to the broker of `use_broker()`."""
    database = Database(url, "credits", pool=2)  # as a worker has it
    try:
        run, opening_seconds = open_timed(database, as_of)
        started = time.perf_counter()
        publish_asked(database, run.run_id, max_attempts=5)
        return Scanned(run.run_id, opening_seconds, time.perf_counter() - started)
    finally:
        database.close()


def await_workers(supervisor: Supervisor) -> None:
    """Until all of them answer."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(app.control.ping(timeout=1.0) or ()) < WORKERS:
        _check(supervisor, deadline)


def run_seconds(url: str, run_id: UUID, supervisor: Supervisor) -> float:
    """The run's own time, from its scan to its finish, once it has one."""
    query = "SELECT extract(epoch FROM finished_at - started_at)::float FROM credit_refresh_runs WHERE id = %s"
    deadline = time.monotonic() + PATIENCE_SECONDS
    with Database(url, "credits").statements() as connection:
        while (seconds := one(connection.execute(query, (run_id,)))[0]) is None:
            _check(supervisor, deadline)
            time.sleep(0.1)
    return float(seconds)


def _check(supervisor: Supervisor, deadline: float) -> None:
    ended = supervisor.check()
    if ended is not None or time.monotonic() > deadline:
        raise SystemExit(f"the benchmark's workers did not do it: {ended or 'no end in sight'}")
