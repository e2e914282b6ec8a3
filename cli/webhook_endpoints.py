"""`credits webhooks endpoints`: who is told of what."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - Click's decorators keep the annotations company

import click

from cli.output import answer, err, json_option, out, table
from cli.session import actor, session
from cli.words import confirm, counted, yes_option
from refresh import webhook_endpoints as domain
from refresh.webhook_deliveries import read_delivery
from refresh.webhook_events import EVENTS, tell_ping
from refresh.webhook_targets import check_target

if TYPE_CHECKING:
    from cli.session import Session

WIDE_COLUMNS = 130
"""A narrower terminal shows the columns that matter most; the id is 36 wide."""

endpoint_argument = click.argument("endpoint", metavar="ENDPOINT", type=click.UUID)


@click.group()
def endpoints() -> None:
    """Who is told of what: add endpoints, list, test and remove them.

    ENDPOINT is its id, as `list` shows it.
    """


@endpoints.command()
@click.argument("url", metavar="URL")
@click.option(
    "--format",
    "format_",
    type=click.Choice(domain.FORMATS),
    default="standard",
    show_default=True,
    help="Signed JSON (Standard Webhooks), or a chat's incoming webhook.",
)
@click.option(
    "--event",
    "events",
    type=click.Choice(EVENTS),
    multiple=True,
    help="May be given several times. Without: what is usual for the format, and never user.refreshed.",
)
@click.option(
    "--no-grants-days",
    type=click.IntRange(1, domain.NO_GRANTS_DAYS_MAX),
    metavar="N",
    help="Tell when nobody was refreshed for N days.",
)
@click.option("--description", metavar="TEXT", help="For people.")
@json_option
def add(*, url: str, format_: domain.Format, events: tuple[str, ...], as_json: bool, **more: Any) -> None:
    """Tell URL what happens from now on. Prints the secret that its messages are signed with: it is shown this once.

    The secret stands on stdout alone, so that it can go straight to where it is kept; what is said goes to stderr.

    The address of a chat is a secret itself: give - for URL, and it is read from standard input, so that it is in no
    shell's history. Private and loopback addresses are refused, unless WEBHOOKS_ALLOW_PRIVATE is true.

    \b
    With --json: what `list --json` says of an endpoint, and secret (null for a chat).

    \b
    Examples:
      credits webhooks endpoints add https://example.com/hooks --event run.finished --event user.refreshed
      credits webhooks endpoints add - --format slack --no-grants-days 3 < slack-url.txt
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    given = sys.stdin.readline().strip() if url == "-" else url
    with session() as opened:
        wanted = domain.Wanted(
            target=check_target(given, allow_private=opened.settings.webhooks_allow_private),
            format=format_,
            events=events or None,
            **more,
        )
        with opened.database.transaction() as connection:
            added, secret = domain.add_endpoint(connection, wanted, actor=actor())
    if as_json:
        answer("", {**added.facts(), "secret": secret}, as_json=True)
        return
    keep = " Keep its secret: it is not shown again." if secret is not None else ""
    err.print(f"Endpoint {added.id} is told of {_told(added)}.{keep}", soft_wrap=True, markup=False)
    if secret is not None:
        click.echo(secret)


@endpoints.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List the endpoints, the oldest first.

    \b
    With --json: endpoints, of which each has id, url (of a chat without its path), format, events, noGrantsDays,
    description, active, inactiveReason, createdBy, createdAt, failures (rounds in a row that it did not take),
    resumeAt.

    \b
    Example:
      credits webhooks endpoints list
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        found = domain.list_endpoints(connection)
    if as_json:
        answer("", {"endpoints": [endpoint.facts() for endpoint in found]}, as_json=True)
    elif found:
        wide = out.width >= WIDE_COLUMNS
        out.print(table("Webhook endpoints", [_row(endpoint, wide=wide) for endpoint in found], whole="endpoint"))
    else:
        out.print("There are no webhook endpoints.")


@endpoints.command()
@endpoint_argument
@json_option
def test(*, endpoint: UUID, as_json: bool) -> None:
    """Send ENDPOINT a test message. A worker takes it within a minute; `credits webhooks deliveries list` shows it.

    \b
    With --json: what `credits webhooks deliveries list --json` says of the message, and data.

    \b
    Example:
      credits webhooks endpoints test 3f2a91c0-5b1e-4c1c-9d5e-0a3b8a1f2c4d
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        written = read_delivery(connection, tell_ping(connection, endpoint))
    answer(
        f"Message {written.id} is in the outbox; a worker sends it within a minute.", written.facts(), as_json=as_json
    )


@endpoints.command()
@endpoint_argument
@yes_option
@json_option
def remove(*, endpoint: UUID, yes: bool, as_json: bool) -> None:
    """Remove ENDPOINT. What was not sent to it yet is not sent any more.

    \b
    With --json: what `list --json` says of the endpoint that was removed.

    \b
    Example:
      credits webhooks endpoints remove 3f2a91c0-5b1e-4c1c-9d5e-0a3b8a1f2c4d --yes
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened:
        there = _read(opened, endpoint)
        confirm(f"{there.shown_url} will be told of nothing any more. Go on?", yes=yes)
        with opened.database.transaction() as connection:
            removed = domain.remove_endpoint(connection, endpoint, actor=actor())
    answer(f"Endpoint {removed.id} is removed.", removed.facts(), as_json=as_json)


def _read(opened: Session, endpoint: UUID) -> domain.Endpoint:
    with opened.database.statements() as connection:
        return domain.read_endpoint(connection, endpoint)


def _told(endpoint: domain.Endpoint) -> str:
    told = list(endpoint.events)
    if endpoint.no_grants_days is not None:
        told.append(f"silence of {counted(endpoint.no_grants_days, 'day')}")
    return ", ".join(told)


def _row(endpoint: domain.Endpoint, *, wide: bool) -> dict[str, Any]:
    state = "active" if endpoint.active else f"off ({endpoint.inactive_reason})" if endpoint.inactive_reason else "off"
    if endpoint.active and endpoint.failures:
        state = f"failing ({endpoint.failures})"
    row = {"endpoint": str(endpoint.id), "url": endpoint.shown_url, "told of": _told(endpoint), "state": state}
    return row | ({"format": endpoint.format, "description": endpoint.description} if wide else {})
