"""A run of one user, done where it was opened: no broker, no worker.

The run is like any other: if the process dies before its end, upkeep publishes what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import class_row

from db import one_line
from refresh import delivery, totals
from refresh.work import do_batch, pending_batches

if TYPE_CHECKING:
    from uuid import UUID

LOCK_ATTEMPTS = 8
LOCK_PAUSE_SECONDS = 0.25
"""How often a user is tried whom a host has locked. Each attempt waits up to `lock_timeout`, half a second: six seconds
in all, where a host's transaction takes milliseconds."""

_PENDING = "SELECT id FROM credit_refresh_batches WHERE run_id = %(run_id)s AND status = 'pending' ORDER BY id"
_PAUSE = "SELECT pg_sleep(%s)"


def do_at_once(connection: psycopg.Connection[Any], run_id: UUID, *, attempts: int = LOCK_ATTEMPTS) -> str | None:
    """Do what is left of a run, and end it.

    Args:
        connection: in autocommit.
        run_id: a run of few users, committed.
        attempts: how often a user is tried whom somebody has locked.

    Returns:
        Why something is left, for people: upkeep and the workers go on with it. None when the run has ended.

    Raises:
        psycopg.Error: the connection is gone; upkeep and the workers go on.
    """
    error = None
    for _ in range(attempts):
        ids = [id_ for (id_,) in connection.execute(_PENDING, {"run_id": run_id})]
        if not ids:
            break
        if error is not None:
            connection.execute(_PAUSE, (LOCK_PAUSE_SECONDS,))
        for pending in pending_batches(connection, ids):
            try:
                do_batch(connection, pending)
            except psycopg.errors.LockNotAvailable:
                error = "another session has the user locked"
            except psycopg.Error as failure:
                if connection.closed:
                    raise
                delivery.record_failure(connection, pending.id, one_line(failure))
                return one_line(failure)
    totals.finish_runs(connection, [run_id])
    if totals.read_progress(connection, run_id).status != "running":
        return None
    return error or "a worker has it"


@dataclass(frozen=True, slots=True)
class Granted:
    """What a run's history says of one user.

    Attributes:
        status: `refreshed`, `planned`, `held` or `failed`.
        target: the amount aimed at.
        window_end: None for a forced grant outside any grid.
        reversed: a rollback has taken it back since.
    """

    status: str
    target: int | None
    balance_before: int
    credits_added: int
    balance_after: int
    window_start: datetime
    window_end: datetime | None
    error: str | None
    reversed: bool


# A branch for each of the indexes.
_COLUMNS = """
    status, target, old_balance AS balance_before, credits_added, new_balance AS balance_after, window_start,
    window_end, error, reversed_by_run_id IS NOT NULL AS reversed
"""
_GRANTED = f"""
SELECT {_COLUMNS} FROM credit_refresh_histories
WHERE user_id = %(user_id)s AND run_id = %(run_id)s AND status = 'refreshed' AND reversed_by_run_id IS NULL
UNION ALL
SELECT {_COLUMNS} FROM credit_refresh_histories
WHERE user_id = %(user_id)s AND run_id = %(run_id)s AND status = 'refreshed' AND reversed_by_run_id IS NOT NULL
UNION ALL
SELECT {_COLUMNS} FROM credit_refresh_histories
WHERE user_id = %(user_id)s AND run_id = %(run_id)s AND status <> 'refreshed'
LIMIT 1
"""  # noqa: S608 - a text of this module alone


def read_granted(connection: psycopg.Connection[Any], run_id: UUID, user_id: int) -> Granted | None:
    """What a run has recorded of a user; None while it has not, and when they were left out."""
    with connection.cursor(row_factory=class_row(Granted)) as cursor:
        return cursor.execute(_GRANTED, {"run_id": run_id, "user_id": user_id}).fetchone()
