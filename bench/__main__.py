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

import embedded
import settings
from bench.bare import refresh_bare, refresh_leanest
from bench.pgbench import refresh_by_pgbench
from bench.service import refresh_by_service
from bench.worlds import CADENCES, Worlds, verify
from cli.output import err, out, table
from embedded.processes import unwind_on_signals

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = settings.CHECKOUT / "bench" / "results"


@dataclass(frozen=True)
class Way:
    """One way of refreshing everybody.

    Attributes:
        name: of the row.
        worlds: where its databases come from.
        refresh: does it in the database of that URL, and returns its seconds.
        by_a_run: whether a run says so in the end.
    """

    name: str
    worlds: Worlds
    refresh: Callable[[str], float]
    by_a_run: bool = True


@dataclass(frozen=True)
class Result:
    """Medians over the repetitions; the ratio is to the first way of the same repetition."""

    name: str
    users_per_second: float
    ratio: float
    fastest: float
    slowest: float
    repetitions: int


def measure(ways: list[Way], repetitions: int) -> list[Result]:
    """Time each way in turn, again and again, so that a slow minute of the machine slows all of them.

    Args:
        ways: the first is the yardstick.
        repetitions: of each.
    """
    speeds: dict[str, list[float]] = {way.name: [] for way in ways}
    for repetition in range(1, repetitions + 1):
        for way in ways:
            with way.worlds.copy() as url:
                seconds = way.refresh(url)
                verify(url, way.worlds.users, by_a_run=way.by_a_run)
            speed = way.worlds.users / seconds
            speeds[way.name].append(speed)
            err.print(f"{repetition}/{repetitions}  {way.name}: {speed:,.0f} users/s", highlight=False)
    yardstick = speeds[ways[0].name]
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
    """Measure how close the service comes to its own SQL, and what each cadence of the rule costs."""
    unwind_on_signals()
    loaded = settings.load()
    with embedded.servers("bench", loaded.credits_state_dir, fresh=True) as running:
        rolling = Worlds(running, users)
        service = measure(
            [
                Way("bare statement, 2 connections", rolling, refresh_bare),
                Way("service", rolling, lambda url: refresh_by_service(running, url, events=False)),
                Way("service, task events on", rolling, lambda url: refresh_by_service(running, url, events=True)),
                Way(
                    "service, one batch a message",
                    rolling,
                    lambda url: refresh_by_service(running, url, events=False, ids_a_message=1),
                ),
                Way("pgbench, the same statement", rolling, refresh_by_pgbench),
                Way("the leanest statement", rolling, refresh_leanest, by_a_run=False),
            ],
            repetitions,
        )
        others = [Worlds(running, users, cadence) for cadence in CADENCES if cadence != rolling.cadence]
        rule = measure([Way(worlds.cadence, worlds, refresh_bare) for worlds in (rolling, *others)], repetitions)
    _show(f"{users:,} due users, two worker processes, batches of 100; ratio to the bare statement", service)
    _show(f"The rule: {users:,} due users, the bare statement; ratio to the rolling cadence", rule)
    _write(users, {"service": service, "rule": rule})


def _show(title: str, results: list[Result]) -> None:
    rows = [
        {
            "way": result.name,
            "users/s": f"{result.users_per_second:,.0f}",
            "slowest to fastest": f"{result.slowest:,.0f} to {result.fastest:,.0f}",
            "ratio": f"{result.ratio:.2f}",
        }
        for result in results
    ]
    out.print(table(title, rows))


def _write(users: int, results: dict[str, list[Result]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{users}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    facts = {name: [asdict(result) for result in rows] for name, rows in results.items()}
    path.write_text(json.dumps({"users": users, **facts}, indent=2))
    err.print(f"Written to {path.relative_to(settings.CHECKOUT)}")


if __name__ == "__main__":
    main()
