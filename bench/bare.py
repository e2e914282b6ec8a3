"""The yardstick: the product's own batch statement in a bare psycopg loop, two processes with a connection each."""

from __future__ import annotations

import multiprocessing
import time
from typing import TYPE_CHECKING

from db import Database
from refresh import runs, totals
from refresh.batch import GRANT_MANY
from refresh.closing import close_batch

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

CONNECTIONS = 2


def refresh_bare(url: str) -> float:
    """Refresh everybody; returns the seconds of the loops alone, without the scan and without any message."""
    database = Database(url, "credits")
    with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        run = runs.open_run(connection, runs.Request("cli", "bench", 100))
    if not isinstance(run, runs.Opened):
        raise SystemExit(run.text)
    with database.statements() as connection:
        ids = [id_ for (id_,) in connection.execute("SELECT id FROM credit_refresh_batches ORDER BY id").fetchall()]
    # Spawned, not forked: a psycopg connection does not survive a fork.
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(CONNECTIONS + 1)
    loops = [
        context.Process(target=_loop, args=(url, ids[number::CONNECTIONS], ready)) for number in range(CONNECTIONS)
    ]
    for loop in loops:
        loop.start()
    ready.wait()
    started = time.perf_counter()
    for loop in loops:
        loop.join()
    seconds = time.perf_counter() - started
    with database.statements() as connection:
        totals.finish_runs(connection)
    return seconds


def _loop(url: str, batch_ids: list[int], ready: Barrier) -> None:
    with Database(url, "credits").statements() as connection:
        ready.wait()
        for batch_id in batch_ids:
            close_batch(connection, batch_id, GRANT_MANY)
