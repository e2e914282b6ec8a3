"""`credits webhooks deliveries`: what was sent to endpoints, what was not, and once more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - Click's decorators keep the annotations company

import click

from cli.output import answer, err, json_option, out, table
from cli.session import actor, session
from cli.words import confirm, counted, moment, yes_option
from refresh import webhook_deliveries as domain
from refresh.errors import RefusedError

if TYPE_CHECKING:
    import psycopg

LIMIT = 20
LIMIT_MAX = 1_000
ERROR_SHOWN = 60


@click.group()
def deliveries() -> None:
    """Messages to webhook endpoints: what became of them, and dead ones sent again.

    A message that fails is tried ten times within three days, and is dead then. Delivered ones are kept for 7 days,
    dead ones for 30.
    """


@deliveries.command("list")
@click.option("--status", type=click.Choice(domain.STATUSES), help="Messages of this status alone.")
@click.option("--endpoint", type=click.UUID, metavar="ENDPOINT", help="To this endpoint alone.")
@click.option("--before", type=click.IntRange(1), metavar="DELIVERY", help="Older than this one: the next page.")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=LIMIT, show_default=True, metavar="N", help="At most N."
)
@json_option
def list_(*, status: str | None, endpoint: UUID | None, before: int | None, limit: int, as_json: bool) -> None:
    """List messages, the newest first.

    \b
    With --json: deliveries, of which each has id, messageId (the header webhook-id), endpointId, type, status,
    attempts, nextAttemptAt, lastStatus, lastError, createdAt, finishedAt; and next, to give to --before for the next
    page, null on the last one.

    \b
    Examples:
      credits webhooks deliveries list --status dead
      credits webhooks deliveries list --endpoint 3f2a91c0-5b1e-4c1c-9d5e-0a3b8a1f2c4d --limit 100 --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        found, more = domain.list_deliveries(
            connection, limit=limit, status=status, endpoint_id=endpoint, before=before
        )
    following = found[-1].id if more else None
    if as_json:
        answer("", {"deliveries": [one.facts() for one in found], "next": following}, as_json=True)
    elif found:
        out.print(table("Webhook deliveries", [_row(one) for one in found]))
        if following is not None:
            err.print(f"There are more: --before {following}")
    else:
        out.print("There are no such messages.")


@deliveries.command()
@click.argument("delivery", metavar="[DELIVERY]...", nargs=-1, type=click.IntRange(1))
@click.option("--all-dead", is_flag=True, help="All that are dead, of active endpoints.")
@click.option("--endpoint", type=click.UUID, metavar="ENDPOINT", help="With --all-dead: to this endpoint alone.")
@yes_option
@json_option
def retry(*, delivery: tuple[int, ...], all_dead: bool, endpoint: UUID | None, yes: bool, as_json: bool) -> None:
    """Send dead messages again: their attempts begin anew, under the ids that they had.

    \b
    With --json: retried (how many).

    \b
    Examples:
      credits webhooks deliveries retry 4711 4712
      credits webhooks deliveries retry --all-dead --endpoint 3f2a91c0-5b1e-4c1c-9d5e-0a3b8a1f2c4d --yes
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    if bool(delivery) == all_dead or (endpoint is not None and not all_dead):
        raise click.UsageError("name messages, or --all-dead, which --endpoint narrows")
    with session() as opened:
        if all_dead:
            with opened.database.statements() as connection:
                dead, more = domain.list_deliveries(connection, limit=LIMIT_MAX, status="dead", endpoint_id=endpoint)
            if not dead:
                raise RefusedError("there is no dead message")
            number = f"{'more than ' if more else ''}{counted(len(dead), 'message')}"
            confirm(f"{number} will be sent again. Go on?", yes=yes)
        with opened.database.transaction() as connection:
            retried = _retry(connection, delivery, endpoint)
    answer(f"{counted(retried, 'message')} will be sent again, within a minute.", {"retried": retried}, as_json=as_json)


def _retry(connection: psycopg.Connection[Any], delivery: tuple[int, ...], endpoint: UUID | None) -> int:
    """All of the named ones or none; without names, all that there are."""
    for delivery_id in delivery:
        domain.retry_delivery(connection, delivery_id, actor=actor())
    if delivery:
        return len(delivery)
    retried = piece = domain.retry_dead(connection, actor=actor(), endpoint_id=endpoint)
    while piece == domain.PIECE_ROWS:
        piece = domain.retry_dead(connection, actor=actor(), endpoint_id=endpoint)
        retried += piece
    return retried


def _row(one: domain.Delivery) -> dict[str, Any]:
    last = " ".join(str(part) for part in (one.last_status, one.last_error) if part is not None)
    return {
        "delivery": str(one.id),
        "written": moment(one.created_at),
        "type": one.type,
        "endpoint": str(one.endpoint_id)[:8],
        "status": one.status,
        "attempts": one.attempts,
        "last answer": last if len(last) <= ERROR_SHOWN else f"{last[: ERROR_SHOWN - 1]}…",
    }
