"""Alembic's environment: one connection, the service's schema, short lock waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alembic import context
from sqlalchemy import Connection, text

import settings
from db import Database
from models import Base

if TYPE_CHECKING:
    from collections.abc import MutableMapping

# A migration that waits for a lock blocks every query that comes behind it. Give up early and run again.
LOCK_TIMEOUT = "5s"
# Building an index on a large table takes its time; the pool's limit is meant for batches.
STATEMENT_TIMEOUT = "0"


def _partitions(connection: Connection) -> frozenset[str]:
    """Tables that belong to a parent: upkeep makes them, no model describes them."""
    rows = connection.execute(
        text("SELECT relname FROM pg_class WHERE relispartition AND relnamespace = current_schema()::regnamespace")
    )
    return frozenset(rows.scalars())


def _migrate(connection: Connection, schema: str) -> None:
    with connection.begin():  # Alembic then opens its own, one per migration
        # IF NOT EXISTS would ask for the right to create schemas even where ours is there.
        if connection.execute(text("SELECT to_regnamespace(:schema) IS NULL"), {"schema": schema}).scalar_one():
            connection.execute(text(f'CREATE SCHEMA "{schema}"'))  # a checked identifier: settings.py
        connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
        connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"))
        partitions = _partitions(connection)

    def ours(name: str | None, type_: str, _parents: MutableMapping[Any, Any]) -> bool:
        return not (type_ == "table" and name in partitions)

    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_server_default=True,
        include_name=ours,
        transaction_per_migration=True,
        schema_name=schema,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    """Migrate over the caller's connection (`credits db upgrade`), or over one of our own (`alembic`)."""
    loaded = settings.load()
    given = context.config.attributes.get("connection")
    if given is not None:
        _migrate(given, loaded.database_schema)
        return
    if loaded.database_url is None:
        raise SystemExit("DATABASE_URL is not set: use `credits db upgrade`, which starts the embedded server.")
    with Database(loaded.database_url, loaded.database_schema).connect() as connection:
        _migrate(connection, loaded.database_schema)


main()
