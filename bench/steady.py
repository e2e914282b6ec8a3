"""The hour in which nobody is due: what its scan costs the database, whatever the size of the table."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import click

from bench.bare import refresh_alone
from bench.report import benchmark
from bench.worlds import Worlds, mark, verify
from cli.output import err
from db import Database, one
from refresh import runs

if TYPE_CHECKING:
    from datetime import datetime

    from embedded import Servers

BAR_MS = 5.0
HOURS = 10
SMALL = 10_000
# Each hour of a plan of 30 days has its share of the users. The first eleven hours have passed, so that they can be
# refreshed one by one, each as of its end: no date is set back, which would leave dead entries that production has not.
_DUE = f"now() + make_interval(secs => ({{n}}::bigint * 7919) % 2592000 - {(HOURS + 1) * 3600})"
_BEFORE_FIRST = "SELECT min(next_refresh_at) - interval '1 second' FROM users"
_WAKE_INDEX = "SELECT pg_relation_size('ix_users_wake_at') / 1024"


class _Idle(NamedTuple):
    """Milliseconds of openings that find nobody."""

    first: float
    median: float
    slowest: float


class _Table:
    """A table of users and the hour that it has come to.

    Args:
        running: the servers.
        users: in the table.
    """

    def __init__(self, running: Servers, users: int) -> None:
        self.users = users
        self._worlds = Worlds(running, users, name=f"idle_{users}", due=_DUE)
        self._url = self._worlds.template_url
        self._database = Database(self._url, "credits", pool=2)
        with self._database.statements() as connection:
            connection.execute("ALTER TABLE users SET (autovacuum_enabled = off)")  # it comes when we say so
            self._hour: datetime = one(connection.execute(_BEFORE_FIRST))[0]

    def idle(self, repetitions: int) -> _Idle:
        """Time the whole opening of beat's run and take it back: a client's time, its round trips included."""
        request = runs.Request("beat", "beat", 100, slot=self._slot(), as_of=self._hour, reason=runs.SCHEDULED)
        times = []
        with self._database.statements() as connection:
            for _ in range(repetitions):
                with connection.transaction(force_rollback=True):
                    started = time.perf_counter()
                    opened = runs.open_run(connection, request)
                    times.append(1000 * (time.perf_counter() - started))
                if not isinstance(opened, runs.Opened) or opened.users_selected:
                    raise SystemExit(f"somebody was due, or no run was opened: {opened}")
        return _Idle(times[0], statistics.median(times), max(times))

    def round_trip(self, repetitions: int) -> float:
        """The median of an empty statement, in milliseconds."""
        times = []
        with self._database.statements() as connection:
            for _ in range(repetitions):
                started = time.perf_counter()
                connection.execute("SELECT")
                times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)

    def pass_hour(self) -> int:
        """Refresh those who fall due in the next hour; returns how many, every row of them verified."""
        self._hour += timedelta(hours=1)
        since = mark(self._url)
        run = refresh_alone(self._database, runs.Request("cli", "bench", 100, as_of=self._hour))
        verify(self._url, run.users_selected, since=since)
        return run.users_selected

    def vacuum(self) -> None:
        with self._database.statements() as connection:
            connection.execute("SET statement_timeout = 0")
            connection.execute("VACUUM (INDEX_CLEANUP on) users")

    def index_kb(self) -> int:
        with self._database.statements() as connection:
            return int(one(connection.execute(_WAKE_INDEX))[0])

    def close(self) -> None:
        self._database.close()
        self._worlds.drop()

    def _slot(self) -> datetime:
        return self._hour.replace(minute=0, second=0, microsecond=0)


@click.command()
@click.option(
    "--users", default=1_000_000, show_default=True, type=click.IntRange(2 * SMALL),
    help="Users in the table; the issue's bar is for 10,000,000.",
)  # fmt: skip
@click.option("--repetitions", default=30, show_default=True, type=click.IntRange(20), help="Scans at each stage.")
def idle(users: int, repetitions: int) -> None:
    """What an hourly scan costs when nobody is due, beside the same scan over 10,000 users.

    On a vacuumed table, after hours in which 1/720 of the users were refreshed and no vacuum came, whose dead entries
    lie at the low end of the index that the scan reads from there, and after a vacuum.
    """
    with benchmark("idle") as (running, report):
        small, large = tables = [_Table(running, size) for size in (SMALL, users)]
        rows: list[dict[str, object]] = []
        points: dict[str, list[tuple[float, float]]] = {f"{table.users:,} users": [] for table in tables}

        def measure(stage: str, hours: int) -> None:
            found = [table.idle(repetitions) for table in tables]
            rows.append(
                {
                    "after": stage,
                    f"{SMALL:,} users, ms": f"{found[0].median:.2f}",
                    f"{users:,} users, ms": f"{found[1].median:.2f}",
                    "ratio": f"{found[1].median / found[0].median:.2f}",
                    "its first scan, ms": f"{found[1].first:.2f}",
                    "its slowest, ms": f"{found[1].slowest:.2f}",
                    "bar, ms": f"{BAR_MS:.0f}",
                    "wake index, kB": f"{large.index_kb():,}",
                }
            )
            for table, times in zip(tables, found, strict=True):
                points[f"{table.users:,} users"].append((hours, times.median))
            err.print(f"{stage}: {found[0].median:.2f} ms and {found[1].median:.2f} ms", highlight=False)

        small.idle(repetitions)  # the first connections' first looks at the catalogue
        large.idle(repetitions)
        measure("a vacuum", 0)
        refreshed = 0
        for hour in range(1, HOURS + 1):
            refreshed += large.pass_hour()
            small.pass_hour()
            if hour in {1, 2, 5, HOURS}:
                measure(f"{hour} hours, {refreshed:,} refreshes", hour)
        large.vacuum()
        small.vacuum()
        measure("a vacuum again", HOURS + 1)
        title = f"An hourly scan that finds nobody among {users:,} users: median of {repetitions}"
        report.table(title, rows)
        report.lines("hours", title, ("hours without vacuum; then a vacuum", "milliseconds"), points, bar=BAR_MS)
        report.figures("round_trip_ms", large.round_trip(repetitions))
        for table in tables:
            table.close()
