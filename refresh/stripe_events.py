"""What becomes of Stripe's events: one transaction each, in which it takes effect and says so.

    store (its own transaction) → alone with the customer, and with whose it is → set the plan, or grant the period
    → its outcome

Any order and any number of deliveries come to the same: an event is its id, a subscription its newest event, a grant
its subscription and period, and an event that came before what it needs is looked at again when that has come. Nothing
here asks Stripe for anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg

from db import one_line, transaction
from refresh import stripe_customers, stripe_inbox, stripe_periods, stripe_subscriptions
from refresh.errors import RefusedError
from refresh.stripe_inbox import Decision, Stored
from refresh.stripe_objects import INVOICE_PAID, SUBSCRIPTION_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_ATTEMPTS = 6
LOCK_PAUSE_SECONDS = 0.25
"""How often an event is tried whose user a host has locked, or while somebody opens a run: for a second, where a host's
transaction takes milliseconds and a scan of a million one second, and a few where it waits for locks itself. Stripe
waits ten or more for an answer; upkeep does not wait at all."""
LOCKED_MAX = 5
"""Locked ones that an upkeep comes upon before it leaves the others for later."""
CLAIM_MAX = 20
"""Events that are taken at once by whoever looks at those that are due."""

SKEW_SECONDS = 5.0
"""A first period begins as its invoice is paid. Where the database's clock is so much behind Stripe's, its beginning
is waited for."""

WOKEN_MAX = 1_000
"""Events of one customer that are looked at because of one other. Upkeep goes on where there are more."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the environment says.

    Attributes:
        after_cancel: `STRIPE_PLAN_AFTER_CANCEL`: the plan of those who have cancelled. Where there is none of that
            code, they have no plan.
        enabled: `CREDIT_REFRESH_ENABLED`.
    """

    after_cancel: str
    enabled: bool = True


def process(connection: psycopg.Connection[Any], event_id: str, terms: Terms, *, again: bool = False) -> Stored:
    """Process an event that is stored, and then those of its customer that have waited for it.

    Args:
        connection: in autocommit.
        event_id: Stripe's.
        terms: what the environment says.
        again: even one that is settled, unless it has granted something.

    Raises:
        NotFoundError: there is no such event.
        RefusedError, psycopg.Error: it cannot be carried out as things are; its row keeps why.
    """
    found = _process(connection, event_id, terms, again=again)
    if found.outcome == "not_begun" and found.look_at is not None:
        wait = (found.look_at - found.processed_at).total_seconds() if found.processed_at else SKEW_SECONDS + 1
        if wait <= SKEW_SECONDS:
            connection.execute("SELECT pg_sleep(%s)", (wait + 0.001,))
            found = _process(connection, event_id, terms, again=again)
    if found.customer_id is not None:
        process_customer(connection, found.customer_id, terms)
    return found


def process_customer(connection: psycopg.Connection[Any], customer_id: str, terms: Terms) -> list[Stored]:
    """Process events of a customer that are due, and of others who are the same user: as after a link.

    Args:
        connection: in autocommit.
        customer_id: Stripe's.
        terms: what the environment says.

    Returns:
        Those that could be processed.
    """
    customer_ids = stripe_customers.same_user(connection, customer_id)
    return list(_process_due(connection, terms, customer_ids=customer_ids, limit=WOKEN_MAX, locked_max=1))


def process_waiting(connection: psycopg.Connection[Any], terms: Terms, *, limit: int) -> list[Stored]:
    """Process events that are due to be looked at again, whoever's. Upkeep calls it.

    Args:
        connection: in autocommit.
        terms: what the environment says.
        limit: how many at most.

    Returns:
        Those that could be processed.
    """
    return list(_process_due(connection, terms, customer_ids=None, limit=limit, locked_max=LOCKED_MAX))


def _process_due(
    connection: psycopg.Connection[Any],
    terms: Terms,
    *,
    customer_ids: list[str] | None,
    limit: int,
    locked_max: int,
) -> Iterator[Stored]:
    """One after the other: a subscription's event may wake its invoices."""
    locked = 0
    while ids := stripe_inbox.claim(connection, customer_ids=customer_ids, limit=min(limit, CLAIM_MAX)):
        limit -= len(ids)
        for event_id in ids:
            try:
                yield _process(connection, event_id, terms, attempts=LOCK_ATTEMPTS if customer_ids else 1)
            except (RefusedError, psycopg.Error) as error:  # its row says why
                if connection.closed:
                    raise
                locked += isinstance(error, psycopg.errors.LockNotAvailable)
                if locked >= locked_max:
                    return


def _process(
    connection: psycopg.Connection[Any],
    event_id: str,
    terms: Terms,
    *,
    again: bool = False,
    attempts: int = LOCK_ATTEMPTS,
) -> Stored:
    for left in reversed(range(attempts)):
        try:
            return _process_once(connection, event_id, terms, again=again)
        except psycopg.errors.LockNotAvailable as error:
            if not left:
                text = f"somebody else has the user, or opens a run ({one_line(error)})"
                stripe_inbox.record_failure(connection, event_id, text)
                raise
            connection.execute("SELECT pg_sleep(%s)", (LOCK_PAUSE_SECONDS,))
        except Exception as error:
            if not connection.closed:
                text = one_line(error) if isinstance(error, RefusedError | psycopg.Error) else repr(error)
                stripe_inbox.record_failure(connection, event_id, text)
            raise
    raise AssertionError  # the last attempt returns or raises


def _process_once(connection: psycopg.Connection[Any], event_id: str, terms: Terms, *, again: bool) -> Stored:
    with transaction(connection):
        stored = stripe_inbox.lock(connection, event_id)
        if stored.outcome == "granted" or (stored.settled and not again):
            return stored
        stripe_inbox.conclude(connection, event_id, _decide(connection, stored, terms))
        return stripe_inbox.read(connection, event_id)


def _decide(connection: psycopg.Connection[Any], stored: Stored, terms: Terms) -> Decision:
    """What follows from an event, done."""
    event = stripe_inbox.read_event(connection, stored.id)
    assert event is not None  # noqa: S101 - its row is there
    user_id, has_told = stripe_customers.find_user(connection, event)
    if event.type not in SUBSCRIPTION_TYPES and event.type != INVOICE_PAID:
        return Decision("linked" if has_told else "ignored", user_id=user_id)
    if user_id is None:
        # One who is named may come: an app often adds its user after the checkout.
        named = event.user_named
        return Decision("unknown_customer", f"named {named!r}" if named else None, waits=named is not None)
    stripe_inbox.lock_user(connection, user_id)
    if event.type == INVOICE_PAID:
        return stripe_periods.grant_period(
            connection, event, user_id, received_at=stored.received_at, enabled=terms.enabled
        )
    return stripe_subscriptions.apply_event(connection, event, user_id, after_cancel=terms.after_cancel)
