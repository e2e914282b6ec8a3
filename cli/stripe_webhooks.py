"""Stripe's events on the command line: `credits webhooks list | show | replay | link`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import click
import psycopg

from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, err, facts, json_option, out, progress, table
from cli.session import actor, session
from cli.words import confirm, counted, moment, yes_option
from db import one_line, transaction
from refresh import stripe_customers, stripe_events, stripe_inbox
from refresh.errors import NotFoundError, RefusedError
from refresh.stripe_inbox import OUTCOMES, Stored, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from cli.session import Session

LIMIT = 20
LIMIT_MAX = 1_000
WIDE_COLUMNS = 150
"""As for `credits runs list`: a narrower terminal shows the columns that matter most."""

_outcome = click.option("--outcome", type=click.Choice(sorted(OUTCOMES)), help="Events of this outcome alone.")
_customer = click.option("--customer", metavar="CUSTOMER", help="This customer's events alone.")


@click.command("list")
@_outcome
@click.option("--unsettled", is_flag=True, help="Not processed yet, given up, or of an unknown customer.")
@click.option("--type", metavar="TYPE", help="Events of this type alone, such as invoice.paid.")
@_customer
@click.option("--user", metavar="USER", help="Events about this user alone.")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=LIMIT, show_default=True, metavar="N", help="At most N."
)
@json_option
def list_(*, limit: int, as_json: bool, **filters: Any) -> None:
    """List Stripe's events and what became of each, the last ones first.

    An event without an outcome is not processed yet; `looks again` says when upkeep looks at it again. What each
    outcome means is in docs/recipes/stripe.md, and `credits webhooks show EVENT` says it of one.

    \b
    With --json: events, of which each has eventId, type, livemode, createdAt (by Stripe's clock), receivedAt,
    processedAt, customerId, subscriptionId, periodStart, periodEnd, outcome, userId, runId, note, error,
    looksAgainAt; and more, whether there are more than --limit.

    \b
    Examples:
      credits webhooks list
      credits webhooks list --unsettled
      credits webhooks list --user user-42 --type invoice.paid --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        found, more = stripe_inbox.list_events(connection, Wanted(**filters), limit=limit)
    if as_json:
        answer("", {"events": [event.facts() for event in found], "more": more}, as_json=True)
        return
    if not found:
        out.print("There are no such events." if any(filters.values()) else "Stripe has sent no events yet.")
        return
    row = _wide if out.width >= WIDE_COLUMNS else _narrow
    out.print(table("Stripe's events", [row(event) for event in found], whole="event"))
    if more:
        err.print(f"There are more than {limit:,}: --limit shows them.")


@click.command()
@click.argument("event", metavar="EVENT")
@json_option
def show(*, event: str, as_json: bool) -> None:
    """Show one event: what became of it and why, and what Stripe sent.

    What Stripe sent may hold a customer's name and address.

    \b
    With --json: what `credits webhooks list --json` says of an event; text, what became of it in words; and payload.

    \b
    Example:
      credits webhooks show evt_1Pqv0eLkdIwHu7ixOqlzZ0vH
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        found = stripe_inbox.read(connection, event)
        payload = stripe_inbox.read_payload(connection, event)
    if as_json:
        answer("", {**found.facts(), "text": found.text, "payload": payload}, as_json=True)
        return
    period = f"{_moment(found.period_start)} to {_moment(found.period_end)}" if found.period_start else None
    shown = {
        "type": found.type + ("" if found.livemode else " (test mode)"),
        "created": moment(found.created),
        "received": moment(found.received_at),
        "customer": found.customer_id,
        "subscription": found.subscription_id,
        "period": period,
        "user": found.user,
        "outcome": found.outcome or "none yet",
        "because": found.text,
        "run": found.run_id,
        "looks again": _moment(found.look_at),
    }
    out.print(facts(f"Event {found.id}", {name: value for name, value in shown.items() if value is not None}))
    out.print(json.dumps(payload, indent=2), markup=False, soft_wrap=True)


@click.command()
@click.argument("events", nargs=-1, metavar="[EVENT]...")
@_outcome
@_customer
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=LIMIT_MAX, show_default=True, metavar="N", help="At most N."
)
@yes_option
@json_option
@click.pass_context
def replay(  # noqa: PLR0913 - Click hands each option over
    ctx: click.Context,
    /,
    *,
    events: tuple[str, ...],
    outcome: str | None,
    customer: str | None,
    limit: int,
    yes: bool,
    as_json: bool,
) -> None:
    """Process events again, the oldest first: those that are named, or those that ended as the options say.

    Without either: all that are not processed yet, were given up, or are of a customer whom nobody knows. That is
    safe at any time: a billing period is granted once, however often its event is processed, and an older event does
    not undo what a newer one has set.

    \b
    With --json: events, as `credits webhooks list --json` says of each; failed, of which each has eventId and error.

    Exit codes: 0 done; 2 refused; 3 some could not be processed.

    \b
    Examples:
      credits webhooks replay evt_1Pqv0eLkdIwHu7ixOqlzZ0vH
      credits webhooks replay
      credits webhooks replay --outcome unknown_plan --yes
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    if events and (outcome or customer):
        raise click.UsageError("name events, or say which by --outcome and --customer")
    with session() as opened, opened.database.statements() as connection:
        ids = list(events) or _chosen(connection, outcome, customer, limit)
        if ids and not events:
            confirm(f"{counted(len(ids), 'event')} will be processed again. Go on?", yes=yes)
        done, failed = _replay(connection, _terms(opened), ids)
    if not as_json and done:
        out.print(table("Processed", [_narrow(event) for event in done]))
    for event_id, error in failed:
        err.print(f"{event_id}: {error}", markup=False, soft_wrap=True)
    counts = ", ".join(f"{count:,} {name}" for name, count in Counter(event.outcome for event in done).items())
    said = f"{counted(len(done), 'event')} processed" + (f": {counts}" if counts else "")
    answer(
        f"{said}; {len(failed):,} could not be." if failed else f"{said}.",
        {
            "events": [event.facts() for event in done],
            "failed": [{"eventId": event_id, "error": error} for event_id, error in failed],
        },
        as_json=as_json,
    )
    if failed:
        ctx.exit(FINISHED_WITH_FAILURES)


@click.command()
@click.argument("customer", metavar="CUSTOMER")
@click.argument("user", metavar="USER")
@json_option
def link(*, customer: str, user: str, as_json: bool) -> None:
    """Say which user a customer of Stripe's is, and process the events that have waited for that.

    Needed where no metadata of the customer, the subscription or the invoice names your user (`userId`). A customer
    who was another user's is this one's from now on; what has been set and granted until now stays.

    \b
    With --json: customerId, userId, was (the user before, or null), events, as `credits webhooks list --json` says
    of each.

    \b
    Example:
      credits webhooks link cus_NffrFeUfNV2Hib user-42
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        with transaction(connection):
            linked = stripe_customers.link(connection, customer, user, actor=actor())
        done = stripe_events.process_customer(connection, customer, _terms(opened))
    if not as_json and done:
        out.print(table("Processed", [_narrow(event) for event in done]))
    before = f", and no longer {linked.was}" if linked.was not in {None, user} else ""
    again = " already" if linked.was == user else ""
    left = linked.events - len(done)
    more = f" {counted(left, 'event')} could not be processed: `credits webhooks list --customer`." if left > 0 else ""
    answer(
        f"{customer} is {user}{again}{before}.{more}",
        {"customerId": customer, "userId": user, "was": linked.was, "events": [event.facts() for event in done]},
        as_json=as_json,
    )


def _terms(opened: Session) -> stripe_events.Terms:
    config = opened.settings
    return stripe_events.Terms(config.stripe_plan_after_cancel, enabled=config.credit_refresh_enabled)


def _chosen(connection: psycopg.Connection[Any], outcome: str | None, customer: str | None, limit: int) -> list[str]:
    wanted = Wanted(outcome=outcome, customer=customer, unsettled=outcome is None and customer is None)
    found, more = stripe_inbox.list_events(connection, wanted, limit=limit)
    if more:
        err.print(f"There are more than {limit:,}: these are the last ones. Afterwards, ask again.")
    return [event.id for event in sorted(found, key=lambda event: (event.created, event.id))]


def _replay(
    connection: psycopg.Connection[Any], terms: stripe_events.Terms, ids: Iterable[str]
) -> tuple[list[Stored], list[tuple[str, str]]]:
    done, failed = [], []
    with progress() as bar:
        for event_id in bar.track(list(ids), description="Processing"):
            try:
                done.append(stripe_events.process(connection, event_id, terms, again=True))
            except NotFoundError:
                raise
            except RefusedError as error:
                failed.append((event_id, str(error)))
            except psycopg.Error as error:
                if connection.closed:
                    raise
                failed.append((event_id, one_line(error)))
    return done, failed


def _narrow(event: Stored) -> dict[str, object]:
    return {
        "event": event.id,
        "type": event.type,
        "user": event.user or event.customer_id,
        "outcome": event.outcome or "not processed",
        "note": event.error or event.note,
    }


def _wide(event: Stored) -> dict[str, object]:
    return {
        "received": moment(event.received_at),
        **_narrow(event),
        "customer": event.customer_id,
        "period from": _moment(event.period_start),
        "looks again": _moment(event.look_at),
    }


def _moment(at: datetime | None) -> str | None:
    return moment(at) if at is not None else None
