"""Users per second through scan, Redis and two workers, beside the bare statement on two connections."""

from __future__ import annotations

from dataclasses import asdict

import click

from bench.bare import refresh_bare, refresh_leanest
from bench.measure import Way, measure
from bench.pgbench import refresh_by_pgbench
from bench.report import benchmark
from bench.service import refresh_by_service
from bench.worlds import CADENCES, Worlds


@click.command()
@click.option("--users", default=100_000, show_default=True, type=click.IntRange(1_000), help="Users, all of them due.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each way, interleaved.")
def throughput(users: int, repetitions: int) -> None:
    """How close the service comes to its own statement, and that to the least statement there is."""
    with benchmark("throughput") as (running, report):
        worlds = Worlds(running, users)
        results = measure(
            [
                Way("bare statement, 2 connections", worlds, refresh_bare),
                Way("service", worlds, lambda url: refresh_by_service(running, url, events=False)),
                Way("service, task events on", worlds, lambda url: refresh_by_service(running, url, events=True)),
                Way(
                    "service, one batch a message",
                    worlds,
                    lambda url: refresh_by_service(running, url, events=False, ids_a_message=1),
                ),
                Way("pgbench, the same statement", worlds, refresh_by_pgbench),
                Way("the leanest statement", worlds, refresh_leanest, by_a_run=False),
            ],
            repetitions,
        )
        title = f"{users:,} due users, two workers, batches of 100; ratio to the bare statement"
        report.table(title, [result.row() for result in results])
        report.bars("ratios", title, "users per second, bare statement = 1", {r.name: r.ratio for r in results})
        report.figures("results", [asdict(result) for result in results])


@click.command()
@click.option("--users", default=100_000, show_default=True, type=click.IntRange(1_000), help="Users, all of them due.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each way, interleaved.")
def cadences(users: int, repetitions: int) -> None:
    """What each cadence of the rule costs, in the bare statement."""
    with benchmark("cadences") as (running, report):
        ways = [Way(cadence, Worlds(running, users, cadence), refresh_bare) for cadence in CADENCES]
        results = measure(ways, repetitions)
        title = f"{users:,} due users, the bare statement; ratio to the rolling cadence"
        report.table(title, [result.row() for result in results])
        report.figures("results", [asdict(result) for result in results])
