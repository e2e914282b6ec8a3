"""`make bench`: the benchmarks. Every figure is a ratio to a yardstick of the same run.

Users per second differ from machine to machine and from minute to minute; ratios taken side by side do not.
PostgreSQL is durable (`fsync` and `synchronous_commit` on), and every repetition is verified row by row.
"""

from __future__ import annotations

import click

from bench.anatomy import anatomy
from bench.api import api
from bench.bloat import bloat
from bench.brokers import brokers
from bench.costs import costs
from bench.growth import growth_due, growth_table
from bench.history import year
from bench.host import host
from bench.recovery import recovery
from bench.soak import soak
from bench.steady import idle
from bench.throughput import cadences, throughput

# In the order in which all of them run.
_BENCHMARKS = (
    throughput,
    anatomy,
    costs,
    cadences,
    growth_table,
    growth_due,
    year,
    brokers,
    api,
    host,
    idle,
    bloat,
    soak,
    recovery,
)


@click.group(invoke_without_command=True)
@click.pass_context
def bench(ctx: click.Context) -> None:
    """Measure. Without a name: every benchmark at its usual size, one after the other.

    Results are tables here, and tables, plots and all figures in bench/results. DATABASE_URL and REDIS_URL name
    servers to measure on; without them, it starts its own.
    """
    if ctx.invoked_subcommand is None:
        for command in _BENCHMARKS:
            ctx.invoke(command)


for _command in _BENCHMARKS:
    bench.add_command(_command)

if __name__ == "__main__":
    bench()
