"""Billing periods: a paid invoice of a subscription grants its period to a user whose plan is external, once.

The grant is a run of one user, opened through the one door and done in the same transaction that writes what became of
the event: there is no run without its grant, and no grant without its event. The run's idempotency key is made of the
subscription and of the period's beginning, so that whatever else is sent about the period finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - psycopg's row factory builds the class at run time

from psycopg.rows import class_row

from db import one
from refresh import holds, runs, stripe_objects, totals
from refresh.errors import NobodyError, RefusedError
from refresh.selection import Selection
from refresh.stripe_inbox import Decision
from refresh.stripe_objects import ENTITLED
from refresh.stripe_subscriptions import LEAD
from refresh.work import do_whole, pending_batches

if TYPE_CHECKING:
    import psycopg

    from refresh.stripe_objects import Event, Invoice

ACTOR = "stripe"

PRICE_CHANGE_WAIT = timedelta(hours=1)
"""How long a period whose price is new waits for the event that says which plan that is. Stripe makes that event an
hour before the invoice is paid; who does not have it sent gets the period under the plan that the user has."""


@dataclass(frozen=True, slots=True)
class _Situation:
    """What a period meets.

    Attributes:
        granted_by: the run that has granted the period.
        granted_until: up to when periods of the same subscription are granted that this one begins in.
        lead: the subscription that says what the user's plan is, if one does.
        price_id: what the period's subscription cost by its newest event; with that event's instant.
    """

    now: datetime
    paused: bool
    books_since: datetime | None
    user_id: int
    external_id: str
    active: bool
    plan_active: bool | None
    cadence: str | None
    held: bool
    hold_ran_out: bool
    granted_by: UUID | None
    granted_until: datetime | None
    lead: str | None
    price_id: str | None
    price_since: datetime | None


_SITUATION = f"""
SELECT
    now() AS now, NOT s.enabled OR s.dry_run AS paused, s.books_since, u.id AS user_id, u.external_id, u.active,
    p.active AS plan_active, p.cadence,
    u.credit_refresh_hold AND (u.hold_until IS NULL OR u.hold_until > now()) AS held,
    u.credit_refresh_hold AND coalesce(u.hold_until <= now(), false) AS hold_ran_out,
    (SELECT id FROM credit_refresh_runs WHERE idempotency_key = %(key)s) AS granted_by,
    (
        SELECT max(h.window_end)
        FROM credit_refresh_histories AS h JOIN credit_refresh_runs AS r ON r.id = h.run_id
        WHERE h.user_id = u.id AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
            AND h.window_start < %(end)s AND h.window_end > %(start)s AND starts_with(r.idempotency_key, %(keys)s)
    ) AS granted_until,
    l.subscription_id AS lead, k.price_id, k.event_created AS price_since
FROM users AS u
CROSS JOIN settings AS s
LEFT JOIN plans AS p ON p.code = u.plan_code
LEFT JOIN stripe_subscriptions AS k ON k.subscription_id = %(subscription_id)s
LEFT JOIN LATERAL ({LEAD}) AS l ON true
WHERE u.id = %(user_id)s
"""  # noqa: S608 - texts of this package alone
_LOCK_USER = "SELECT FROM users WHERE id = %(user_id)s FOR NO KEY UPDATE NOWAIT"
# A hold that has run out is no hold, though it was one when the period began.
_END_HOLD = """
UPDATE users SET credit_refresh_hold = false, hold_reason = NULL, hold_until = NULL, updated_at = now()
WHERE id = %(user_id)s
"""
_BATCH = "SELECT id FROM credit_refresh_batches WHERE run_id = %(run_id)s"


def grant_period(
    connection: psycopg.Connection[Any], event: Event, user_id: int, *, received_at: datetime, enabled: bool
) -> Decision:
    """Grant the billing period that a paid invoice is for, unless something is in the way.

    Args:
        connection: in a transaction that is alone with the user's customers.
        event: `invoice.paid`.
        user_id: who has paid.
        received_at: when the event came.
        enabled: `CREDIT_REFRESH_ENABLED`.

    Raises:
        RefusedError: the period cannot be granted as things are; nothing was changed.
        psycopg.errors.LockNotAvailable: somebody else has the user or the door; nothing was changed.
    """
    invoice = stripe_objects.read_invoice(event.object)
    if invoice.cut_short:
        note = "its period is on none of the lines that came with it: `credits refresh USER --force` grants by hand"
        return Decision("failed", note, user_id)
    if invoice.start is None or invoice.end is None or invoice.subscription_id is None:
        return Decision("no_period", None, user_id)
    # First without locks: most of what is refused is refused here.
    refused = _refuse(_read(connection, invoice, user_id), invoice, received_at, enabled=enabled)
    if refused is not None:
        return refused
    runs.lock_door(connection)
    # Not waited for: others wait at the door.
    connection.execute(_LOCK_USER, {"user_id": user_id})
    situation = _read(connection, invoice, user_id)
    refused = _refuse(situation, invoice, received_at, enabled=enabled)
    return refused or _grant(connection, invoice, situation)


def _read(connection: psycopg.Connection[Any], invoice: Invoice, user_id: int) -> _Situation:
    parameters = {
        "user_id": user_id,
        "subscription_id": invoice.subscription_id,
        "start": invoice.start,
        "end": invoice.end,
        "key": _key(invoice),
        "keys": _keys(invoice),
        "entitled": sorted(ENTITLED),
    }
    with connection.cursor(row_factory=class_row(_Situation)) as cursor:
        return one(cursor.execute(_SITUATION, parameters))


def _refuse(  # noqa: C901, PLR0911 - one for each
    found: _Situation, invoice: Invoice, received_at: datetime, *, enabled: bool
) -> Decision | None:
    """Why a period is not granted now; None when it is."""
    assert invoice.start is not None  # noqa: S101 - grant_period() has seen to it
    assert invoice.end is not None  # noqa: S101
    if found.granted_by is not None:
        return Decision("already_granted", f"by run {found.granted_by}", found.user_id, found.granted_by)
    if invoice.end <= found.now:
        return Decision("period_over", None, found.user_id)
    if found.lead is not None and found.lead != invoice.subscription_id:
        return Decision("other_subscription", f"subscription {found.lead}", found.user_id)
    if (
        found.price_since is not None
        and found.price_since < invoice.start
        and invoice.price_ids
        and found.price_id not in invoice.price_ids
        and found.now < received_at + PRICE_CHANGE_WAIT
    ):
        prices = " and ".join(sorted(invoice.price_ids))
        return Decision("awaits_subscription", f"price {prices} after {found.price_id}", found.user_id)
    if found.cadence != "external":  # the event that gives them such a plan looks at this one again
        return Decision("not_external", "there is none" if found.cadence is None else None, found.user_id)
    if not found.active:
        return Decision("inactive", None, found.user_id)
    if not found.plan_active:
        return Decision("no_plan", None, found.user_id)
    begins = _begins(found, invoice)
    if begins >= invoice.end:
        note = f"a period up to {begins.isoformat()} is granted already"
        return Decision("already_granted", note, found.user_id)
    if begins > found.now:
        return Decision("not_begun", f"begins at {begins.isoformat()}", found.user_id, look_at=begins)
    if found.held:
        return Decision("held", None, found.user_id)
    if found.books_since is not None and begins < found.books_since:
        return Decision("before_books", f"the books begin at {found.books_since.isoformat()}", found.user_id)
    if found.paused or not enabled:
        return Decision("paused", None, found.user_id)
    return None


def _begins(found: _Situation, invoice: Invoice) -> datetime:
    """Where the grant begins: what another period of the subscription has granted is not granted again."""
    assert invoice.start is not None  # noqa: S101 - grant_period() has seen to it
    return max(invoice.start, found.granted_until or invoice.start)


def _grant(connection: psycopg.Connection[Any], invoice: Invoice, found: _Situation) -> Decision:
    if found.hold_ran_out:
        connection.execute(holds.ACTOR, {"actor": ACTOR})
        connection.execute(_END_HOLD, {"user_id": found.user_id})
    request = runs.Request(
        "stripe",
        ACTOR,
        batch_size=1,
        as_of=_begins(found, invoice),
        window_end=invoice.end,
        reason=f"invoice {invoice.id}",
        force=True,
        idempotency_key=_key(invoice),
    )
    try:
        opened = runs.open_run(connection, request, Selection(user=found.external_id))
    except NobodyError as error:
        raise RefusedError(f"{found.external_id} is in an unfinished batch of another run") from error
    if isinstance(opened, runs.NotOpened):
        return Decision("paused", None, found.user_id)
    batch_ids = [id_ for (id_,) in connection.execute(_BATCH, {"run_id": opened.run_id})]
    (pending,) = pending_batches(connection, batch_ids)
    done = do_whole(connection, pending)
    if opened.dry_run or done is None or done.users_refreshed + done.users_skipped != 1:
        raise RefusedError(f"{found.external_id} cannot be granted the period: the balance may not fit 64 bits")
    totals.finish_runs(connection, [opened.run_id])
    if done.users_skipped:  # refused by the unique key over windows
        return Decision("already_granted", "another run has granted a window from that instant", found.user_id)
    return Decision("granted", None, found.user_id, opened.run_id)


def _keys(invoice: Invoice) -> str:
    return f"{runs.STRIPE_KEYS}{invoice.subscription_id}:"


def _key(invoice: Invoice) -> str:
    assert invoice.start is not None  # noqa: S101 - grant_period() has seen to it
    return f"{_keys(invoice)}{invoice.start:%Y-%m-%dT%H:%M:%SZ}"
