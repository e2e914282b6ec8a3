"""Stripe's events as rows: stored as they came, before anybody looks into them, each with what became of it.

An event's id is its key, so one that is delivered twice is one. `look_at` is when upkeep looks at it again: whatever
stores an event may die before it is processed, and some events wait for something, such as the end of a hold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - the same

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db import one
from refresh import stripe_objects
from refresh.errors import NotFoundError
from refresh.stripe_objects import INVOICE_PAID, Event

if TYPE_CHECKING:
    import psycopg

OUTCOMES = {
    "granted": "the billing period is granted",
    "already_granted": "the billing period, or the time that it lies in, was granted before",
    "plan_set": "the user's plan, or the day of their anniversary, is set",
    "unchanged": "the user has what it says already, or nothing follows from it",
    "outdated": "a newer event has said how the subscription stands",
    "linked": "it has told which user the customer is",
    "ignored": "nothing follows from events of this type",
    "unknown_customer": "nobody knows which user the customer is: `credits webhooks link CUSTOMER USER`",
    "unknown_plan": "the price names no plan that there is; the user's plan stays",
    "no_period": "the invoice is for no billing period: prorations or single items alone",
    "period_over": "the billing period had ended when somebody could have granted it",
    "before_books": "the billing period began before the books: `credits refresh USER --force` grants by hand",
    "not_external": "the user's plan is none that waits for billing periods",
    "other_subscription": "another subscription of the user's says what their plan is",
    "awaits_subscription": "the price has changed, and the event that says to which plan has not come yet",
    "not_begun": "what it grants begins later",
    "held": "the user is held; the period is granted after the release, if it has not ended by then",
    "inactive": "the user is inactive",
    "no_plan": "the user's plan is inactive",
    "paused": "nothing is granted at present",
    "failed": "it was given up; `error` says why",
}
"""What can become of an event, for people. The CHECK in models/stripe_event.py names the same."""

WAITING = frozenset(
    {"unknown_customer", "awaits_subscription", "not_begun", "held", "inactive", "no_plan", "paused"}
)  # fmt: skip
"""Outcomes that are not the last word."""

GIVEN_UP_AFTER_DAYS = 7
"""Stripe itself delivers again for three days."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of an event.

    Attributes:
        outcome: one of `OUTCOMES`.
        look_at: for one that waits, when to look again; None: soon, and less and less often.
        waits: look again at all, where the outcome is one that waits.
    """

    outcome: str
    note: str | None = None
    user_id: int | None = None
    run_id: UUID | None = None
    look_at: datetime | None = None
    waits: bool = True


@dataclass(frozen=True, slots=True)
class Stored:
    """An event's row, but for what Stripe sent.

    Attributes:
        user: the app's own id of the user; None while unknown, and when the host has deleted them.
    """

    id: str
    type: str
    livemode: bool
    created: datetime
    customer_id: str | None
    subscription_id: str | None
    period_start: datetime | None
    period_end: datetime | None
    received_at: datetime
    processed_at: datetime | None
    outcome: str | None
    user: str | None
    run_id: UUID | None
    note: str | None
    error: str | None
    look_at: datetime | None

    @property
    def settled(self) -> bool:
        """Whether nobody looks at it again by himself."""
        return self.outcome is not None and self.look_at is None

    @property
    def text(self) -> str:
        """What became of it, for people."""
        if self.outcome is None:
            return f"not processed yet: {self.error}" if self.error else "not processed yet"
        return "; ".join(part for part in (OUTCOMES[self.outcome], self.note, self.error) if part)

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "eventId": self.id,
            "type": self.type,
            "livemode": self.livemode,
            "createdAt": self.created.isoformat(),
            "receivedAt": self.received_at.isoformat(),
            "processedAt": _iso(self.processed_at),
            "customerId": self.customer_id,
            "subscriptionId": self.subscription_id,
            "periodStart": _iso(self.period_start),
            "periodEnd": _iso(self.period_end),
            "outcome": self.outcome,
            "userId": self.user,
            "runId": str(self.run_id) if self.run_id else None,
            "note": self.note,
            "error": self.error,
            "looksAgainAt": _iso(self.look_at),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which events to list; what is None does not matter. All of it together has to hold.

    Attributes:
        outcome: one of `OUTCOMES`.
        unsettled: those that were not processed, were given up, or whose customer is unknown.
        user: the app's own id.
    """

    outcome: str | None = None
    unsettled: bool = False
    type: str | None = None
    customer: str | None = None
    user: str | None = None


# Young events are looked at each minute, old ones each hour.
_SOON = "now() + least(greatest((now() - received_at) / 8, interval '1 minute'), interval '1 hour')"

_STORE = """
INSERT INTO stripe_events (id, type, livemode, created, payload, customer_id, subscription_id, period_start, period_end)
VALUES (
    %(id)s, %(type)s, %(livemode)s, %(created)s, %(payload)s, %(customer_id)s, %(subscription_id)s, %(start)s, %(end)s
) ON CONFLICT DO NOTHING
"""
_COLUMNS = """
SELECT
    e.id, e.type, e.livemode, e.created, e.customer_id, e.subscription_id, e.period_start, e.period_end, e.received_at,
    e.processed_at, e.outcome, u.external_id AS "user", e.run_id, e.note, e.error, e.look_at
FROM stripe_events AS e LEFT JOIN users AS u ON u.id = e.user_id
"""
_READ = f"{_COLUMNS} WHERE e.id = %(id)s"
_LIST = f"""
{_COLUMNS}
WHERE (%(outcome)s::text IS NULL OR e.outcome = %(outcome)s)
    AND (NOT %(unsettled)s::boolean OR coalesce(e.outcome, 'failed') IN ('failed', 'unknown_customer'))
    AND (%(type)s::text IS NULL OR e.type = %(type)s)
    AND (%(customer)s::text IS NULL OR e.customer_id = %(customer)s)
    AND (%(user)s::text IS NULL OR u.external_id = %(user)s)
ORDER BY e.received_at DESC, e.id DESC
LIMIT %(limit)s
"""
_PAYLOAD = "SELECT payload FROM stripe_events WHERE id = %(id)s"
_KEY = "SELECT coalesce(customer_id, id) FROM stripe_events WHERE id = %(id)s"
# Whoever is at work on an event of a customer is alone with all of the customer's, and then with all of the user's.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || '.stripe.' || %(key)s, 0))"
_CONCLUDE = f"""
UPDATE stripe_events SET
    outcome = %(outcome)s, processed_at = now(), note = %(note)s, user_id = %(user_id)s::bigint,
    run_id = %(run_id)s::uuid, error = NULL,
    look_at = CASE
        WHEN NOT %(waits)s::boolean THEN NULL
        WHEN %(outcome)s::text = 'unknown_customer' AND received_at < now() - make_interval(days => %(days)s) THEN NULL
        ELSE coalesce(%(look_at)s::timestamptz, {_SOON})
    END
WHERE id = %(id)s
"""  # noqa: S608 - texts of this module alone; the same below
_FAIL = f"""
UPDATE stripe_events AS e SET
    error = %(error)s, outcome = CASE WHEN g.up THEN 'failed' ELSE e.outcome END,
    processed_at = CASE WHEN g.up THEN now() ELSE e.processed_at END, look_at = CASE WHEN NOT g.up THEN {_SOON} END
FROM (SELECT id, received_at < now() - make_interval(days => %(days)s) AS up FROM stripe_events WHERE id = %(id)s) AS g
WHERE e.id = g.id AND (e.outcome IS NULL OR e.look_at IS NOT NULL)
"""  # noqa: S608
_WAKE = """
UPDATE stripe_events SET look_at = now()
WHERE customer_id = ANY (%(customer_ids)s) AND outcome = ANY (%(outcomes)s)
    AND (period_end IS NULL OR period_end > now())
"""
# Put off before they are looked at: one that ends its process each time does not keep the others waiting.
_CLAIM = f"""
WITH due AS (
    SELECT id FROM stripe_events
    WHERE look_at <= now() AND (%(customer_ids)s::text[] IS NULL OR customer_id = ANY (%(customer_ids)s::text[]))
        AND (outcome IS DISTINCT FROM 'paused' OR (SELECT enabled AND NOT dry_run FROM settings))
    ORDER BY look_at LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
)
UPDATE stripe_events AS e SET look_at = {_SOON} FROM due AS d WHERE e.id = d.id RETURNING e.created, e.id
"""  # noqa: S608


def store(connection: psycopg.Connection[Any], raw: object) -> str:
    """Keep an event as it came, whole, unless it is there.

    Args:
        connection: in autocommit: the event stays, whatever becomes of it.
        raw: what Stripe has signed.

    Returns:
        The event's id.

    Raises:
        RefusedError: it is no snapshot event.
    """
    payload = stripe_objects.storable(raw)
    event = stripe_objects.read_event(payload)
    invoice = stripe_objects.read_invoice(event.object) if event.type == INVOICE_PAID else None
    values = {
        "id": event.id,
        "type": event.type,
        "livemode": event.livemode,
        "created": event.created,
        "payload": Jsonb(payload),
        "customer_id": event.customer_id,
        "subscription_id": event.subscription_id,
        "start": invoice.start if invoice else None,
        "end": invoice.end if invoice else None,
    }
    connection.execute(_STORE, values)
    return event.id


def lock(connection: psycopg.Connection[Any], event_id: str) -> Stored:
    """An event, alone with all events of its customer until the transaction ends.

    Raises:
        NotFoundError: there is no such event.
        psycopg.errors.LockNotAvailable: somebody else is at one for longer than the transaction waits.
    """
    row = connection.execute(_KEY, {"id": event_id}).fetchone()
    if row is not None:
        connection.execute(_LOCK, {"key": row[0]})
    return read(connection, event_id)


def lock_customer(connection: psycopg.Connection[Any], customer_id: str) -> None:
    """The same for a customer by itself."""
    connection.execute(_LOCK, {"key": customer_id})


def lock_user(connection: psycopg.Connection[Any], user_id: int) -> None:
    """The same for a user, who may be several customers; after the customer, and before the user's row."""
    connection.execute(_LOCK, {"key": f"user.{user_id}"})


def read(connection: psycopg.Connection[Any], event_id: str) -> Stored:
    """An event's row.

    Raises:
        NotFoundError: there is no such event.
    """
    with connection.cursor(row_factory=class_row(Stored)) as cursor:
        found = cursor.execute(_READ, {"id": event_id}).fetchone()
    if found is None:
        raise NotFoundError(f"there is no event {event_id!r}")
    return found


def read_payload(connection: psycopg.Connection[Any], event_id: str) -> dict[str, Any]:
    """What Stripe sent."""
    payload: dict[str, Any] = one(connection.execute(_PAYLOAD, {"id": event_id}))[0]
    return payload


def read_event(connection: psycopg.Connection[Any], event_id: str) -> Event | None:
    """What Stripe sent, as an event; None when somebody has deleted it since."""
    row = connection.execute(_PAYLOAD, {"id": event_id}).fetchone()
    return stripe_objects.read_event(row[0]) if row else None


def list_events(connection: psycopg.Connection[Any], wanted: Wanted, *, limit: int) -> tuple[list[Stored], bool]:
    """Events, the last ones first; and whether there are more."""
    with connection.cursor(row_factory=class_row(Stored)) as cursor:
        found = cursor.execute(_LIST, {**asdict(wanted), "limit": limit + 1}).fetchall()
    return found[:limit], len(found) > limit


def conclude(connection: psycopg.Connection[Any], event_id: str, decision: Decision) -> None:
    """Write down what has become of an event, in the transaction that did it."""
    values = {
        "id": event_id,
        "outcome": decision.outcome,
        "note": decision.note,
        "user_id": decision.user_id,
        "run_id": decision.run_id,
        "waits": decision.waits and decision.outcome in WAITING,
        "look_at": decision.look_at,
        "days": GIVEN_UP_AFTER_DAYS,
    }
    connection.execute(_CONCLUDE, values)


def record_failure(connection: psycopg.Connection[Any], event_id: str, error: str) -> None:
    """Write down why an event could not be processed; upkeep tries again, until it is too old."""
    connection.execute(_FAIL, {"id": event_id, "error": error, "days": GIVEN_UP_AFTER_DAYS})


def wake(connection: psycopg.Connection[Any], customer_ids: list[str], outcomes: frozenset[str]) -> int:
    """Have customers' events of these outcomes looked at again, but for periods that are over.

    Args:
        connection: in a transaction that is alone with the customers, or with their user.
        customer_ids: whose.
        outcomes: of `OUTCOMES`.

    Returns:
        How many.
    """
    parameters = {"customer_ids": customer_ids, "outcomes": sorted(outcomes)}
    return connection.execute(_WAKE, parameters).rowcount


def claim(connection: psycopg.Connection[Any], *, customer_ids: list[str] | None = None, limit: int) -> list[str]:
    """Events that are to be looked at now, the oldest first; nobody else gets them for a minute.

    Args:
        connection: in autocommit.
        customer_ids: these customers' alone; None: anybody's.
        limit: how many at most.
    """
    rows = connection.execute(_CLAIM, {"customer_ids": customer_ids, "limit": limit}).fetchall()
    return [id_ for _, id_ in sorted(rows)]


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
