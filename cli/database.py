"""`credits db`: migrations, and the trigger that is an option."""

from __future__ import annotations

from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING

import click
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

import settings
from cli.output import answer, json_option
from cli.session import actor, session
from db import ALEMBIC_INI, Database, DatabaseError
from refresh import grants as rights
from refresh.switch import TRIGGER_LOCK_TIMEOUT, turn_trigger

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.group()
def db() -> None:
    """Prepare the database and check it."""


@contextmanager
def alembic(database: Database) -> Iterator[Config]:
    """Alembic's configuration over a connection of ours, for `alembic.command`."""
    with database.connect() as connection:
        # What it prints of its own doing goes nowhere: our answers are on stdout.
        yield Config(ALEMBIC_INI, stdout=StringIO(), attributes={"connection": connection})


def migrate(database: Database) -> None:
    """Bring the schema to this release."""
    with alembic(database) as configuration:
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
    with session() as opened, alembic(opened.database) as configuration:
        try:
            command.check(configuration)
        except CommandError as error:
            raise DatabaseError(f"The tables differ from this release: {error}") from error
        schema = opened.settings.database_schema
        answer(f"Schema {schema} is as it should be.", {"schema": schema, "upToDate": True}, as_json=as_json)


@db.command()
@click.argument("state", type=click.Choice(["on", "off"]))
@json_option
def triggers(*, state: str, as_json: bool) -> None:
    """Turn the refresh on spend on or off: a trigger on our users table.

    With it, an UPDATE that lowers the balance of a user who is due refreshes them first, in the same transaction,
    under the same rule and the same unique key as the scan. For hosts that cannot call refresh_credits_if_due() before
    a spend. It costs a spend of a user who is not due one comparison.

    Safe to repeat, and to run while the service works: the table's lock is waited for 5 seconds at most.

    \b
    Examples:
      credits db triggers on
      credits db triggers off --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    on = state == "on"
    with session() as opened, opened.database.transaction(lock_timeout=TRIGGER_LOCK_TIMEOUT) as connection:
        changed = turn_trigger(connection, on=on, actor=actor())
    said = "A spend now refreshes whoever is due first" if on else "A spend refreshes nobody"
    text = f"{said}." if changed else f"The trigger was {state} already."
    answer(text, {"triggers": on, "changed": changed}, as_json=as_json)


_HEADINGS = {
    "host": "reads users, plans, history and runs; adds users, spends, holds; calls the refresh functions",
    "worker": "runs workers, beat, and the commands about runs and holds",
    "api": "serves the HTTP API: what a worker may, users' settings, endpoints of webhooks; looks keys up",
    "read": "reads everything, changes nothing",
}


@db.command()
@click.option("--host", "hosts", multiple=True, metavar="ROLE", help="Your app's: it reads, adds users, spends, holds.")
@click.option("--worker", "workers", multiple=True, metavar="ROLE", help="Of workers and beat.")
@click.option("--api", "apis", multiple=True, metavar="ROLE", help="Of the HTTP API.")
@click.option("--read", "readers", multiple=True, metavar="ROLE", help="Of support and reports: it reads everything.")
@json_option
def grants(
    *, hosts: tuple[str, ...], workers: tuple[str, ...], apis: tuple[str, ...], readers: tuple[str, ...], as_json: bool
) -> None:
    """Print the SQL that gives roles what they need in our schema, and no more. Nothing is asked or changed.

    Have it run by whoever owns the tables: the role that ran `credits db upgrade`. It is one transaction, takes away
    what the roles had in the schema before, and can be repeated; repeat it after an upgrade. The roles must exist, and
    must neither own the tables nor be superusers: CREATE ROLE app LOGIN PASSWORD '...'.

    A host's role cannot touch history, audit rows, runs, batches, plans or settings: what its inserts, spends and
    holds leave there is written by our triggers. Workers make the partitions of the months to come. `db upgrade`,
    `db triggers`, `plans set`, `users import`, `keys create`, `keys revoke`, `pause`, `resume` and dropping months
    (`credits retention --months`) are the owner's.

    \b
    With --json: statements (each with role, kind, sql), in their order; kind is null where it is everybody's.

    \b
    Examples:
      credits db grants --host app --worker workers --api api --read support | psql "$OWNERS_DATABASE_URL"
      credits db grants --host app --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    asked: list[tuple[rights.Kind, str]] = [
        *(("host", role) for role in hosts),
        *(("worker", role) for role in workers),
        *(("api", role) for role in apis),
        *(("read", role) for role in readers),
    ]
    if not asked:
        raise click.UsageError("name a role: --host ROLE, --worker ROLE, --api ROLE or --read ROLE")
    made = rights.grants(settings.load().database_schema, asked)
    if as_json:
        facts = [
            {"role": part.role, "kind": part.kind, "sql": statement} for part in made for statement in part.statements
        ]
        answer("", {"statements": facts}, as_json=True)
        return
    click.echo("BEGIN;")
    for part in made:
        if part.kind is not None:
            click.echo(f"-- {part.kind}: {_HEADINGS[part.kind]}")
        for statement in part.statements:
            click.echo(f"{statement};")
    click.echo("COMMIT;")
