"""Which of the host's users a customer of Stripe's is: what was linked, else what an event's metadata says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from refresh import stripe_inbox
from refresh.errors import NotFoundError, RefusedError

if TYPE_CHECKING:
    import psycopg

    from refresh.stripe_objects import Event


@dataclass(frozen=True, slots=True)
class Linked:
    """What a link by hand changed.

    Attributes:
        was: the user whom the customer was before; None: nobody.
        events: how many of the customer's events are looked at again because of it.
    """

    was: str | None
    events: int


_KNOWN = """
SELECT u.id, u.external_id
FROM stripe_customers AS c JOIN users AS u ON u.id = c.user_id WHERE c.customer_id = %(customer_id)s
"""
_NAMED = "SELECT id FROM users WHERE external_id = %(external_id)s"
_LINK = """
INSERT INTO stripe_customers (customer_id, user_id, linked_by) VALUES (%(customer_id)s, %(user_id)s, %(linked_by)s)
ON CONFLICT (customer_id) DO UPDATE SET user_id = excluded.user_id, linked_by = excluded.linked_by, linked_at = now()
"""
_AUDIT = """
INSERT INTO credit_audit_logs (actor, action, user_id, credits, detail)
VALUES (%(actor)s, 'stripe_linked', %(user_id)s, 0, %(detail)s)
"""
_OF_USER = "SELECT customer_id FROM stripe_customers WHERE user_id = %(user_id)s"
_OF_SAME_USER = """
SELECT %(customer_id)s::text UNION
SELECT o.customer_id FROM stripe_customers AS c JOIN stripe_customers AS o ON o.user_id = c.user_id
WHERE c.customer_id = %(customer_id)s
"""
_UNKNOWN = frozenset({"unknown_customer"})


def find_user(connection: psycopg.Connection[Any], event: Event) -> tuple[int | None, bool]:
    """Whom an event is about.

    A link that is there goes before what the event says; what an event says of a customer without one is remembered.

    Args:
        connection: in a transaction that is alone with the customer.
        event: any event.

    Returns:
        The user; None where nobody knows. And whether the event has told.
    """
    customer_id = event.customer_id
    if customer_id is None:
        return None, False
    known = connection.execute(_KNOWN, {"customer_id": customer_id}).fetchone()
    if known is not None:
        return int(known[0]), False
    named = connection.execute(_NAMED, {"external_id": event.user_named}).fetchone() if event.user_named else None
    if named is None:
        return None, False
    _remember(connection, customer_id, int(named[0]), actor="stripe", by=f"event {event.id}")
    stripe_inbox.wake(connection, [customer_id], _UNKNOWN)
    return int(named[0]), True


def customers_of(connection: psycopg.Connection[Any], user_id: int) -> list[str]:
    """All customers that a user is."""
    return [id_ for (id_,) in connection.execute(_OF_USER, {"user_id": user_id})]


def same_user(connection: psycopg.Connection[Any], customer_id: str) -> list[str]:
    """A customer, and all others that are the same user."""
    return [id_ for (id_,) in connection.execute(_OF_SAME_USER, {"customer_id": customer_id})]


def link(connection: psycopg.Connection[Any], customer_id: str, external_id: str, *, actor: str) -> Linked:
    """Say which user a customer is, whatever anybody has said before.

    What its events have set for another user stays as it is; those that waited for a user are looked at again.

    Args:
        connection: in a transaction.
        customer_id: Stripe's.
        external_id: the host app's.
        actor: who says so, for the audit log.

    Raises:
        NotFoundError: no such user.
        RefusedError: that is no customer's id.
    """
    if not customer_id.strip() or not customer_id.isprintable():
        raise RefusedError(f"{customer_id!r} is no id of a customer, such as cus_NffrFeUfNV2Hib")
    stripe_inbox.lock_customer(connection, customer_id)
    known = connection.execute(_KNOWN, {"customer_id": customer_id}).fetchone()
    user = connection.execute(_NAMED, {"external_id": external_id}).fetchone()
    if user is None:
        raise NotFoundError(f"there is no user {external_id!r}")
    was = known[1] if known else None
    if was != external_id:
        _remember(connection, customer_id, user[0], actor=actor, by=actor)
    return Linked(was, stripe_inbox.wake(connection, [customer_id], _UNKNOWN))


def _remember(connection: psycopg.Connection[Any], customer_id: str, user_id: int, *, actor: str, by: str) -> None:
    connection.execute(_LINK, {"customer_id": customer_id, "user_id": user_id, "linked_by": by})
    detail = Jsonb({"customer": customer_id, "by": by})
    connection.execute(_AUDIT, {"actor": actor, "user_id": user_id, "detail": detail})
