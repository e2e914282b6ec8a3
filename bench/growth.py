"""Growth: what a due user costs in ever larger tables, and in ever larger runs."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bench import memory
from bench.report import benchmark
from bench.service import Scanned, open_timed, run_seconds, scan, workers
from bench.worlds import Worlds, mark, verify
from celeryconfig import QueueNames
from cli.output import err
from db import Database
from refresh import totals
from refresh.batch import GRANT_MANY
from refresh.closing import close_batch
from tasks.app import use_broker
from tasks.publish import messages_waiting
from tasks.upkeep import upkeep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import psycopg

    from bench.report import Report
    from embedded import Servers

BAR = 1.5
"""Times the smallest size's time per due user: the issue's bar."""

HOURS = 720
"""Of a plan of 30 days: each has its share of the users."""
_HOURS_EACH = 3
"""A repetition refreshes three hours: one that finds the workers newly started, one that is measured through them, and
one that is measured in the bare statement."""
_BATCH = 100

# After five executions PostgreSQL keeps the plan; a worker has long passed them.
_PLANNED_AFTER = 6

_BATCHES = """
SELECT id, cardinality(user_ids) FROM credit_refresh_batches WHERE run_id = %s ORDER BY id
"""

Found = TypeVar("Found")

_repetitions = click.option(
    "--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each size, interleaved."
)


@dataclass(frozen=True)
class Hour:
    """One hour's due users in a table of that size.

    Attributes:
        full_batch_seconds: of the bare statement over a full batch, on average; None where nobody fills one.
    """

    users: int
    due: int
    opening_seconds: float
    run_seconds: float
    full_batch_seconds: float | None


@click.command("growth-table")
@click.option("--users", default=1_000_000, show_default=True, type=click.IntRange(1_000), help="Most. (10000000)")
@click.option("--smallest", default=10_000, show_default=True, type=click.IntRange(HOURS), help="Fewest.")
@_repetitions
def growth_table(users: int, smallest: int, repetitions: int) -> None:
    """A steady state, 1/720 of the users due in an hour, in tables of ten times as many users each.

    Due users lie scattered, each on a page of its own. Where they are few, a run's fixed costs are most of its time;
    so a full batch in the bare statement stands beside it, where the table alone makes a difference.
    """
    start = datetime.now(UTC) - timedelta(hours=1 + repetitions * _HOURS_EACH)
    with benchmark("growth-table") as (running, report), ExitStack() as stack:
        tables: list[tuple[Worlds, psycopg.Connection[Any]]] = []
        for size in _sizes(smallest, users):
            _tell(f"Making {size:,} users")
            world = Worlds(running, size, name=f"table_{size}", due=_due_from(start))
            stack.callback(world.drop)
            connection = stack.enter_context(Database(world.template_url, "credits").statements())
            for _ in range(_PLANNED_AFTER):
                close_batch(connection, 0, GRANT_MANY)  # there is no such batch
            tables.append((world, connection))
        hours: list[Hour] = []
        for repetition in range(repetitions):
            for world, connection in tables:
                hour = _measure_hour(running, world, connection, start, 1 + repetition * _HOURS_EACH)
                hours.append(hour)
                _tell(f"{repetition + 1}/{repetitions}  {hour.due:,} due of {hour.users:,}: {hour.run_seconds:.3f} s")
        _report_table(report, hours)


def _sizes(smallest: int, largest: int) -> list[int]:
    sizes = [smallest]
    while sizes[-1] * 10 < largest:
        sizes.append(sizes[-1] * 10)
    return [*sizes, largest] if largest > smallest else sizes


def _due_from(start: datetime) -> str:
    """When user `{n}` is due, in SQL: the users of one hour after those of the other."""
    of_hour = "secs => -({n}::bigint * 7919) % 3600"
    return f"'{start}'::timestamptz + make_interval(hours => 1 + {{n}} % {HOURS}, {of_hour})"


def _measure_hour(
    running: Servers, world: Worlds, connection: psycopg.Connection[Any], start: datetime, hour: int
) -> Hour:
    """Refresh three hours' users; the second and the third are measured."""
    url = world.template_url
    with workers(running, url) as supervisor:
        for number in (hour, hour + 1):
            _settle(connection)
            before = mark(url)
            scanned = scan(url, start + timedelta(hours=number))
            seconds = run_seconds(url, scanned.run_id, supervisor)
            verify(url, _due_users(world, number), since=before)
    _settle(connection)
    before = mark(url)
    run, _ = open_timed(Database(url, "credits"), start + timedelta(hours=hour + 2))
    full: list[float] = []
    for batch_id, batch_users in connection.execute(_BATCHES, (run.run_id,)).fetchall():
        started = time.perf_counter()
        close_batch(connection, batch_id, GRANT_MANY)
        if batch_users == _BATCH:
            full.append(time.perf_counter() - started)
    totals.finish_runs(connection)
    verify(url, _due_users(world, hour + 2), since=before)
    due = _due_users(world, hour + 1)
    return Hour(world.users, due, scanned.opening_seconds, seconds, statistics.fmean(full) if full else None)


def _due_users(world: Worlds, hour: int) -> int:
    """Users `n` from 1 on with the remainder of that hour; hours count from 1."""
    return len(range(hour - 1 or HOURS, world.users + 1, HOURS))


def _settle(connection: psycopg.Connection[Any]) -> None:
    """What was written before goes to disk now and not while we measure."""
    connection.execute("CHECKPOINT")


def _report_table(report: Report, hours: Sequence[Hour]) -> None:
    by_size = _by(hours, lambda hour: hour.users)
    opening = {size: [hour.opening_seconds for hour in of_size] for size, of_size in by_size.items()}
    whole = {size: [hour.run_seconds / hour.due for hour in of_size] for size, of_size in by_size.items()}
    full = {
        size: [hour.full_batch_seconds / _BATCH for hour in of_size if hour.full_batch_seconds is not None]
        for size, of_size in by_size.items()
        if of_size[0].full_batch_seconds is not None
    }
    whole_ratios = _ratios(whole, min(whole))
    full_ratios = _ratios(full, min(full)) if full else {}
    report.table(
        f"1/{HOURS} of the table due, two workers; ratios to the smallest table (that fills a batch); medians",
        [
            {
                "users": f"{size:,}",
                "due": f"{of_size[0].due:,}",
                "scan ms": f"{statistics.median(opening[size]) * 1e3:.1f}",
                "run ms": f"{statistics.median(hour.run_seconds for hour in of_size) * 1e3:,.0f}",
                "run: µs a user": f"{statistics.median(whole[size]) * 1e6:,.0f}",
                "ratio": f"{whole_ratios[size]:.2f}",
                "full batch: µs a user": f"{statistics.median(full[size]) * 1e6:,.0f}" if size in full else "none",
                "its ratio": f"{full_ratios[size]:.2f}" if size in full else "",
                "bar": f"≤ {BAR}",
            }
            for size, of_size in by_size.items()
        ],
    )
    report.figures("hours", [asdict(hour) for hour in hours])
    report.figures("ratios", {"run": whole_ratios, "full batch": full_ratios})
    head = f"1/{HOURS} of the table due"
    axis = "users in the table"
    report.lines(
        "time-per-user",
        f"Time per due user, {head}",
        (axis, "µs per due user"),
        {"run, scan to finish": _points(whole, 1e6), "full batch, bare statement": _points(full, 1e6)},
        log="xy",
    )
    report.lines(
        "ratio",
        f"Time per due user beside the smallest table's, {head}",
        (axis, "ratio"),
        {"run": list(whole_ratios.items()), "full batch": list(full_ratios.items())},
        log="x",
        bar=BAR,
    )
    report.lines("scan", f"Opening the run, {head}", (axis, "ms"), {"scan": _points(opening, 1e3)}, log="x")


@dataclass(frozen=True)
class Refreshed:
    """One run over users who were due all at once; memory in MB."""

    users: int
    opening_seconds: float
    publishing_seconds: float
    run_seconds: float
    peaks: Mapping[str, float]


@click.command("growth-due")
@click.option("--due", default=300_000, show_default=True, type=click.IntRange(1_000), help="Most. (3000000)")
@click.option("--smallest", default=10_000, show_default=True, type=click.IntRange(1_000), help="Fewest.")
@_repetitions
def growth_due(due: int, smallest: int, repetitions: int) -> None:
    """Ever more users due at once: time per user, and the most memory of scan, workers, upkeep and Redis.

    The scan opens and publishes in a process of its own; an upkeep runs among the batches.
    """
    with benchmark("growth-due") as (running, report), ExitStack() as stack:
        worlds = []
        for size in _sizes(smallest, due):
            _tell(f"Making {size:,} users")
            worlds.append(Worlds(running, size, name=f"due_{size}"))
            stack.callback(worlds[-1].drop)
        found: list[Refreshed] = []
        for repetition in range(repetitions):
            for world in worlds:
                with world.copy() as url:
                    found.append(_refresh(running, url, world.users))
                    verify(url, world.users)
                _tell(f"{repetition + 1}/{repetitions}  {world.users:,} due: {found[-1].run_seconds:.3f} s")
        _report_due(report, found)


def _refresh(running: Servers, url: str, users: int) -> Refreshed:
    with workers(running, url) as supervisor, memory.sampled() as peaks:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
            scanned = apart.submit(_scan_apart, running.redis_url, url).result()
        upkeep.delay()
        seconds = run_seconds(url, scanned.run_id, supervisor)
    return Refreshed(users, scanned.opening_seconds, scanned.publishing_seconds, seconds, dict(peaks))


def _scan_apart(redis_url: str, url: str) -> Scanned:
    use_broker(redis_url)
    messages_waiting(QueueNames.BULK)  # a worker that scans has long loaded what speaks to the broker
    return scan(url)


def _report_due(report: Report, found: Sequence[Refreshed]) -> None:
    by_size = _by(found, lambda refreshed: refreshed.users)
    whole = {size: [run.run_seconds / size for run in of_size] for size, of_size in by_size.items()}
    opening = {size: [run.opening_seconds for run in of_size] for size, of_size in by_size.items()}
    publishing = {size: [run.publishing_seconds for run in of_size] for size, of_size in by_size.items()}
    ratios, to_quickest = _ratios(whole, min(whole)), _to_quickest(whole)
    peaks = {
        kind: {size: max(run.peaks[kind] for run in of_size) for size, of_size in by_size.items()}
        for kind in memory.KINDS
        if all(kind in run.peaks for run in found)
    }
    report.table(
        "All due at once, two workers; ratios to the fewest and to the quickest; medians",
        [
            {
                "due": f"{size:,}",
                "users/s": f"{1 / statistics.median(whole[size]):,.0f}",
                "µs a user": f"{statistics.median(whole[size]) * 1e6:.1f}",
                "ratio": f"{ratios[size]:.2f}",
                "to the quickest": f"{to_quickest[size]:.2f}" if size in to_quickest else "",
                "bar": f"≤ {BAR}",
                "scan ms": f"{statistics.median(opening[size]) * 1e3:,.0f}",
                "publishing ms": f"{statistics.median(publishing[size]) * 1e3:,.0f}",
            }
            for size in by_size
        ],
    )
    report.table(
        "The most memory of a process of each kind, in MB, and the longest queue",
        [
            {"due": f"{size:,}", **{kind: f"{of_kind[size]:,.1f}" for kind, of_kind in peaks.items()}}
            for size in by_size
        ],
    )
    report.figures("runs", [asdict(refreshed) for refreshed in found])
    report.figures("ratios", {"to the fewest": ratios, "to the quickest": to_quickest})
    title, axis = "Time per due user, all due at once", "due users"
    report.lines("time-per-user", title, (axis, "µs per due user"), {"run": _points(whole, 1e6)}, log="x")
    report.lines(
        "ratio",
        f"{title}, beside the fewest and the quickest",
        (axis, "ratio"),
        {"to the fewest": list(ratios.items()), "to the quickest": list(to_quickest.items())},
        log="x",
        bar=BAR,
    )
    report.lines(
        "scan",
        "Opening the run, and publishing it",
        (axis, "ms"),
        {"opening": _points(opening, 1e3), "publishing": _points(publishing, 1e3)},
        log="xy",
    )
    lines = {kind: list(of_kind.items()) for kind, of_kind in peaks.items()}
    queue = {memory.QUEUE: lines.pop(memory.QUEUE)}
    report.lines("memory", "The most memory of a process of each kind", (axis, "MB"), lines, log="x")
    report.lines("queue", "The longest queue", (axis, "messages"), queue, log="x")


def _by(found: Sequence[Found], size: Callable[[Found], int]) -> dict[int, list[Found]]:
    by_size: dict[int, list[Found]] = defaultdict(list)
    for one in found:
        by_size[size(one)].append(one)
    return dict(by_size)


def _ratios(seconds: Mapping[int, Sequence[float]], to: int) -> dict[int, float]:
    """Each size's median ratio to that size in the same repetition."""
    return {
        size: statistics.median(mine / yardstick for mine, yardstick in zip(values, seconds[to], strict=True))
        for size, values in seconds.items()
    }


def _to_quickest(seconds: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """The ratios of the sizes from the quickest on: what grows there, no fixed costs of small sizes hide."""
    quickest = min(seconds, key=lambda size: statistics.median(seconds[size]))
    return {size: ratio for size, ratio in _ratios(seconds, quickest).items() if size >= quickest}


def _points(seconds: Mapping[int, Sequence[float]], times: float) -> list[tuple[float, float]]:
    return [(size, statistics.median(values) * times) for size, values in seconds.items()]


def _tell(text: str) -> None:
    err.print(text, highlight=False, soft_wrap=True)
