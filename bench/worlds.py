"""Databases to measure on: copies of one that holds the users, and the check of every row afterwards."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import make_url

from cli.database import migrate
from db import Database
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
_FILL = """
INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)
SELECT 'user-' || n, CASE WHEN n % 5 = 0 THEN 'pro' ELSE 'free' END, n % 1000,
    now() - make_interval(secs => (n * 7919) % 3600)
FROM generate_series(1, {users}) AS n
"""

# Everybody has their plan's amount, one history row and one audit row that agree with it, and the run adds up.
_WRONG = """
SELECT count(*) FROM users AS u
JOIN plans AS p ON p.code = u.plan_code
LEFT JOIN credit_refresh_histories AS h ON h.user_id = u.id AND h.status = 'refreshed'
LEFT JOIN credit_audit_logs AS a ON a.user_id = u.id AND a.action = 'refreshed' AND a.run_id = h.run_id
WHERE u.credit_balance IS DISTINCT FROM p.amount
    OR h.credits_added IS DISTINCT FROM p.amount - (u.id % 1000)
    OR h.new_balance IS DISTINCT FROM p.amount OR h.window_end IS DISTINCT FROM u.next_refresh_at
    OR a.credits IS DISTINCT FROM h.credits_added OR a.balance_after IS DISTINCT FROM u.credit_balance
"""
_COUNTS = """
SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM credit_refresh_histories),
    (SELECT count(*) FROM credit_audit_logs)
"""
_RUN = "SELECT status, users_refreshed FROM credit_refresh_runs WHERE slot IS NULL"


class Worlds:
    """Makes fresh copies of a migrated database with `users` due users.

    Args:
        running: the servers.
        users: how many.
        cadence: one of `CADENCES`.
    """

    def __init__(self, running: Servers, users: int, cadence: str = "rolling") -> None:
        self.users = users
        self.cadence = cadence
        self._running = running
        self._numbers = itertools.count(1)
        self._template = f"bench_{cadence}"
        with self._admin() as admin:
            for name in (self._template, f"{self._template}_1"):
                admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")  # of a run on given servers that was cut
            admin.execute(f"CREATE DATABASE {self._template}")
        template = Database(self.url(self._template), "credits")
        migrate(template)
        with template.transaction() as connection:
            # The slot is taken while nobody is there: workers, which open a missed slot as they start, find it so.
            runs.open_scheduled_run(connection, interval=SLOT, cron=None, batch_size=100, dry_run=False)
        with template.statements() as connection:
            connection.execute("SET statement_timeout = 0")
            connection.execute(_FILL.format(users=users))
            connection.execute(CADENCES[cadence])
            # The change of day has moved the dates to the new grid; back to due, as the trigger would not have it.
            connection.execute("ALTER TABLE users DISABLE TRIGGER USER")
            connection.execute("UPDATE users SET next_refresh_at = now() - make_interval(secs => (id * 7919) % 3600)")
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


def verify(url: str, users: int, *, by_a_run: bool = True) -> None:
    """Check every row.

    Args:
        url: the database.
        users: how many there are.
        by_a_run: whether a run is to say so, too; the leanest statement keeps no books of runs.

    Raises:
        SystemExit: a user was not refreshed exactly once; no figure of such a run is worth anything.
    """
    with Database(url, "credits").statements() as connection:
        connection.execute("SET statement_timeout = 0")
        wrong = connection.execute(_WRONG).fetchone()
        counts = connection.execute(_COUNTS).fetchone()
        runs_there = connection.execute(_RUN).fetchall()
    if wrong != (0,) or counts != (users, users, users) or runs_there != [("succeeded", users)] * by_a_run:
        raise SystemExit(f"not every user was refreshed exactly once: {wrong} wrong, counts {counts}, {runs_there}")
