"""`make bench-peers`: the service beside other queues and schedulers that do the same database work, in one run."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import click

from bench.bare import refresh_bare
from bench.measure import Way, measure
from bench.peers.apscheduler import refresh_by_apscheduler
from bench.peers.pg_cron import refresh_by_one_call
from bench.peers.queues import QUEUES, refresh_by_queue
from bench.report import benchmark
from bench.service import refresh_by_service
from bench.worlds import Worlds
from refresh.delivery import MESSAGE_IDS_MAX

_LOADS = {1: "one batch a message", MESSAGE_IDS_MAX: f"up to {MESSAGE_IDS_MAX} batches a message"}


@click.command()
@click.option("--users", default=100_000, show_default=True, type=click.IntRange(1_000), help="Users, all of them due.")
@click.option(
    "--orm-users",
    default=10_000,
    show_default=True,
    type=click.IntRange(1_000),
    help="Users for the loop over ORM objects, beside a yardstick of its own.",
)
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each way, interleaved.")
@click.option(
    "--connections",
    default=2,
    show_default=True,
    type=click.IntRange(1),
    help="To PostgreSQL, of each worker process of a peer that does several messages at a time.",
)
@click.option(
    "--peer", "peers", multiple=True, type=click.Choice([queue.module for queue in QUEUES]),
    help="Measure this queue; may be repeated.  [default: all]",
)  # fmt: skip
def main(users: int, orm_users: int, repetitions: int, connections: int, peers: tuple[str, ...]) -> None:
    """Compare the service with its peers: each does the same statement over the same batches of 100 users.

    The issue's figures are those of `--users 100000 --repetitions 5` on a machine with nothing else to do.
    """
    with benchmark("peers") as (running, report):
        worlds = Worlds(running, users)
        few = Worlds(running, orm_users, name="orm")
        ways = [Way("bare statement, 2 connections", worlds, refresh_bare)]
        for ids, load in _LOADS.items():
            through = partial(refresh_by_service, running, events=False, ids_a_message=ids)
            ways.append(Way(f"service, {load}", worlds, through))
        for queue in QUEUES:
            for ids, load in _LOADS.items():
                if not peers or queue.module in peers:
                    through = partial(
                        refresh_by_queue, running, queue=queue, ids_a_message=ids, connections=connections
                    )
                    ways.append(Way(f"{queue.name}, {load}", worlds, through))
        ways.append(Way("one SQL call, as pg_cron makes it", worlds, lambda url: refresh_by_one_call(url, users)))
        results = measure(ways, repetitions)
        orm = measure(
            [
                Way(f"bare statement, {orm_users:,} users", few, refresh_bare),
                Way(f"APScheduler and ORM objects, {orm_users:,} users", few, refresh_by_apscheduler, by_a_run=False),
            ],
            repetitions,
        )
        title = f"{users:,} due users, two worker processes, batches of 100; ratio to the bare statement"
        report.table(title, [result.row() for result in (*results, *orm)])
        ratios = {result.name: result.ratio for result in (*results, *orm)}
        report.bars("ratios", title, "users per second, bare statement = 1", ratios)
        report.figures("results", [asdict(result) for result in (*results, *orm)])


if __name__ == "__main__":
    main()
