"""The database's own limit: the product's batch statement through pgbench, which spends next to nothing itself."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path

from bench.bare import CONNECTIONS, open_due
from bench.worlds import libpq_url
from db import Database
from embedded.postgres_server import find_programs
from refresh import totals
from refresh.batch import GRANT_MANY
from refresh.closing import DEFERRED_BACKOFF_SECONDS, FEW_USERS
from settings import environment

# What db.py sets on the product's connections.
_OPTIONS = "-csearch_path=credits -ctimezone=UTC -cjit=off"

# Variables outlive a transaction, so each client walks over batches of its own.
_SCRIPT = """\\set step :step + 1
\\set batch_id :first + :step * :clients + :client_id
{statement};
"""


def refresh_by_pgbench(url: str) -> float:
    """Refresh everybody; returns the seconds from pgbench's start to its end.

    Raises:
        SystemExit: pgbench failed, or would not reach each batch.
    """
    database = Database(url, "credits")
    ids = open_due(database)
    if len(ids) % CONNECTIONS or ids != list(range(ids[0], ids[0] + len(ids))):
        raise SystemExit("pgbench walks over equal shares of consecutive batches: take an even number of hundreds")
    constants = {"backoff_seconds": DEFERRED_BACKOFF_SECONDS, "few": FEW_USERS, "batch_id": ":batch_id"}
    # Comments may hold what pgbench takes for its own signs.
    statement = re.sub(r"%\((\w+)\)s", lambda match: str(constants[match[1]]), re.sub(r"--.*", "", GRANT_MANY))
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "batch.sql"
        script.write_text(_SCRIPT.format(statement=statement.strip()))
        started = time.perf_counter()
        done = subprocess.run(  # noqa: S603 - our own program and text
            [
                find_programs() / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={CONNECTIONS}",
                f"--jobs={CONNECTIONS}", f"--transactions={len(ids) // CONNECTIONS}", f"--file={script}",
                "--define=step=-1", f"--define=first={ids[0]}", f"--define=clients={CONNECTIONS}",
                libpq_url(url),
            ],
            capture_output=True, text=True, check=False, env=environment(PGOPTIONS=_OPTIONS),
        )  # fmt: skip
        seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"pgbench failed: {done.stderr.strip()}")
    with database.statements() as connection:
        totals.finish_runs(connection)
    return seconds
