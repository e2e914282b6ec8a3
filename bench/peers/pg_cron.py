"""What pg_cron would call: everybody in one statement and one transaction, on one connection.

The same statement over one batch of all users. No second core works on it, every user stays locked until its end,
one user whom the database refuses undoes all, and a crash begins it anew.
"""

from __future__ import annotations

import time

from db import Database, transaction
from refresh import runs, totals
from refresh.batch import GRANT_MANY
from refresh.closing import close_batch


def refresh_by_one_call(url: str, users: int) -> float:
    """Refresh everybody; returns the seconds from the scan's start to the run's finish."""
    with Database(url, "credits").statements() as connection:
        connection.execute("SET statement_timeout = 0")
        started = time.perf_counter()
        with transaction(connection):
            runs.open_run(connection, runs.Request("cli", "bench", users))
        rows = connection.execute("SELECT id FROM credit_refresh_batches").fetchall()
        for (batch_id,) in rows:
            close_batch(connection, batch_id, GRANT_MANY)
        totals.finish_runs(connection)
        return time.perf_counter() - started
