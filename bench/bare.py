"""The yardstick: the product's own batch statement in a bare psycopg loop, two processes with a connection each.

Beside it, in the same loop, the least that a statement can do and still write the same rows (leanest.sql).
"""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from db import Database
from refresh import runs, totals
from refresh.batch import GRANT_MANY
from refresh.closing import close_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.synchronize import Barrier
    from uuid import UUID

    from refresh.selection import Selection

CONNECTIONS = 2
BATCH_SIZE = 100
PATIENCE_SECONDS = 1_800.0
_BATCHES = "SELECT id FROM credit_refresh_batches WHERE run_id = %s ORDER BY id"
LEANEST = (Path(__file__).parent / "leanest.sql").read_text()
# A database that is measured again has earlier runs.
_PENDING = "SELECT id FROM credit_refresh_batches WHERE status = 'pending' ORDER BY id"


def open_due(database: Database) -> list[int]:
    """Open a run over all who are due; returns its batches."""
    with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        run = runs.open_run(connection, runs.Request("cli", "bench", BATCH_SIZE))
    if not isinstance(run, runs.Opened):
        raise SystemExit(run.text)
    with database.statements() as connection:
        return [id_ for (id_,) in connection.execute(_PENDING).fetchall()]


def refresh_alone(database: Database, request: runs.Request, asked: Selection | None = None) -> runs.Opened:
    """Open a run and do all of its batches on one connection; for what is measured around that."""
    with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        run = runs.open_run(connection, request, asked)
    if not isinstance(run, runs.Opened):
        raise SystemExit(run.text)
    with database.statements() as connection:
        for (batch_id,) in connection.execute(_BATCHES, (run.run_id,)).fetchall():
            close_batch(connection, batch_id, GRANT_MANY)
        totals.finish_runs(connection, [run.run_id])
    return run


def refresh_bare(url: str, *, statement: str = GRANT_MANY, change: str = "SELECT 1") -> float:
    """Refresh everybody; returns the seconds of the loops alone, without the scan and without any message.

    Args:
        url: the database.
        statement: another than the product's.
        change: SQL to be run between the scan and the loops: what the database is to be without.
    """
    database = Database(url, "credits")
    batch_ids = open_due(database)
    with database.statements() as connection:
        connection.execute(change)
    seconds = _in_two_loops(partial(_grant, statement), url, batch_ids)
    with database.statements() as connection:
        totals.finish_runs(connection)
    return seconds


def refresh_leanest(url: str, *, statement: str = LEANEST) -> float:
    """Refresh everybody by the leanest statement, without a run or a batch; returns the seconds of the loops alone."""
    with Database(url, "credits").statements() as connection:
        ids = [id_ for (id_,) in connection.execute("SELECT id FROM users ORDER BY id").fetchall()]
    shares = [(ids[at : at + BATCH_SIZE], uuid4()) for at in range(0, len(ids), BATCH_SIZE)]
    return _in_two_loops(partial(_grant_leanest, statement), url, shares)


def _in_two_loops(loop: Callable[..., None], url: str, work: Sequence[object]) -> float:
    # Spawned, not forked: a psycopg connection does not survive a fork. Neither the start of an interpreter nor its end
    # is measured: the loops meet before and after.
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(CONNECTIONS + 1, timeout=PATIENCE_SECONDS)
    loops = [
        context.Process(target=loop, args=(url, work[number::CONNECTIONS], together)) for number in range(CONNECTIONS)
    ]
    for process in loops:
        process.start()
    together.wait()
    started = time.perf_counter()
    together.wait()
    seconds = time.perf_counter() - started
    for process in loops:
        process.join()
    return seconds


def _grant(statement: str, url: str, batch_ids: list[int], together: Barrier) -> None:
    with Database(url, "credits").statements() as connection:
        together.wait()
        for batch_id in batch_ids:
            close_batch(connection, batch_id, statement)
        together.wait()


def _grant_leanest(statement: str, url: str, shares: list[tuple[list[int], UUID]], together: Barrier) -> None:
    with Database(url, "credits").statements() as connection:
        together.wait()
        for user_ids, run_id in shares:
            connection.execute(statement, {"user_ids": user_ids, "run_id": run_id}, prepare=True)
        together.wait()
