"""The peers that are queues: how their workers are started, and the time of a run through them."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers import work
from db import Database, one
from embedded.processes import Supervisor
from refresh import totals
from settings import CHECKOUT, environment

if TYPE_CHECKING:
    from psycopg import Connection

    from embedded import Servers

PATIENCE_SECONDS = 600.0
SETTLING_SECONDS = 1.0
"""From a worker's connection to PostgreSQL to its listening at the queue, with much to spare."""


@dataclass(frozen=True)
class Queue:
    """A queue and its two worker processes.

    Attributes:
        name: of the row.
        module: in bench/peers/; its `publisher()` publishes messages.
        worker: the command, a program of this environment and its arguments.
        commands: how often it is started; once where it starts both processes itself.
        several: whether a process does several messages at a time.
        prepare: a command that has to run on a new database.
    """

    name: str
    module: str
    worker: str
    commands: int = 2
    several: bool = True
    prepare: str | None = None


QUEUES = (
    Queue("Dramatiq", "dramatiq", "dramatiq bench.peers.dramatiq --processes 2 --threads {connections}", commands=1),
    Queue(
        "taskiq",
        "taskiq",
        "taskiq worker bench.peers.taskiq:broker --workers 2 --max-async-tasks {connections} --max-prefetch 4 "
        "--log-level WARNING",
        commands=1,
    ),
    Queue("arq", "arq", "python -m bench.peers.arq"),
    Queue("RQ", "rq", "python -m bench.peers.rq", several=False),
    Queue(
        "Procrastinate",
        "procrastinate",
        "python -m bench.peers.procrastinate",
        prepare="procrastinate --app=bench.peers.procrastinate.app schema --apply",
    ),
)

# Dramatiq's threads poll, and look again after up to a second when the queue was empty; in milliseconds.
_VARIABLES = {"dramatiq_worker_timeout": "10"}

# Its last batch's end, in the database's clock: how often we look at it does not count.
_SECONDS = """
SELECT extract(epoch FROM max(b.finished_at) - max(r.started_at))::float, bool_and(b.status = 'done')
FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
"""
_CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"


def refresh_by_queue(running: Servers, url: str, queue: Queue, *, ids_a_message: int, connections: int) -> float:
    """Refresh everybody; returns the seconds from the scan's start to the run's finish, publishing included.

    Args:
        running: the servers.
        url: the database.
        queue: which of `QUEUES`.
        ids_a_message: how many batches a message carries at most.
        connections: of each worker process, where it does several messages at a time.
    """
    variables = environment(
        DATABASE_URL=url,
        REDIS_URL=running.redis_url,
        PYTHONPATH=str(CHECKOUT),
        **{work.CONNECTIONS_VARIABLE: str(connections)},
        **_VARIABLES,
    )
    log = running.state / f"{queue.module}.log"
    log.unlink(missing_ok=True)
    if queue.prepare:
        _run(_command(queue.prepare), variables)
    with Supervisor() as supervisor, Database(url, "credits").statements() as connection:
        for number in range(1, queue.commands + 1):
            worker = _command(queue.worker.format(connections=connections))
            supervisor.start(f"{queue.module}{number}", worker, env=variables, cwd=CHECKOUT, log=log)
        deadline = time.monotonic() + PATIENCE_SECONDS
        expected = 2 * connections if queue.several else 2
        while one(connection.execute(_CONNECTIONS, (work.NAME,)))[0] < expected:
            _wait(supervisor, deadline, log)
        time.sleep(SETTLING_SECONDS)
        _run(_command(f"python -m bench.peers.publish {queue.module} {ids_a_message}"), variables)
        while not one(connection.execute(_SECONDS))[1]:
            _wait(supervisor, deadline, log)
        if "Traceback" in log.read_text():
            raise SystemExit(f"{queue.name} met with an error, so its figure would say nothing of it; see {log}")
        return _finish(connection)


def _finish(connection: Connection) -> float:
    seconds = float(one(connection.execute(_SECONDS))[0])
    started = time.perf_counter()
    totals.finish_runs(connection)
    return seconds + time.perf_counter() - started


def _command(text: str) -> list[str]:
    """A program that lies beside our own Python."""
    program, *arguments = text.split()
    return [str(Path(sys.executable).parent / program), *arguments]


def _run(command: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(  # noqa: S603 - our own programs
        command, env=variables, cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")


def _wait(supervisor: Supervisor, deadline: float, log: Path) -> None:
    ended = supervisor.check()
    if ended is not None or time.monotonic() > deadline:
        raise SystemExit(f"the peer's workers did not do it: {ended or 'no end in sight'}; see {log}")
    time.sleep(0.1)
