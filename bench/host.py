"""A busy host: how long its spends take while users refresh, at several paces, beside the same host left alone."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

import settings
from bench.report import benchmark
from bench.service import workers
from bench.spends import DUE, Spend, spending, verify_spends
from bench.worlds import Worlds
from cli.output import err
from db import Database, one
from refresh import runs
from refresh.cancel import cancel_run
from refresh.errors import RefusedError
from tasks.app import app
from tasks.publish import publish_asked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from psycopg import Connection

    from bench.report import Report
    from embedded import Servers

BAR = 2.0
"""Times the p99 of a host that is left alone: the issue's bar for paced runs."""
PACES = (1_000, 2_000, 5_000, 10_000, 20_000)

# Connections are opened and statements prepared; what a run leaves to be written, as it is cancelled, is written.
SETTLE_SECONDS = 1
# The scan and the publishing of a paced run, in which a message carries one batch; more calm where it takes less.
USERS_OPENED_A_SECOND = 200_000
_LOOK_SECONDS = 0.05

# What is put off to a new batch, because a spend had the row, waits for upkeep, and is not waited for here.
_GOES_ON = """
SELECT EXISTS (
    SELECT FROM credit_refresh_batches WHERE run_id = %(run_id)s AND status = 'pending' AND next_attempt_at IS NULL
)
"""
_WAITS = """
SELECT coalesce(wait_event_type || ' ' || wait_event, 'none: it runs, or waits for a core')
FROM pg_stat_activity WHERE application_name = 'pgbench' AND datname = current_database() AND state = 'active'
"""
# From the first batch to the last.
_REACHED = """
SELECT
    coalesce(sum(users_refreshed) / nullif(extract(epoch FROM max(finished_at) - min(finished_at)), 0), 0)::float,
    coalesce(sum(users_deferred), 0)::integer
FROM credit_refresh_batches WHERE run_id = %(run_id)s AND status = 'done'
"""


@dataclass(frozen=True)
class Load:
    """What goes on beside the spends.

    Attributes:
        name: of the row.
        pace: users per second that the run may refresh; None: as fast as it goes.
        idle: no run at all: how far two stretches of the same calm differ.
    """

    name: str
    pace: int | None = None
    idle: bool = False


@dataclass(frozen=True)
class Window:
    """One load, once: the spends meant for its time, and those of the calm right before and after it.

    Attributes:
        users_per_second: what the run reached.
        deferred: users who were put off because a spend had their row.
        opened_at: in seconds of the epoch; spends meant for an earlier instant met its scan and publishing.
        waits: what spends were seen to wait for, and how often.
    """

    during: list[Spend]
    calm: list[Spend]
    users_per_second: float
    deferred: int
    opened_at: float
    waits: Counter[str]

    def ratio(self, share: float) -> float:
        """A percentile beside that of the calm."""
        return percentile(self.during, share) / percentile(self.calm, share)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: users in the table, spends in a second, and the seconds of calm and of the run."""

    users: int
    rate: int
    calm: int
    seconds: int


def percentile(spends: Sequence[Spend], share: float) -> float:
    """The milliseconds within which that share of the spends was done."""
    ordered = sorted(spend.ms for spend in spends)
    return ordered[math.ceil(share * len(ordered)) - 1]


@click.command()
@click.option(
    "--users",
    default=200_000,
    show_default=True,
    type=click.IntRange(4_000),
    help="Due, half of all; the issue: 1000000.",
)
@click.option("--rate", default=200, show_default=True, type=click.IntRange(10), help="Spends a second.")
@click.option(
    "--pace", "paces", multiple=True, default=PACES, type=click.IntRange(1), show_default=True, help="Users a second."
)
@click.option("--seconds", default=8, show_default=True, type=click.IntRange(2), help="Of a run, after its opening.")
@click.option("--calm", default=3, show_default=True, type=click.IntRange(1), help="Seconds of calm before and after.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each pace, interleaved.")
def host(  # noqa: PLR0913 - options
    *, users: int, rate: int, paces: tuple[int, ...], seconds: int, calm: int, repetitions: int
) -> None:
    """What a refresh does to the latency of a host app that spends at a fixed rate, pace by pace.

    \b
    The issue's size:
      python -m bench host --users 1000000 --seconds 60 --calm 30
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    by_default = settings.load().scheduled_max_users_per_second
    loads = [
        Load("no run", idle=True),
        *(Load(f"pace {pace:,}{', as scheduled runs' * (pace == by_default)}", pace) for pace in sorted(paces)),
        Load("no pace"),
    ]
    with benchmark("host") as (running, report):
        worlds = Worlds(running, 2 * users, due=DUE)
        sizes = Sizes(worlds.users, rate, calm, seconds)
        windows: dict[str, list[Window]] = {load.name: [] for load in loads}
        for repetition in range(1, repetitions + 1):
            for load in loads:
                window = _measure(running, worlds, load, sizes)
                windows[load.name].append(window)
                err.print(
                    f"{repetition}/{repetitions}  {load.name}: {window.users_per_second:,.0f} users/s, "
                    f"p99 {percentile(window.during, 0.99):.1f} ms, calm {percentile(window.calm, 0.99):.1f} ms",
                    highlight=False,
                )
        _tell(
            report,
            loads,
            windows,
            f"{users:,} of {worlds.users:,} users refresh, a host app spends {rate:,} times a second",
        )


def _measure(running: Servers, worlds: Worlds, load: Load, sizes: Sizes) -> Window:
    """Calm, the load, calm again, in a fresh copy of the database, and the check of every row of it."""
    opening = 1 + sizes.users // USERS_OPENED_A_SECOND
    length = 2 * (SETTLE_SECONDS + sizes.calm) + opening + sizes.seconds
    with worlds.copy() as url:
        with workers(running, url), spending(url, sizes.users, rate=sizes.rate, seconds=length) as app_:
            time.sleep(SETTLE_SECONDS)
            calm_from = time.time()
            time.sleep(sizes.calm)
            with Database(url, "credits").statements() as connection:
                began = time.time()
                run_id = None if load.idle else _open(url, load.pace)
                opened = time.time()
                waits = _watch(connection, run_id, until=opened + sizes.seconds)
                ended = time.time()
                users_per_second, deferred = _end(url, connection, run_id)
            calm_again = time.time() + SETTLE_SECONDS
            spends = app_.spends()
        app.control.purge()  # a cancelled run's messages: their ids would be those of other batches in the next copy
        verify_spends(url, len(spends))
    return Window(
        during=[spend for spend in spends if began <= spend.at < ended],
        calm=[spend for spend in spends if calm_from <= spend.at < began or calm_again <= spend.at],
        users_per_second=users_per_second,
        deferred=deferred,
        opened_at=opened,
        waits=waits,
    )


def _open(url: str, pace: int | None) -> UUID:
    database = Database(url, "credits")
    with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        request = runs.Request("cli", "bench", 100, max_users_per_second=pace)
        run = runs.open_run(connection, request)
    if not isinstance(run, runs.Opened):
        raise SystemExit(run.text)
    publish_asked(database, run.run_id, max_attempts=5)
    return run.run_id


def _watch(connection: Connection, run_id: UUID | None, *, until: float) -> Counter[str]:
    """Look what spends wait for, until the run has ended or that instant has come."""
    waits: Counter[str] = Counter()
    while time.time() < until and (
        run_id is None or one(connection.execute(_GOES_ON, {"run_id": run_id}, prepare=True))[0]
    ):
        waits.update(event for (event,) in connection.execute(_WAITS, prepare=True))
        time.sleep(_LOOK_SECONDS)
    return waits


def _end(url: str, connection: Connection, run_id: UUID | None) -> tuple[float, int]:
    """End the run where it goes on; returns the users that it refreshed in a second, and how many it put off."""
    if run_id is None:
        return 0.0, 0
    with (
        suppress(RefusedError),  # it has ended by itself
        Database(url, "credits").transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as cancelling,
    ):
        cancel_run(cancelling, run_id, actor="bench", reason="enough was measured")
    speed, deferred = one(connection.execute(_REACHED, {"run_id": run_id}))
    return speed, deferred


def _tell(report: Report, loads: Sequence[Load], windows: dict[str, list[Window]], title: str) -> None:
    report.table(f"{title}; p99 beside the calm before and after", [_row(load, windows[load.name]) for load in loads])
    report.table("Spends slower than twice the calm's p99: whose they were, and those that met the run's opening", [
        _slow_row(load, windows[load.name]) for load in loads
    ])  # fmt: skip
    report.table("What spends were seen to wait for", [_waits_row(load, windows[load.name]) for load in loads])
    paced = [load for load in loads if not load.idle]
    report.lines(
        "trade-off", title, ("users refreshed per second", "latency of spends, calm = 1"),
        {
            name: sorted((_speed(windows[load.name]), _ratio(windows[load.name], share)) for load in paced)
            for name, share in (("p99", 0.99), ("p50", 0.5))
        },
        log="x", bar=BAR,
    )  # fmt: skip
    report.figures("windows", {
        name: [
            {
                "users_per_second": window.users_per_second, "users_deferred": window.deferred, "waits": window.waits,
                **{
                    stretch: {
                        "spends": len(spends), "p50_ms": percentile(spends, 0.5), "p99_ms": percentile(spends, 0.99),
                        "max_ms": percentile(spends, 1),
                    }
                    for stretch, spends in (("during", window.during), ("calm", window.calm))
                },
            }
            for window in repetitions
        ]
        for name, repetitions in windows.items()
    })  # fmt: skip


def _row(load: Load, windows: Sequence[Window]) -> dict[str, object]:
    during = [spend for window in windows for spend in window.during]
    calm = [spend for window in windows for spend in window.calm]
    ratios = [window.ratio(0.99) for window in windows]
    return {
        "load": load.name,
        "users/s": round(_speed(windows)),
        "p50, p99, max ms": _three(during),
        "calm": _three(calm),
        "p50 ratio": f"{_ratio(windows, 0.5):.2f}",
        "p99 ratio": f"{_ratio(windows, 0.99):.2f}",
        "lowest to highest": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "bar": f"≤ {BAR:g}" if load.pace else "",
    }


def _three(spends: Sequence[Spend]) -> str:
    return ", ".join(f"{percentile(spends, share):.1f}" for share in (0.5, 0.99, 1))


def _slow_row(load: Load, windows: Sequence[Window]) -> dict[str, object]:
    seen: Counter[str] = Counter()
    slow: Counter[str] = Counter()
    for window in windows:
        limit = 2 * percentile(window.calm, 0.99)
        for spend in window.during:
            groups = ["due users" if spend.due else "other users", *["the opening"] * (spend.at < window.opened_at)]
            seen.update(groups)
            slow.update(groups * (spend.ms > limit))
    return {
        "load": load.name,
        **{
            group: f"{slow[group]:,} of {seen[group]:,} = {slow[group] / max(seen[group], 1):.2%}"
            for group in ("due users", "other users", "the opening")
        },
        "refreshes put off by a spend": sum(window.deferred for window in windows),
    }


def _waits_row(load: Load, windows: Sequence[Window]) -> dict[str, object]:
    waits = sum((window.waits for window in windows), Counter[str]())
    return {
        "load": load.name,
        "seen": waits.total(),
        "of which": ", ".join(f"{event} {count / waits.total():.0%}" for event, count in waits.most_common(5)),
    }


def _speed(windows: Sequence[Window]) -> float:
    return statistics.median(window.users_per_second for window in windows)


def _ratio(windows: Sequence[Window], share: float) -> float:
    return statistics.median(window.ratio(share) for window in windows)
