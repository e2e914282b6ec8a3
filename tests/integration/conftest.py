"""Fixtures of the integration tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.integration.command import Cli
from tests.integration.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    import embedded
    from db import Database


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    with database.statements() as connection:
        dsn = connection.info.dsn
    with psycopg.connect(
        dsn, autocommit=True, row_factory=dict_row, options="-c search_path=credits -c timezone=UTC"
    ) as sql:
        yield World(database, sql)


@pytest.fixture
def cli(database_url: str, servers: embedded.Servers) -> Cli:
    return Cli(database_url, servers.redis_url)
