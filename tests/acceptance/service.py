"""The service under test: its processes, its broker and what a test does to them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery
from pytest_celery import CeleryTestSetup

from celeryconfig import QueueNames, TaskNames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import redis
    from pytest_celery import CeleryTestNode, CeleryTestWorker

    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import Launcher, LocalFlower

DEADLINE_SECONDS = 30.0
POLL_SECONDS = 0.02


class ServiceSetup(CeleryTestSetup):  # type: ignore[misc] # the plugin ships no types
    """pytest-celery's setup with a client app that routes and serialises as the service does."""

    @classmethod
    def create_setup_app(cls, celery_setup_config: Mapping[str, Any], celery_setup_app_name: str) -> Celery:
        """The app of the test's own process: it only publishes and asks."""
        app = Celery(celery_setup_app_name, set_as_current=False)
        app.config_from_object("celeryconfig")
        app.conf.update(broker_url=celery_setup_config["broker_url"])
        return app


class Service:
    """One deployment: a broker, a first worker, and what the test starts besides.

    Args:
        setup: pytest-celery's, with the first worker ready.
        launcher: starts further processes.
        env: the environment of the first worker and of whatever joins it.
        ledger: the database.
    """

    def __init__(self, setup: ServiceSetup, launcher: Launcher, env: Mapping[str, str], ledger: Ledger) -> None:
        self.app: Celery = setup.app
        self.broker: CeleryTestNode = setup.broker
        self.worker: CeleryTestWorker = setup.worker
        self._worker_cls = type(self.worker)
        self._launcher = launcher
        self._env = env
        self._ledger = ledger

    @property
    def env(self) -> dict[str, str]:
        """What its processes have, for a command that asks about it."""
        return dict(self._env)

    @property
    def redis(self) -> redis.Redis:
        """A client of the broker."""
        client: redis.Redis = self.broker.container.client
        return client

    def start_worker(self, **variables: str) -> CeleryTestWorker:
        return self._worker_cls(self._launcher.worker({**self._env, **variables}), self.app)

    def start_beat(self, name: str = "beat", **variables: str) -> CeleryTestNode:
        return self._launcher.beat({**self._env, **variables}, name)

    def start_flower(self) -> LocalFlower:
        return self._launcher.flower(self._env)

    def send(self, task: str, *arguments: object) -> None:
        """Publish as anybody with access to the broker can, over a connection that no earlier fault has touched."""
        with self.app.connection_for_write() as connection:
            self.app.send_task(task, arguments, connection=connection)

    def scan(self) -> Any:
        """What beat's next tick does; returns the run that came of it."""
        before = len(self._ledger.runs_with_users())
        self._ledger.an_hour_passes()
        self.send(TaskNames.SCAN)
        self.until(lambda: len(self._ledger.runs_with_users()) > before, "the scan opened a run")
        return self._ledger.runs_with_users()[-1]

    def waiting(self) -> int:
        """Messages that no worker has taken."""
        return sum(int(self.redis.llen(name)) for name in QueueNames.ALL)

    def taken(self, task: str, *workers: CeleryTestWorker) -> int:
        """Messages of a task that these workers have taken and are through with: one busy with a task cannot answer."""
        names = [worker.hostname() for worker in workers]
        answers = self.app.control.inspect(names, timeout=DEADLINE_SECONDS, limit=len(names)).stats() or {}
        assert sorted(answers) == sorted(names)
        return sum(answer["total"].get(task, 0) for answer in answers.values())

    def until_finished(self, run_id: object) -> None:
        self.until(lambda: self._ledger.run_status(run_id) != "running", "the run finished")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll; the processes' logs come with the failure (conftest.py)."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not in {DEADLINE_SECONDS:.0f} seconds: {what}")
            time.sleep(POLL_SECONDS)
