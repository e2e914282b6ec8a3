"""A host app that spends credits at a fixed rate while users are refreshed, and how long each spend took.

pgbench plays it: it draws the arrivals beforehand, whatever the server does meanwhile, and counts a spend from the
instant it was meant for. A stall is seen by all who would have spent in it (no coordinated omission).
"""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.worlds import DUE_NOW, libpq_url
from db import Database, one
from embedded.postgres_server import find_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

DUE = f"CASE WHEN {{n}} % 2 = 1 THEN {DUE_NOW} ELSE now() + interval '10 days' END"
"""When user `{n}` is due (`bench/worlds.py`): half of them are, and credits of the others are spent all the same."""

CONNECTIONS = 16
"""Of the host app. It takes another one while some wait, so that a spend is held back by others only behind so many."""
# A user of number n begins with n % 1000 credits. These have some hundreds, more than are spent: each spend succeeds.
_NUMBERS = {
    "due": "1000 * random(0, :thousands - 1) + 501 + 2 * random(0, 249)",
    "others": "1000 * random(0, :thousands - 1) + 500 + 2 * random(0, 249)",
}
_SCRIPT = """\\set n {number}
UPDATE credits.users SET credit_balance = credit_balance - 1
WHERE external_id = 'user-' || :n::text AND credit_balance >= 1;
"""

# A user begins with id % 1000 credits. What is there less than that and the grants was spent. A user is refreshed whose
# batch is done, unless a spend had the row at that instant and the batch that they were put off to is not.
_BOOKS = """
WITH histories AS (
    SELECT user_id, count(*) AS rows, sum(credits_added) AS credits
    FROM credit_refresh_histories WHERE status = 'refreshed' GROUP BY user_id
),
audits AS (
    SELECT user_id, count(*) AS rows, sum(credits) AS credits
    FROM credit_audit_logs WHERE action = 'refreshed' GROUP BY user_id
),
done AS (
    SELECT unnest(user_ids) AS user_id FROM credit_refresh_batches WHERE status = 'done'
    EXCEPT SELECT unnest(user_ids) FROM credit_refresh_batches WHERE status <> 'done'
)
SELECT
    sum(u.id % 1000 + coalesce(h.credits, 0) - u.credit_balance),
    count(*) FILTER (
        WHERE coalesce(h.rows, 0) <> (d.user_id IS NOT NULL)::integer OR h.rows IS DISTINCT FROM a.rows
            OR h.credits IS DISTINCT FROM a.credits OR u.credit_balance > u.id % 1000 + coalesce(h.credits, 0)
    )
FROM users AS u
LEFT JOIN histories AS h ON h.user_id = u.id
LEFT JOIN audits AS a ON a.user_id = u.id
LEFT JOIN done AS d ON d.user_id = u.id
"""


@dataclass(frozen=True, slots=True)
class Spend:
    """One spend.

    Attributes:
        at: when it was meant to begin, in seconds of the epoch.
        ms: from then until the host app knew that it was committed.
        due: of a user whom the run refreshes.
    """

    at: float
    ms: float
    due: bool


class Host:
    """The host app, spending.

    Args:
        url: the database.
        users: in the table; at least 1,000.
        rate: spends in a second.
        seconds: how long.
        folder: for its scripts and its log.
    """

    def __init__(self, url: str, users: int, *, rate: int, seconds: int, folder: Path) -> None:
        self._folder = folder
        scripts = []
        for name, number in _NUMBERS.items():
            script = folder / f"{name}.sql"
            script.write_text(_SCRIPT.format(number=number))
            scripts.append(f"--file={script}")
        self._process = subprocess.Popen(  # noqa: S603 - our own program and texts
            [
                find_programs() / "pgbench", "--no-vacuum", "--protocol=prepared", f"--client={CONNECTIONS}",
                f"--rate={rate}", f"--time={seconds}", *scripts, f"--define=thousands={users // 1000}",
                "--log", f"--log-prefix={folder / 'log'}", libpq_url(url),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def spends(self) -> list[Spend]:
        """Wait for the end.

        Raises:
            SystemExit: pgbench failed.
        """
        _, complaint = self._process.communicate()
        if self._process.returncode:
            raise SystemExit(f"pgbench failed: {complaint.strip()}")
        return [_read(line) for log in self._folder.glob("log.*") for line in log.read_text().splitlines()]

    def stop(self) -> None:
        """End it early; nothing is left to do where it has ended."""
        with self._process:
            self._process.kill()


@contextmanager
def spending(url: str, users: int, *, rate: int, seconds: int) -> Iterator[Host]:
    """A host app that spends during the block; see `Host`."""
    with tempfile.TemporaryDirectory() as folder:
        host = Host(url, users, rate=rate, seconds=seconds, folder=Path(folder))
        try:
            yield host
        finally:
            host.stop()


def _read(line: str) -> Spend:
    # client, transaction, microseconds, script, end as seconds and microseconds of the epoch, lag
    _, _, micros, script, seconds, fraction, *_ = line.split()
    took = int(micros) / 1e6
    return Spend(int(seconds) + int(fraction) / 1e6 - took, took * 1e3, script == "0")


def verify_spends(url: str, spends: int) -> None:
    """Check every row: no spend was lost, no credit came from nowhere, whoever was refreshed has one row in each book.

    Raises:
        SystemExit: it was not so; no figure of such a run is worth anything.
    """
    with Database(url, "credits").statements() as connection:
        connection.execute("SET statement_timeout = 0")
        spent, wrong = one(connection.execute(_BOOKS))
    if spent != spends or wrong:
        raise SystemExit(f"{spends} spends took {spent} credits, and the books of {wrong} users are wrong")
