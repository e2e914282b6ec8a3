"""The PostgreSQL of a test process: a fresh database for each test, copied from a migrated template."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import embedded

_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is ours alone
_MEMORY_BYTES_MIN = 4 * 2**30
_IN_MEMORY = """
SELECT d.datname FROM pg_database AS d JOIN pg_tablespace AS t ON t.oid = d.dattablespace WHERE t.spcname = 'memory'
"""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Cluster:
    """The PostgreSQL of this test process, with a migrated template to copy databases from."""

    servers: embedded.Servers
    template: str
    tablespace: str

    def url(self, database: str) -> str:
        head, _, tail = self.servers.database_url.partition("/credits?")
        return settings.load().with_urls(database_url=f"{head}/{database}?{tail}", redis_url=None).database_url or ""

    def admin(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.servers.database_url, autocommit=True)

    def create(self, template: str) -> str:
        name = f"test_{next(_numbers)}"
        with self.admin() as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {} TABLESPACE {}").format(
                    *map(sql.Identifier, (name, template, self.tablespace))
                )
            )
            # Our lock waits are half of this: a test that holds a lock on purpose is not raced on a slow machine.
            connection.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '20s'").format(sql.Identifier(name)))
        return name

    def drop(self, name: str) -> None:
        with self.admin() as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def tablespace(servers: embedded.Servers) -> Iterator[str]:
    """The name of the tablespace for the databases of these servers: in memory, where there is enough.

    Ext4 takes 0.4 s for a database's thousand files while it still remembers those of the last one; memory 0.03 s.
    """
    if not _MEMORY.is_dir() or shutil.disk_usage(_MEMORY).free < _MEMORY_BYTES_MIN:
        yield "pg_default"
        return
    folder = _MEMORY / f"credits-{hashlib.sha256(os.fsencode(servers.state)).hexdigest()[:16]}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(mode=0o700)
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        if os.geteuid() == 0:  # PostgreSQL is somebody else then
            (data,) = connection.execute("SHOW data_directory").fetchall()[0]
            shutil.chown(folder, Path(data).owner(), Path(data).group())
        connection.execute(sql.SQL("CREATE TABLESPACE memory LOCATION {}").format(sql.Literal(str(folder))))
        yield "memory"
        for (name,) in connection.execute(_IN_MEMORY).fetchall():
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
        connection.execute("DROP TABLESPACE memory")
    shutil.rmtree(folder)
