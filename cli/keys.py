"""`credits keys`: who may call the HTTP API, beside ADMIN_TOKEN."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from cli.output import answer, err, json_option, out, table
from cli.session import actor, session
from cli.types import Instant
from cli.words import moment
from refresh import keys as domain

if TYPE_CHECKING:
    from refresh.keys import Key


@click.group()
def keys() -> None:
    """Make, list and revoke keys of the HTTP API.

    A key is sent as `Authorization: Bearer crs_...`. The database holds its SHA-256 alone: a key that was lost cannot
    be shown again; revoke it and make another.
    """


@keys.command()
@click.option("--name", required=True, help="Who or what will use it, for the list and the audit log.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(domain.SCOPES),
    multiple=True,
    required=True,
    help="What it may: read looks, support also holds and refreshes single users, admin does everything. Repeatable.",
)
@click.option("--expires", "expires_at", type=Instant(), metavar="T", help="It opens nothing from T on; absent: never.")
@json_option
def create(*, name: str, scopes: tuple[str, ...], expires_at: datetime | None, as_json: bool) -> None:
    """Make a key and print it. It is shown this once.

    The key stands on stdout alone, so that it can go straight to where it is kept; what is said of it goes to stderr.
    Give each program a key of its own: then one is revoked without the others, and the audit log tells them apart.

    \b
    With --json: key (the key itself), and what `credits keys list --json` says of it.

    \b
    Examples:
      credits keys create --name support-desk --scope support
      credits keys create --name nightly-report --scope read --expires 2027-01-01T00:00:00Z
      credits keys create --name backend --scope admin | vault kv put secret/credits key=-
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.transaction() as connection:
        made = domain.create_key(connection, name=name, scopes=scopes, expires_at=expires_at, actor=actor())
    if as_json:
        answer("", {"key": made.key, **made.stored.facts()}, as_json=True)
        return
    end = f"until {moment(expires_at)}" if expires_at else "until it is revoked"
    said = f"{made.stored.shown} may {' and '.join(made.stored.scopes)}, {end}. Keep it: it is not shown again."
    err.print(said, soft_wrap=True, markup=False)
    click.echo(made.key)


@keys.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List keys by the beginning of each: those that were revoked last, the newest first.

    The last use is exact to the minute.

    \b
    With --json: keys, of which each has id, prefix, name, scopes, state (active, expired or revoked), createdAt,
    createdBy, expiresAt, lastUsedAt, revokedAt, revokedBy.
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        found = domain.list_keys(connection)
    if as_json:
        answer("", {"keys": [key.facts() for key in found]}, as_json=True)
    elif found:
        out.print(table("Keys", [_row(key) for key in found], whole="key"))
    else:
        out.print("There are no keys yet.")


@keys.command()
@click.argument("key", metavar="KEY")
@json_option
def revoke(*, key: str, as_json: bool) -> None:
    """Revoke a key: the next request that comes with it is refused. There is no way back.

    KEY is the beginning of it (crs_ab12cd34), its id, or the whole key, where one was found that should not be there.

    \b
    With --json: what `credits keys list --json` says of it.

    \b
    Example:
      credits keys revoke crs_ab12cd34
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.transaction() as connection:
        revoked = domain.revoke_key(connection, key, actor=actor())
    answer(f"{revoked.shown} ({revoked.name}) is revoked: it opens nothing any more.", revoked.facts(), as_json=as_json)


def _row(key: Key) -> dict[str, Any]:
    return {
        "key": key.shown,
        "name": key.name,
        "scopes": ", ".join(key.scopes),
        "state": key.state,
        "created": f"{key.created_at.astimezone(UTC):%Y-%m-%d}",
        "by": key.created_by,
        "expires": key.expires_at and f"{key.expires_at.astimezone(UTC):%Y-%m-%d %H:%M}",
        "last used": key.last_used_at and f"{key.last_used_at.astimezone(UTC):%Y-%m-%d %H:%M}",
    }
