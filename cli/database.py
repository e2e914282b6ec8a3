"""`credits db`: migrations."""

from __future__ import annotations

import click
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from cli.output import answer, json_option
from cli.session import session
from db import ALEMBIC_INI, Database, DatabaseError


@click.group()
def db() -> None:
    """Prepare the database and check it."""


def migrate(database: Database) -> None:
    """Bring the schema to this release."""
    with database.connect() as connection:
        configuration = Config(ALEMBIC_INI)
        configuration.attributes["connection"] = connection
        command.upgrade(configuration, "head")


@db.command()
@json_option
def upgrade(*, as_json: bool) -> None:
    """Create or migrate our tables, in the schema DATABASE_SCHEMA.

    Safe to repeat, and to run while the service works: each lock is waited for 5 seconds at most, and a migration
    that cannot have its lock changes nothing; run it again.
    """
    with session(migrated=False) as opened:
        migrate(opened.database)
        schema = opened.settings.database_schema
        answer(f"Schema {schema} is up to date.", {"schema": schema, "upToDate": True}, as_json=as_json)


@db.command()
@json_option
def check(*, as_json: bool) -> None:
    """Compare the tables with this release; exit 1 where they differ."""
    with session() as opened, opened.database.connect() as connection:
        configuration = Config(ALEMBIC_INI)
        configuration.attributes["connection"] = connection
        configuration.print_stdout = lambda *_args: None
        try:
            command.check(configuration)
        except CommandError as error:
            raise DatabaseError(f"The tables differ from this release: {error}") from error
        schema = opened.settings.database_schema
        answer(f"Schema {schema} is as it should be.", {"schema": schema, "upToDate": True}, as_json=as_json)
