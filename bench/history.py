"""A year of growth: what a batch costs where millions of history and audit rows are there already."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import click

from bench.bare import refresh_bare
from bench.report import benchmark
from bench.worlds import DUE_NOW, Worlds, mark, verify
from cli.output import err
from db import Database, one

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.report import Report
    from embedded import Servers

BAR = 1.2
"""Times from a million rows to a hundred million: the issue's bar."""
HUGE = 100_000_000
_FROM, _TO = 1_000_000, HUGE
_USERS_A_DUE = 5
"""Users in the table for each who is due: those lie scattered, and so do their entries in the indexes."""

# How the rows lie over the partitions, by how many months they reach back. A year is what a service has after one; all
# of them in the one month that the batches write to is the worst that can be.
LAYOUTS = {12: "over 12 months", 1: "all in this month"}

# The first change of a page after a checkpoint writes the whole page to PostgreSQL's log. Among few rows, many users
# share a page of the index by user; among many, each has one of their own.
PHASES = {"after a checkpoint": True, "between checkpoints": False}

# As for a server with 16 GB: what a month writes to stays in memory.
_SHARED_BUFFERS = "4GB"

# Rows {first} to {last} of the {each} of one month. Users take turns, as in the course of a month; a user has so many
# windows as there are rows.
_SLICE = 5_000_000
_ROWS = """
FROM (
    SELECT date_trunc('month', now()) - make_interval(months => {ago}) AS starts,
        least(date_trunc('month', now()) - make_interval(months => {ago} - 1), now()) AS ends
) AS month
CROSS JOIN LATERAL generate_series({first}::bigint, {last} - 1) AS n
CROSS JOIN LATERAL (
    SELECT 1 + (n * 7919) % {users} AS user_id, starts + (ends - starts) * (n / {each}::float) AS at
) AS r
"""
_FILL_HISTORIES = f"""
INSERT INTO credit_refresh_histories (
    run_id, user_id, status, window_start, window_end, plan_code, grant_mode, target, old_balance, credits_added,
    new_balance, previous_next_refresh_at, previous_last_refresh, reason, created_at
)
SELECT '00000000-0000-0000-0000-000000000000', user_id, 'refreshed', at, at + interval '720 hours', 'free', 'fill',
    1000, n % 1000, 1000 - n % 1000, 1000, at, at - interval '720 hours', 'scheduled', at
{_ROWS}
"""
_FILL_AUDIT_LOGS = f"""
INSERT INTO credit_audit_logs (
    occurred_at, actor, action, user_id, run_id, balance_before, balance_after, credits
)
SELECT at, 'beat', 'refreshed', user_id, '00000000-0000-0000-0000-000000000000', n % 1000, 1000, 1000 - n % 1000
{_ROWS}
"""

# Users come in no order, so filling this index row by row takes longer than all the rest. Built afterwards it had
# full pages, which split at the next rows; those of an index that has grown are two thirds full.
_GRANT_INDEX = """
SELECT replace(replace(pg_get_indexdef('uq_credit_refresh_histories_grant'::regclass), ' ON ONLY ', ' ON '),
    ' WHERE ', ' WITH (fillfactor = 67) WHERE ')
"""

# The triggers would not have it; what is refreshed again has the balance that verify() expects to have been there.
_AGAIN = """
ALTER TABLE users DISABLE TRIGGER USER;
UPDATE users SET credit_balance = id % 1000, next_refresh_at = {due} WHERE id % {users_a_due} = 0;
ALTER TABLE users ENABLE TRIGGER USER
""".format(due=DUE_NOW.format(n="id"), users_a_due=_USERS_A_DUE)
# What the last time's writing left to autovacuum, which would wake while we measure.
_SETTLE = "VACUUM (ANALYZE) users, credit_refresh_batches, {this_month}"
_THIS_MONTH = """
SELECT parent || to_char(now(), '"_y"YYYY"m"MM')
FROM unnest('{credit_refresh_histories,credit_audit_logs}'::text[]) AS parent
"""


@click.command()
@click.option(
    "--rows",
    "sizes",
    multiple=True,
    default=(1_000_000, 5_000_000),
    show_default=True,
    type=click.IntRange(1_000),
    help="Rows in each of the tables. (1000000 5000000 20000000)",
)
@click.option(
    "--huge", is_flag=True, help="A hundred million rows, too: 45 GB of disk, and half an hour for each layout."
)
@click.option(
    "--months",
    "layouts",
    multiple=True,
    default=tuple(LAYOUTS),
    show_default=True,
    type=click.Choice(tuple(LAYOUTS)),
    help="Months that the rows reach back.",
)
@click.option("--users", default=20_000, show_default=True, type=click.IntRange(1_000), help="Due users.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each size, interleaved.")
def year(sizes: Sequence[int], layouts: Sequence[int], users: int, repetitions: int, *, huge: bool) -> None:
    """What batches take where millions of history and audit rows are there: the bare statement on two connections.

    Each number of rows has a database of its own at the same time, and the same users in it. Each repetition measures
    twice: after a checkpoint, when the first change of a page costs the whole page in PostgreSQL's log, and before the
    next one.
    """
    rows = sorted({*sizes, *([HUGE] if huge else [])})
    if len(rows) == 1:
        raise click.UsageError("a curve takes two numbers of rows: --rows twice")
    with benchmark("year", shared_buffers=_SHARED_BUFFERS) as (running, report):
        seconds: dict[str, dict[int, list[float]]] = {}
        for months in layouts:
            err.print(f"Rows {LAYOUTS[months]}", highlight=False)
            for phase, by_rows in _measure(running, rows, months, users, repetitions).items():
                seconds[f"{LAYOUTS[months]}, {phase}"] = by_rows
        _report(report, seconds, users)


def _measure(
    running: Servers, sizes: Sequence[int], months: int, users: int, repetitions: int
) -> dict[str, dict[int, list[float]]]:
    seconds: dict[str, dict[int, list[float]]] = {phase: defaultdict(list) for phase in PHASES}
    with ExitStack() as stack:
        urls: dict[int, str] = {}
        for rows in sizes:
            due = f"CASE WHEN {{n}} % {_USERS_A_DUE} = 0 THEN {DUE_NOW} ELSE now() + interval '10 days' END"
            world = Worlds(running, users * _USERS_A_DUE, name=f"year_{rows}", due=due)
            stack.callback(world.drop)
            urls[rows] = world.template_url
            _fill(world, rows, months)
        for repetition in range(1, repetitions + 1):
            for (rows, url), (phase, checkpoint) in product(urls.items(), PHASES.items()):
                _make_due(url, checkpoint=checkpoint)
                before = mark(url)
                took = refresh_bare(url)
                seconds[phase][rows].append(took)
                verify(url, users, since=before)
                err.print(f"{repetition}/{repetitions}  {rows:,} rows, {phase}: {took:.3f} s", highlight=False)
    return seconds


def _fill(world: Worlds, rows: int, months: int) -> None:
    database = Database(world.template_url, "credits")
    with database.transaction() as connection:
        connection.execute("SELECT ensure_partitions(now() - make_interval(months => %s), %s)", (months - 1, months))
    with database.statements() as connection:
        (index,) = one(connection.execute(_GRANT_INDEX))
    _execute(database, "DROP INDEX uq_credit_refresh_histories_grant")
    each = rows // months
    with ThreadPoolExecutor() as pool:
        for ago, first in product(reversed(range(months)), range(0, each, _SLICE)):
            err.print(f"Making {rows:,} rows: {(each * (months - 1 - ago) + first) / rows:.0%}", highlight=False)
            last = min(first + _SLICE, each)
            numbers = {"ago": ago, "each": each, "first": first, "last": last, "users": world.users}
            texts = [text.format(**numbers) for text in (_FILL_HISTORIES, _FILL_AUDIT_LOGS)]
            list(pool.map(partial(_execute, database), texts))
    _execute(database, index)
    _execute(database, "VACUUM (FREEZE, ANALYZE)")


def _make_due(url: str, *, checkpoint: bool) -> None:
    database = Database(url, "credits")
    with database.statements() as connection:
        names = [name for (name,) in connection.execute(_THIS_MONTH).fetchall()]
    for text in (_AGAIN, _SETTLE.format(this_month=", ".join(names)), *(["CHECKPOINT"] if checkpoint else [])):
        _execute(database, text)


def _execute(database: Database, text: str) -> None:
    with database.statements() as connection:
        connection.execute("SET statement_timeout = 0")
        connection.execute("SET lock_timeout = 0")  # autovacuum may be at a table
        connection.execute("SET maintenance_work_mem = '1GB'")
        connection.execute(text)


@dataclass(frozen=True)
class Curve:
    """`ratio = start + slope · ln(rows)`, fitted through the medians of the ratios to the fewest rows."""

    start: float
    slope: float

    def at(self, rows: float) -> float:
        """The ratio at so many rows."""
        return self.start + self.slope * math.log(rows)

    @property
    def growth(self) -> float:
        """From a million rows to a hundred million."""
        return self.at(_TO) / self.at(_FROM)


def _fit(ratios: Mapping[int, float]) -> Curve:
    fitted = statistics.linear_regression([math.log(rows) for rows in ratios], list(ratios.values()))
    return Curve(fitted.intercept, fitted.slope)


def _report(report: Report, seconds: Mapping[str, Mapping[int, Sequence[float]]], users: int) -> None:
    report.figures("seconds", seconds)
    curves: dict[str, Curve] = {}
    lines: dict[str, list[tuple[float, float]]] = {}
    rows_of_table = []
    for layout, by_rows in seconds.items():
        fewest = by_rows[min(by_rows)]
        ratios = {
            rows: statistics.median(mine / least for mine, least in zip(of_rows, fewest, strict=True))
            for rows, of_rows in by_rows.items()
        }
        curves[layout] = _fit(ratios)
        lines[layout] = list(ratios.items())
        reach = sorted({*ratios, _FROM, _TO})
        lines[f"{layout}: {curves[layout].start:.3f} + {curves[layout].slope:.4f} ln(rows)"] = [
            (rows, curves[layout].at(rows)) for rows in reach
        ]
        rows_of_table += [
            {
                "rows": layout,
                "of each table": f"{rows:,}",
                "µs a user": f"{statistics.median(of_rows) / users * 1e6:.1f}",
                "slowest to fastest": f"{max(of_rows) / users * 1e6:.1f} to {min(of_rows) / users * 1e6:.1f}",
                "ratio to the fewest": f"{ratios[rows]:.2f}",
            }
            for rows, of_rows in by_rows.items()
        ]
    report.table(f"{users:,} due users, the bare statement on two connections, medians", rows_of_table)
    report.table(
        "From a million rows to a hundred million, by the fitted curve",
        [{"rows": layout, "ratio": f"{curve.growth:.2f}", "bar": f"≤ {BAR}"} for layout, curve in curves.items()],
    )
    report.figures(
        "curves", {layout: {"start": c.start, "slope": c.slope, "growth": c.growth} for layout, c in curves.items()}
    )
    report.lines(
        "rows",
        f"{users:,} due users beside the rows that are there",
        ("history rows, and as many audit rows", "time, beside the fewest rows"),
        lines,
        log="x",
    )
