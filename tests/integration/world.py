"""A fresh database and what the tests do to it: users, runs, and sessions that play the host app."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import psycopg
import pytest

from refresh import delivery, runs, totals
from refresh.closing import Outcome
from refresh.work import do_batch, pending_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from db import Database

DEADLINE_SECONDS = 20.0
T = TypeVar("T")

_USER = """
INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at, credit_refresh_hold, hold_until,
    custom_credit_amount, active)
VALUES (%(external_id)s, %(plan_code)s, %(credit_balance)s, now() + %(due_in)s::interval, %(credit_refresh_hold)s,
    now() + %(hold_for)s::interval, %(custom_credit_amount)s, %(active)s)
RETURNING id
"""


class Calls(Generic[T]):
    """Calls, each in a thread of its own, with their results or errors."""

    def __init__(self, *calls: Callable[[], T]) -> None:
        self._pool = ThreadPoolExecutor(len(calls))
        self._calls = calls
        self._futures: list[Future[T]] = []

    def start(self) -> None:
        self._futures = [self._pool.submit(call) for call in self._calls]

    def results(self) -> list[T]:
        return [future.result(DEADLINE_SECONDS) for future in self._futures]

    def close(self) -> None:
        self._pool.shutdown()


class Worker(Calls[list[Outcome]]):
    """A worker with one message."""

    def result(self) -> list[Outcome]:
        (outcomes,) = self.results()
        return outcomes


@dataclass(frozen=True)
class World:
    """A migrated database and what the tests do to it."""

    database: Database
    sql: psycopg.Connection[dict[str, Any]]
    """A connection of the test's own, in autocommit."""

    def rows(self, query: str, *parameters: object) -> list[dict[str, Any]]:
        return self.sql.execute(query, parameters).fetchall()

    def row(self, query: str, *parameters: object) -> dict[str, Any]:
        (row,) = self.rows(query, *parameters)
        return row

    def value(self, query: str, *parameters: object) -> Any:
        (value,) = self.row(query, *parameters).values()
        return value

    def user(self, external_id: str = "ada", *, due_in: str | None = "-1 hour", **columns: object) -> int:
        """A user of the free tier (1,000 credits) with 400 left, due an hour ago unless told otherwise."""
        values: dict[str, object] = {
            "external_id": external_id,
            "plan_code": "free",
            "credit_balance": 400,
            "due_in": due_in,
            "credit_refresh_hold": False,
            "hold_for": None,
            "custom_credit_amount": None,
            "active": True,
        }
        assert columns.keys() <= values.keys()
        row = self.sql.execute(_USER, {**values, **columns}).fetchone()
        assert row is not None
        return int(row["id"])

    def users(self, count: int, *, due_in: str = "-1 hour") -> None:
        self.sql.execute(
            """
            INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)
            SELECT 'user-' || n, 'free', n %% 1000, now() + %s::interval FROM generate_series(1, %s) AS n
            """,
            (due_in, count),
        )

    def restore(self, change: str, *parameters: object) -> None:
        """Change users past all triggers, as a restore of that table alone does."""
        self.sql.execute("SET session_replication_role = replica")
        self.sql.execute(change, parameters)
        self.sql.execute("RESET session_replication_role")

    def see(self, user_id: int) -> dict[str, Any]:
        return self.row("SELECT * FROM users WHERE id = %s", user_id)

    def history(self, user_id: int) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM credit_refresh_histories WHERE user_id = %s ORDER BY id", user_id)

    def audit(self, user_id: int) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM credit_audit_logs WHERE user_id = %s ORDER BY occurred_at, id", user_id)

    def open(self, **request: Any) -> runs.Opened | runs.NotOpened:
        asked = runs.Request(**{"source": "cli", "requested_by": "test", "batch_size": 100, **request})
        with self.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            return runs.open_run(connection, asked)

    def scan(self, **request: Any) -> runs.Opened:
        opened = self.open(**request)
        assert isinstance(opened, runs.Opened), opened
        return opened

    def claim(self, run: runs.Opened | None = None, *, max_attempts: int = 5, ring_again: bool = False) -> list[int]:
        run_id = run.run_id if run else None
        with self.database.transaction() as connection:
            return sorted(
                batch_id
                for scheduled in (True, False)
                for batch_id in delivery.claim_batches(
                    connection,
                    delivery.Claim(
                        scheduled=scheduled, max_attempts=max_attempts, run_id=run_id, ring_again=ring_again
                    ),
                )
            )

    def work(self, batch_ids: list[int]) -> list[Outcome]:
        """Do what a worker does with a message."""
        with self.database.statements() as connection:
            outcomes = [do_batch(connection, pending) for pending in pending_batches(connection, batch_ids)]
            totals.finish_runs(connection, {done.run_id for done in outcomes if done})
        return [outcome for outcome in outcomes if outcome]

    def scheduled(self, **options: Any) -> runs.Opened | runs.NotOpened:
        """Beat's scan."""
        asked = {"interval": timedelta(hours=1), "cron": None, "batch_size": 100, "dry_run": False, **options}
        with self.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            return runs.open_scheduled_run(connection, **asked)

    def refresh(self, **request: Any) -> totals.Progress:
        """A scan from its opening to its end."""
        run = self.scan(**request)
        self.work(self.claim(run))
        return self.progress(run)

    def progress(self, run: runs.Opened) -> totals.Progress:
        with self.database.statements() as connection:
            return totals.read_progress(connection, run.run_id)

    @contextmanager
    def host(self) -> Iterator[psycopg.Connection[Any]]:
        """A session of the host app's, in a transaction that the test ends."""
        with psycopg.connect(self.sql.info.dsn, application_name="host", options="-c search_path=credits") as host:
            yield host

    @contextmanager
    def background(self, batch_ids: list[int]) -> Iterator[Worker]:
        """A worker in a thread, which the test starts when it likes; its work is over when the block is."""
        worker = Worker(lambda: self.work(batch_ids))
        with closing(worker):
            yield worker

    @contextmanager
    def calls(self, *calls: Callable[[], T]) -> Iterator[Calls[T]]:
        """Calls at the same time, which the test starts when it likes."""
        made = Calls(*calls)
        with closing(made):
            yield made

    def waiting(self, application: str) -> int:
        """How many sessions of that name wait for a lock right now."""
        return int(
            self.value(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
                " AND wait_event_type = 'Lock'",
                application,
            )
        )

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not in {DEADLINE_SECONDS:.0f} seconds: {what}")
            time.sleep(0.005)
