"""Fixtures that every kind of test shares: real servers, and a fresh migrated database for each test."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

import embedded
import settings
from cli.database import migrate
from db import Database
from tests.cluster import Cluster, tablespace

if TYPE_CHECKING:
    from collections.abc import Iterator

# `make test-long`: pytest --hypothesis-profile=long
hypothesis.settings.register_profile("long", max_examples=200_000, deadline=None)


# A test that holds a lock on purpose must not lose a race on a slow machine.
LOCK_TIMEOUT_MS = 10_000


PROCESSES_MAX = 16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres-bin",
        type=Path,
        default=None,
        metavar="DIR",
        help="run the tests on another PostgreSQL than the embedded one: the folder of its programs",
    )


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[embedded.Servers]:
    """PostgreSQL and Redis for this test process, without fsync and with no data.

    The first name that no other test process uses: a run that was killed leaves its name, and no more, to the next.
    """
    state = settings.load().credits_state_dir
    programs = request.config.getoption("--postgres-bin")
    with ExitStack() as stack:
        for number in range(1, PROCESSES_MAX + 1):
            start = embedded.servers(
                f"test-{number}", state, fresh=True, postgres_options=embedded.FLEETING, postgres_programs=programs
            )
            try:
                running = stack.enter_context(start)
            except embedded.EmbeddedError as error:
                if number == PROCESSES_MAX or "in use" not in str(error):
                    raise
            else:
                yield running
                return


@pytest.fixture(scope="session")
def cluster(servers: embedded.Servers) -> Iterator[Cluster]:
    with tablespace(servers) as name:
        made = Cluster(servers, "credits_template", name)
        with made.admin() as connection:
            connection.execute("CREATE DATABASE credits_template")
        template = Database(made.url(made.template), "credits")
        migrate(template)
        template.close()
        yield made


@pytest.fixture
def database_url(cluster: Cluster) -> Iterator[str]:
    """The URL of a fresh migrated database."""
    name = cluster.create(cluster.template)
    yield cluster.url(name)
    cluster.drop(name)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh migrated database."""
    opened = Database(database_url, "credits", name="test", pool=2, lock_timeout_ms=LOCK_TIMEOUT_MS)
    yield opened
    opened.close()
