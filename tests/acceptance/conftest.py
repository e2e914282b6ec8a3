"""Acceptance tests: pytest-celery's fixtures, with processes of this machine in the place of containers.

The names `default_*` and `celery_*` are pytest-celery's own: overriding them is how it is configured. A module
overrides `default_worker_env` to give its processes other settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pytest_celery import CeleryBrokerCluster

import settings
from tests.acceptance.http_service import Deployment, deployed
from tests.acceptance.ledger import Ledger
from tests.acceptance.nodes import Launcher, LocalRedis, LocalWorker
from tests.acceptance.service import Service, ServiceSetup

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from pytest_celery import RedisTestBroker

    from db import Database
    from tests.cluster import Cluster
    from tests.integration.world import World


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure without the processes' logs explains nothing."""
    report = yield
    shared = item.funcargs.get("deployment")
    launcher = shared.launcher if isinstance(shared, Deployment) else item.funcargs.get("launcher")
    if report.failed and isinstance(launcher, Launcher):
        # The plugin adds the last log of the first worker; here are all logs of all.
        plain = [section for section in report.sections if not section[0].startswith("default_")]
        logs = [(f"log of {process.name}", process.all_logs()) for process in launcher.processes]
        report.sections = plain + logs
    return report


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def deployment(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The HTTP API with a database and a broker of its own, for all tests of a module."""
    with deployed(cluster, tmp_path_factory.mktemp("deployment")) as made:
        yield made


@pytest.fixture(scope="module")
def worker(deployment: Deployment) -> LocalWorker:
    """A worker beside it, for the module."""
    return deployment.start_worker()


@pytest.fixture
def world(deployment: Deployment) -> World:
    """The module's database; users of earlier tests are asleep, and nothing is paused."""
    deployment.rest()
    return deployment.world


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    with database.statements() as connection:
        yield Ledger(database, connection)


@pytest.fixture
def default_redis_broker(launcher: Launcher) -> LocalRedis:
    return launcher.redis()


@pytest.fixture
def celery_broker_cluster(celery_redis_broker: RedisTestBroker) -> CeleryBrokerCluster:
    """Redis alone: the plugin would run each test again on RabbitMQ."""
    return CeleryBrokerCluster(celery_redis_broker)


@pytest.fixture
def celery_backend_cluster() -> None:
    """There is none: results are ignored."""


@pytest.fixture
def celery_setup_cls() -> type[ServiceSetup]:
    return ServiceSetup


@pytest.fixture
def default_worker_container_cls() -> type[LocalWorker]:
    return LocalWorker


@pytest.fixture
def default_worker_env(database_url: str, default_redis_broker: LocalRedis, tmp_path: Path) -> dict[str, str]:
    return settings.environment(
        DATABASE_URL=database_url, REDIS_URL=default_redis_broker.url, CREDITS_STATE_DIR=str(tmp_path / "worker")
    )


@pytest.fixture
def default_worker_container(
    launcher: Launcher, default_worker_env: dict[str, str], default_worker_command: list[str]
) -> LocalWorker:
    return launcher.worker(default_worker_env, default_worker_command)


@pytest.fixture
def service(
    celery_setup: ServiceSetup, launcher: Launcher, default_worker_env: dict[str, str], ledger: Ledger
) -> Service:
    made = Service(celery_setup, launcher, default_worker_env, ledger)
    # A worker's start ends with an upkeep, which opens the current slot: for nobody, as there are no users yet.
    made.until(lambda: ledger.value("SELECT count(*) FROM credit_refresh_runs") == 1, "the worker looked around")
    return made
