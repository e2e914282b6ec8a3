"""The service's own processes, as `credits up`, `credits demo` and the benchmark start them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from celeryconfig import QueueNames
from settings import CHECKOUT, environment

if TYPE_CHECKING:
    from pathlib import Path

    from embedded import Servers
    from embedded.processes import Supervisor


class Service:
    """Starts workers, beat and Flower against given servers.

    Args:
        supervisor: who runs and ends them.
        running: the servers.
        logs: a folder for a log file each; None: their lines go to our stderr.
        variables: further environment variables.
    """

    def __init__(self, supervisor: Supervisor, running: Servers, *, logs: Path | None = None, **variables: str) -> None:
        self._supervisor = supervisor
        self._logs = logs
        self._environment = environment(
            DATABASE_URL=running.database_url,
            CELERY_BROKER_URL=running.redis_url,  # before REDIS_URL, and before a broker of our own environment
            CREDITS_STATE_DIR=str(running.state),
            **variables,
        )

    def start_worker(self, name: str) -> None:
        """A worker over all that refreshing takes: one process, one task at a time."""
        self._start_worker(name, QueueNames.REFRESH)

    def start_webhooks(self) -> None:
        """A worker that sends webhooks: it may have to wait for somebody's server, and does nothing else."""
        self._start_worker("webhooks", (QueueNames.WEBHOOKS,))

    def _start_worker(self, name: str, queues: tuple[str, ...]) -> None:
        taken = f"--queues={','.join(queues)}"
        self._start(name, "worker", taken, "--hostname", f"{name}@%h", "--without-gossip", "--without-mingle")

    def start_beat(self) -> None:
        """Beat, which rings each hour."""
        self._start("beat", "beat")

    def start_flower(self, port: int, credentials: str) -> None:
        """Flower on loopback, for looking only. The password goes by the environment: arguments show in `ps`."""
        self._environment["FLOWER_BASIC_AUTH"] = credentials
        self._start(
            "flower",
            "flower",
            "--address=127.0.0.1",
            f"--port={port}",
            "--read-only",
            "--purge-offline-workers=10",
            "--max-tasks=10000",
        )

    def start_api(self, port: int, **secrets: str) -> None:
        """The HTTP API on loopback. Secrets go by the environment, as above."""
        self._environment.update(secrets)
        # Streams of a run's progress last as long as somebody looks: they are cut, and the browser connects again.
        options = ("--no-access-log", "--no-server-header", "--timeout-graceful-shutdown=5")
        self._run("api", "uvicorn", "api:app", f"--port={port}", *options)

    def _start(self, name: str, *arguments: str) -> None:
        self._run(name, "celery", "-A", "tasks", *arguments)

    def _run(self, name: str, *arguments: str) -> None:
        self._supervisor.start(
            name,
            [sys.executable, "-m", *arguments],
            env=self._environment,
            cwd=CHECKOUT,
            log=self._logs / f"{name}.log" if self._logs else None,
        )
