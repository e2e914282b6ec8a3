"""Databases to measure on: copies of one that holds the users, and the check of every row afterwards."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import make_url

from cli.database import migrate
from db import Database, one
from refresh import runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from embedded import Servers

SLOT = timedelta(hours=8_760)
# What makes both plans follow another cadence, with everybody due within the last hour on its grid.
CADENCES = {
    "rolling": "SELECT 1",
    "monthly": """
        UPDATE plans SET cadence = 'monthly', day_of_month = extract(day FROM now() AT TIME ZONE 'Europe/Berlin'),
            time_of_day = date_trunc('hour', now() AT TIME ZONE 'Europe/Berlin')::time, timezone = 'Europe/Berlin'
    """,
    "daily": """
        UPDATE plans SET cadence = 'daily', time_of_day = date_trunc('hour', now() AT TIME ZONE 'Europe/Berlin')::time,
            timezone = 'Europe/Berlin'
    """,
    "anniversary": """
        UPDATE users SET credit_refresh_day = extract(day FROM now() AT TIME ZONE 'UTC'), timezone = 'America/New_York'
    """,
}

# Due within the last hour, as the hourly scan finds them; ids and due instants in no order with each other.
DUE_NOW = "now() - make_interval(secs => ({n}::bigint * 7919) % 3600)"
_FILL = """
INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)
SELECT 'user-' || n, CASE WHEN n % 5 = 0 THEN 'pro' ELSE 'free' END, n % 1000, {due}
FROM generate_series(1, {users}) AS n
"""
_AGAIN = "UPDATE users SET next_refresh_at = {due}"

# Each row's user has their plan's amount, and an audit row that agrees with the history row.
_ROWS = """
SELECT
    count(*), count(DISTINCT h.user_id),
    (SELECT count(*) FROM credit_audit_logs WHERE occurred_at >= %(at)s),
    count(*) FILTER (
        WHERE h.status <> 'refreshed' OR u.credit_balance IS DISTINCT FROM p.amount
            OR h.credits_added IS DISTINCT FROM p.amount - (u.id %% 1000)
            OR h.new_balance IS DISTINCT FROM p.amount OR h.window_end IS DISTINCT FROM u.next_refresh_at
            OR a.credits IS DISTINCT FROM h.credits_added OR a.balance_after IS DISTINCT FROM u.credit_balance
    )
FROM credit_refresh_histories AS h
LEFT JOIN users AS u ON u.id = h.user_id
LEFT JOIN plans AS p ON p.code = u.plan_code
LEFT JOIN credit_audit_logs AS a
    ON a.user_id = h.user_id AND a.action = 'refreshed' AND a.run_id = h.run_id AND a.occurred_at >= %(at)s
WHERE h.id > %(history_id)s
"""
_RUN = "SELECT status, users_refreshed FROM credit_refresh_runs WHERE slot IS NULL AND started_at >= %(at)s"


@dataclass(frozen=True)
class Mark:
    """A moment in a database: rows that came later are of what is measured."""

    history_id: int
    at: datetime


BEGINNING = Mark(0, datetime(2000, 1, 1, tzinfo=UTC))
_MARK = "SELECT coalesce(max(id), 0), clock_timestamp() FROM credit_refresh_histories"


class Worlds:
    """Makes fresh copies of a migrated database with `users` users.

    Args:
        running: the servers.
        users: how many.
        cadence: one of `CADENCES`.
        name: of the database, where several are there at the same time.
        due: when user `{n}` is, in SQL; by default within the last hour.
    """

    def __init__(
        self, running: Servers, users: int, cadence: str = "rolling", *, name: str | None = None, due: str = DUE_NOW
    ) -> None:
        self.users = users
        self.cadence = cadence
        self._running = running
        self._numbers = itertools.count(1)
        self._template = f"bench_{name or cadence}"
        self.template_url = self.url(self._template)
        with self._admin() as admin:
            for database in (self._template, f"{self._template}_1"):
                # Of a run on given servers that was cut.
                admin.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")
            admin.execute(f"CREATE DATABASE {self._template}")
        template = Database(self.template_url, "credits")
        migrate(template)
        with template.transaction() as connection:
            # The slot is taken while nobody is there: workers, which open a missed slot as they start, find it so.
            runs.open_scheduled_run(connection, interval=SLOT, cron=None, batch_size=100, dry_run=False)
        with template.statements() as connection:
            connection.execute("SET statement_timeout = 0")
            connection.execute(_FILL.format(users=users, due=due.format(n="n")))
            if cadence != "rolling":
                connection.execute(CADENCES[cadence])
                # The change of day has moved the dates to the new grid; back to due, as the trigger would not have it.
                # On the plan's own grid: whoever is due before its boundary has missed a window, which costs more.
                on_grid = "date_trunc('hour', now())" if cadence in {"monthly", "daily"} else due.format(n="id")
                connection.execute("ALTER TABLE users DISABLE TRIGGER USER")
                connection.execute(_AGAIN.format(due=on_grid))
                connection.execute("ALTER TABLE users ENABLE TRIGGER USER")
            connection.execute("VACUUM (FULL, FREEZE, ANALYZE)")

    @contextmanager
    def copy(self) -> Iterator[str]:
        """The URL of a fresh copy, flushed to disk so that its making is not measured."""
        name = f"{self._template}_{next(self._numbers)}"
        with self._admin() as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE {self._template} STRATEGY file_copy")
            admin.execute("CHECKPOINT")
            yield self.url(name)
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def drop(self) -> None:
        """Give the disk back."""
        with self._admin() as admin:
            admin.execute(f"DROP DATABASE {self._template} WITH (FORCE)")

    def url(self, database: str) -> str:
        """The URL of a database of the cluster."""
        return url_of(self._running, database)

    def _admin(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(libpq_url(self._running.database_url), autocommit=True)


def url_of(running: Servers, database: str) -> str:
    """SQLAlchemy's URL of a database of the cluster."""
    url = make_url(running.database_url).set(drivername="postgresql+psycopg", database=database)
    return url.render_as_string(hide_password=False)


def libpq_url(url: str) -> str:
    """The same URL for psycopg and for PostgreSQL's own programs."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def mark(url: str) -> Mark:
    """This moment, for `verify()`."""
    with Database(url, "credits").statements() as connection:
        return Mark(*one(connection.execute(_MARK)))


def verify(url: str, users: int, *, by_a_run: bool = True, alone: bool = False, since: Mark = BEGINNING) -> None:
    """Check every row.

    Args:
        url: the database.
        users: how many were to be refreshed.
        by_a_run: whether a run is to say so, too; the leanest statement keeps no books of runs.
        alone: whether each of them has a run of their own instead.
        since: when it began; earlier rows are not looked at.

    Raises:
        SystemExit: a user was not refreshed exactly once; no figure of such a run is worth anything.
    """
    with Database(url, "credits").statements() as connection:
        connection.execute("SET statement_timeout = 0")
        # Nobody has counted rows so young: PostgreSQL takes them for few, and would read both tables for each.
        connection.execute("SET enable_nestloop = off")
        *counts, wrong = one(connection.execute(_ROWS, asdict(since)))
        runs_there = connection.execute(_RUN, {"at": since.at}).fetchall()
    runs_due = [("succeeded", 1)] * users if alone else [("succeeded", users)] * by_a_run
    if wrong or counts != [users] * 3 or runs_there != runs_due:
        raise SystemExit(f"not every user was refreshed exactly once: {wrong} wrong, counts {counts}, {runs_there[:3]}")
