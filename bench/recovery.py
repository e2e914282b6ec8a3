"""A killed worker under the timetable of a service at work: how long until the batches that it had in hand are done."""

from __future__ import annotations

import random
import signal
import statistics
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import click
import psutil

from bench.report import benchmark
from bench.service import PATIENCE_SECONDS, WORKERS, await_workers
from bench.worlds import SLOT, Worlds
from cli.output import err
from cli.processes import Service
from db import Database, one
from embedded import Servers
from embedded.processes import Supervisor
from refresh import runs
from refresh.selection import Selection
from tasks.app import use_broker
from tasks.publish import publish_asked

if TYPE_CHECKING:
    from uuid import UUID

BAR_SECONDS = 120
BAR_MEDIAN_SECONDS = 60
KILL_WITHIN_SECONDS = 0.25
"""Of the publishing's end: two workers take twice as long for the run."""

_FINISHED = "SELECT finished_at IS NOT NULL FROM credit_refresh_runs WHERE id = %s"


class _Stack:
    """Workers and beat as they run in production: upkeep rings each minute.

    Args:
        running: the servers.
        url: the database.
        supervisor: of the processes.
    """

    def __init__(self, running: Servers, url: str, supervisor: Supervisor) -> None:
        servers = Servers(database_url=url, redis_url=running.redis_url, state=running.state)
        variables = {"CREDIT_REFRESH_INTERVAL_HOURS": f"{SLOT.total_seconds() / 3_600:.0f}", "LOG_LEVEL": "ERROR"}
        self._service = Service(supervisor, servers, logs=running.state, **variables)
        self._started = 0
        self._service.start_beat()
        for _ in range(WORKERS):
            self.start_worker()
        use_broker(running.redis_url)
        await_workers(supervisor)

    def start_worker(self) -> None:
        """One more, as what supervises containers starts one for each that died."""
        self._started += 1
        self._service.start_worker(f"worker{self._started}")

    def kill_one(self) -> None:
        """SIGKILL of a worker, and another in its place."""
        random.choice(_workers()).send_signal(signal.SIGKILL)  # noqa: S311 - which of two
        self.start_worker()


def _workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # one that was killed before, and has not been waited for
            if {"tasks", "worker"} <= {*child.cmdline()}:
                found.append(child)
    return found


def _open(database: Database, amount: int) -> UUID:
    """A forced run over everybody: each round grants anew."""
    request = runs.Request("cli", "bench", 100, force=True, amount=amount, reason="recovery")
    with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        opened = runs.open_run(connection, request, Selection())
    if not isinstance(opened, runs.Opened):
        raise SystemExit(opened.text)
    publish_asked(database, opened.run_id, max_attempts=5)
    return opened.run_id


def _await(database: Database, run_id: UUID) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    with database.statements() as connection:
        while not one(connection.execute(_FINISHED, (run_id,)))[0]:
            if time.monotonic() > deadline:
                raise SystemExit("the killed worker's batches were not done: no end in sight")
            time.sleep(0.1)


@click.command()
@click.option("--kills", default=12, show_default=True, type=click.IntRange(1), help="One after the other.")
@click.option("--users", default=20_000, show_default=True, type=click.IntRange(1_000), help="In each run.")
def recovery(*, kills: int, users: int) -> None:
    """How long the batches of a killed worker wait, with upkeep at its usual minute.

    A worker is killed (SIGKILL) at a random instant of a run, with a message and its batches in hand, and another one
    started in its place. Counted from the kill to the run's end; kills that hit nothing are not counted.
    """
    with benchmark("recovery") as (running, report), ExitStack() as stack:
        worlds = Worlds(running, users, name="recovery")
        stack.callback(worlds.drop)
        database = Database(worlds.template_url, "credits", pool=2)
        stack.callback(database.close)
        supervisor = stack.enter_context(Supervisor())
        service = _Stack(running, worlds.template_url, supervisor)
        seconds: list[float] = []
        rounds = 0
        while len(seconds) < kills:
            rounds += 1
            time.sleep(random.uniform(0, 60))  # noqa: S311 - upkeep's minute begins wherever it does
            run_id = _open(database, 1_000_000 + rounds)
            time.sleep(random.uniform(0, KILL_WITHIN_SECONDS))  # noqa: S311
            service.kill_one()
            killed = time.monotonic()
            _await(database, run_id)
            took = time.monotonic() - killed
            if took > 1:  # the other worker alone needs less for what nobody had in hand
                seconds.append(took)
            err.print(f"{len(seconds)}/{kills}: done {took:.1f} s after the kill", highlight=False)
        _check_books(worlds.template_url, users, rounds)
        report.table(
            f"{kills} kills, each in a run of {users:,} users",
            [
                {"": "median", "seconds": f"{statistics.median(seconds):.1f}", "bar": f"≤ {BAR_MEDIAN_SECONDS}"},
                {"": "longest", "seconds": f"{max(seconds):.1f}", "bar": f"≤ {BAR_SECONDS}"},
            ],
        )
        report.figures("seconds", seconds)


def _check_books(url: str, users: int, rounds: int) -> None:
    """Every round has granted everybody, once."""
    with Database(url, "credits").statements() as connection:
        granted = one(connection.execute("SELECT count(*) FROM credit_refresh_histories WHERE status = 'refreshed'"))
    if granted != (users * rounds,):
        raise SystemExit(f"{granted[0]:,} grants instead of {users * rounds:,}")
