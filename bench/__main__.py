"""`make bench`: users per second through scan, Redis and two workers, beside the bare statement on two connections.

Every figure is a ratio to the bare loop of the same run, because users per second differ from machine to machine and
from minute to minute. Each repetition starts from a copy of the same database, checkpointed; every row is verified
afterwards. PostgreSQL is durable (`fsync` and `synchronous_commit` on), and nothing is paced.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click
import psycopg

import embedded
import settings
from bench.bare import refresh_bare
from bench.service import refresh_by_service
from bench.worlds import Worlds, verify
from cli.output import err, out, table
from embedded.processes import unwind_on_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from embedded import Servers

RESULTS = settings.CHECKOUT / "bench" / "results"


@dataclass(frozen=True)
class Result:
    """One way of refreshing all users: medians over the repetitions."""

    name: str
    users_per_second: float
    ratio: float
    fastest: float
    slowest: float
    repetitions: int


def measure(worlds: Worlds, ways: dict[str, Callable[[str], float]], repetitions: int) -> list[Result]:
    """Time each way in turn, again and again, so that a slow minute of the machine slows all of them.

    Args:
        worlds: where the databases come from.
        ways: by name; each refreshes everybody in the database of that URL and returns its seconds. The first is the
            yardstick.
        repetitions: of each.
    """
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(1, repetitions + 1):
        for name, refresh in ways.items():
            with worlds.copy() as url:
                seconds = refresh(url)
                verify(url, worlds.users)
            speeds[name].append(worlds.users / seconds)
            err.print(f"{repetition}/{repetitions}  {name}: {worlds.users / seconds:,.0f} users/s", highlight=False)
    yardstick = next(iter(speeds.values()))
    return [
        Result(
            name,
            statistics.median(speed),
            statistics.median([a / b for a, b in zip(speed, yardstick, strict=True)]),
            max(speed),
            min(speed),
            repetitions,
        )
        for name, speed in speeds.items()
    ]


@click.command()
@click.option("--users", default=100_000, show_default=True, type=click.IntRange(1_000), help="Users, all of them due.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each way, interleaved.")
def main(users: int, repetitions: int) -> None:
    """Measure how close the service comes to its own SQL."""
    unwind_on_signals()
    loaded = settings.load()
    with embedded.servers("bench", loaded.credits_state_dir, fresh=True) as running:
        results = _measure_service(running, users, repetitions)
    out.print(
        table(
            f"{users:,} due users, two worker processes, batches of 100; ratio to the bare loop in the same run",
            [
                {
                    "way": result.name,
                    "users/s (median)": f"{result.users_per_second:,.0f}",
                    "slowest–fastest": f"{result.slowest:,.0f}–{result.fastest:,.0f}",  # noqa: RUF001 - a range
                    "ratio": f"{result.ratio:.2f}",
                }
                for result in results
            ],
        )
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"service-{users}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"users": users, "results": [asdict(result) for result in results]}, indent=2))
    err.print(f"Written to {path.relative_to(settings.CHECKOUT)}")


def _measure_service(running: Servers, users: int, repetitions: int) -> list[Result]:
    with psycopg.connect(running.database_url) as connection:
        row = connection.execute("SELECT version(), current_setting('fsync')").fetchone()
    err.print(f"{row}", highlight=False)
    return measure(
        Worlds(running, users),
        {
            "bare statement, 2 connections": refresh_bare,
            "service": lambda url: refresh_by_service(running, url, events=False),
            "service, task events on": lambda url: refresh_by_service(running, url, events=True),
        },
        repetitions,
    )


if __name__ == "__main__":
    main()
