"""The service on Redis and on RabbitMQ, several batches a message and one, beside the bare statement."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.bare import refresh_bare
from bench.measure import Way, measure
from bench.rabbitmq import RabbitMQ
from bench.report import benchmark
from bench.service import refresh_by_service
from bench.worlds import Worlds
from embedded import EmbeddedError, Servers
from refresh.delivery import MESSAGE_IDS_MAX
from settings import CHECKOUT, environment
from tasks.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUE_TYPES = ("quorum", "classic")


@click.command()
@click.option("--users", default=100_000, show_default=True, type=click.IntRange(1_000), help="Users, all of them due.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each way, interleaved.")
@click.option("--rabbitmq-url", metavar="URL", help="A RabbitMQ with a vhost for this alone: its queues are deleted.")
def brokers(users: int, repetitions: int, rabbitmq_url: str | None) -> None:
    """RabbitMQ in the place of Redis: quorum and classic queues, several batches a message and one.

    Without --rabbitmq-url it starts Debian's rabbitmq-server on loopback, with folders of its own. The issue's size is
    the usual one; 1,000,000 users by --users.
    """
    with benchmark("brokers") as (running, report), _rabbitmq(running.state, rabbitmq_url) as rabbitmq:
        worlds = Worlds(running, users)
        places = {"Redis": {"CELERY_BROKER_URL": running.redis_url}} | {
            f"RabbitMQ, {kind} queues": {"CELERY_BROKER_URL": rabbitmq, "CELERY_TASK_DEFAULT_QUEUE_TYPE": kind}
            for kind in QUEUE_TYPES
        }
        sizes = {"": MESSAGE_IDS_MAX, ", one batch a message": 1}
        ways = [
            Way(name + words, worlds, partial(_by_service, running.state, broker, ids))
            for words, ids in sizes.items()
            for name, broker in places.items()
        ]
        results = measure([Way("bare statement, 2 connections", worlds, refresh_bare), *ways], repetitions)
        title = f"{users:,} due users, two workers, batches of 100; ratio to the bare statement"
        report.table(title, [result.row() for result in results])
        report.bars("ratios", title, "users per second, bare statement = 1", {r.name: r.ratio for r in results})
        report.figures("results", [asdict(result) for result in results])


@contextmanager
def _rabbitmq(state: Path, url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    folder = state / "rabbitmq"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with RabbitMQ(folder) as running:
            yield running.url
    except EmbeddedError as error:
        raise SystemExit(f"{error}; or name one with --rabbitmq-url") from error


def _by_service(state: Path, broker: dict[str, str], ids_a_message: int, url: str) -> float:
    """In a process of its own, whose Celery reads the broker from its environment once, as the service's do."""
    done = subprocess.run(  # noqa: S603 - this file
        [sys.executable, "-m", "bench.brokers", broker["CELERY_BROKER_URL"], url, str(state), str(ids_a_message)],
        env=environment(**broker),
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return float(done.stdout)


def _without_queues() -> None:
    """A queue of one type cannot be declared as another."""
    with app.connection_for_write() as connection:
        for queue in app.amqp.queues.values():
            queue(connection.default_channel).delete()


if __name__ == "__main__":
    _broker, _url, _state, _ids = sys.argv[1:]
    _without_queues()
    print(refresh_by_service(Servers(_url, _broker, Path(_state)), _url, events=False, ids_a_message=int(_ids)))
