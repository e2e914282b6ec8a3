"""The PostgreSQL of a test process: a fresh database for each test, copied from a migrated template."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

import settings

if TYPE_CHECKING:
    import embedded

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Cluster:
    """The PostgreSQL of this test process, with a migrated template to copy databases from."""

    servers: embedded.Servers
    template: str

    def url(self, database: str) -> str:
        head, _, tail = self.servers.database_url.partition("/credits?")
        return settings.load().with_urls(database_url=f"{head}/{database}?{tail}", redis_url=None).database_url or ""

    def admin(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.servers.database_url, autocommit=True)

    def create(self, template: str) -> str:
        name = f"test_{next(_numbers)}"
        with self.admin() as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
            )
            # Our lock waits are half of this: a test that holds a lock on purpose is not raced on a slow machine.
            connection.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '20s'").format(sql.Identifier(name)))
        return name

    def drop(self, name: str) -> None:
        with self.admin() as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
