"""Subscriptions: what the newest event about each says, and the plan and the day that follow for the user.

Events come in any order, so what is kept of a subscription is what its newest event says, and a user's plan follows
from all of their subscriptions: of those that entitle to something and name a plan, the youngest one's. Where none does
any more, it is the plan for those who have cancelled. When the user is next refreshed is the trigger keep_to_grid's
business: no earlier than the end of what was granted, whichever plan comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db import one
from refresh import stripe_customers, stripe_inbox, stripe_objects
from refresh.stripe_inbox import Decision
from refresh.stripe_objects import ENDED, ENTITLED, SUBSCRIPTION_CREATED, Event, Price, Subscription

if TYPE_CHECKING:
    import psycopg

WAITS_FOR_PLAN = frozenset({"not_external", "other_subscription", "awaits_subscription"})
"""Outcomes of invoices that the plan may be in the way of. An invoice often comes before its subscription."""
_LOST = frozenset({"canceled", "unpaid", "paused"})
"""Statuses in which somebody has no more what they had. `incomplete` and `incomplete_expired` never had it."""
_RANK_CREATED, _RANK_INCOMPLETE, _RANK_LATER, _RANK_ENDED = range(4)
"""Stripe's events say the second alone. Of two from one second, the one of the higher rank is the later one."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is known of a subscription: by which event."""

    event_id: str
    event_created: datetime
    event_rank: int
    status: str


@dataclass(frozen=True, slots=True)
class _Standing:
    """A user, and what their subscriptions come to.

    Attributes:
        lead: the subscription that says what the plan is; with its plan and, for long periods, its day.
        plan_is_stripes: one of the user's subscriptions has named the plan that they have.
        day_is_stripes: one of them has the day that the user has.
        after_cancel: the plan for those who have cancelled; None: there is no such plan.
    """

    plan_code: str | None
    day: int | None
    lead: str | None
    lead_plan: str | None
    lead_day: int | None
    plan_is_stripes: bool
    day_is_stripes: bool
    after_cancel: str | None


_KEPT = """
SELECT event_id, event_created, event_rank, status FROM stripe_subscriptions WHERE subscription_id = %(subscription_id)s
"""
_KEEP = """
INSERT INTO stripe_subscriptions (
    subscription_id, customer_id, status, created, price_id, plan_code, anniversary, event_id, event_created, event_rank
) VALUES (
    %(subscription_id)s, %(customer_id)s, %(status)s, %(created)s, %(price_id)s, %(plan_code)s, %(anniversary)s,
    %(event_id)s, %(event_created)s, %(event_rank)s
) ON CONFLICT (subscription_id) DO UPDATE SET
    customer_id = excluded.customer_id, status = excluded.status, price_id = excluded.price_id,
    plan_code = excluded.plan_code, anniversary = excluded.anniversary, event_id = excluded.event_id,
    event_created = excluded.event_created, event_rank = excluded.event_rank
"""
_PLANS = "SELECT code FROM plans WHERE code = ANY (%(names)s)"

# Who says what a user's plan is; `u` is the user.
LEAD = """
SELECT s.subscription_id, s.plan_code, s.anniversary, p.timezone
FROM stripe_customers AS c
JOIN stripe_subscriptions AS s ON s.customer_id = c.customer_id
JOIN plans AS p ON p.code = s.plan_code
WHERE c.user_id = u.id AND s.status = ANY (%(entitled)s)
ORDER BY s.created DESC, s.subscription_id DESC
LIMIT 1
"""
# A day of the month is one of local time, as the rule counts.
_DAY = "extract(day FROM {at} AT TIME ZONE coalesce(u.timezone, {zone}, 'UTC'))::smallint"
_LOCK_USER = "SELECT FROM users WHERE id = %(user_id)s FOR NO KEY UPDATE NOWAIT"
_STANDING = f"""
SELECT
    u.plan_code, u.credit_refresh_day AS day, l.subscription_id AS lead, l.plan_code AS lead_plan,
    {_DAY.format(at="l.anniversary", zone="l.timezone")} AS lead_day,
    EXISTS (
        SELECT FROM stripe_customers AS c JOIN stripe_subscriptions AS s ON s.customer_id = c.customer_id
        WHERE c.user_id = u.id AND s.plan_code = u.plan_code
    ) AS plan_is_stripes,
    EXISTS (
        SELECT FROM stripe_customers AS c JOIN stripe_subscriptions AS s ON s.customer_id = c.customer_id
        WHERE c.user_id = u.id AND {_DAY.format(at="s.anniversary", zone="p.timezone")} = u.credit_refresh_day
    ) AS day_is_stripes,
    (SELECT code FROM plans WHERE code = %(after_cancel)s) AS after_cancel
FROM users AS u
LEFT JOIN plans AS p ON p.code = u.plan_code
LEFT JOIN LATERAL ({LEAD}) AS l ON true
WHERE u.id = %(user_id)s
"""  # noqa: S608 - texts of this module alone
_SET = """
UPDATE users SET plan_code = %(plan_code)s, credit_refresh_day = %(day)s::smallint, updated_at = now()
WHERE id = %(user_id)s
"""
_AUDIT = """
INSERT INTO credit_audit_logs (actor, action, user_id, credits, detail)
VALUES ('stripe', 'stripe_plan_set', %(user_id)s, 0, %(detail)s)
"""
# The date of an external plan is the end of what is paid; a change of plan has dropped it.
_RESTORE_DATE = """
UPDATE users AS u SET next_refresh_at = g.until
FROM (
    SELECT max(h.window_end) AS until
    FROM credit_refresh_histories AS h JOIN credit_refresh_runs AS r ON r.id = h.run_id
    WHERE h.user_id = %(user_id)s AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL AND h.window_end > now()
        AND r.source = 'stripe'
) AS g
WHERE u.id = %(user_id)s AND u.next_refresh_at IS NULL AND g.until IS NOT NULL
    AND EXISTS (SELECT FROM plans AS p WHERE p.code = u.plan_code AND p.cadence = 'external')
"""


def apply_event(connection: psycopg.Connection[Any], event: Event, user_id: int, *, after_cancel: str) -> Decision:
    """Take in what an event says of a subscription, and set the user's plan and day by it.

    Args:
        connection: in a transaction that is alone with the user's customers.
        event: of `SUBSCRIPTION_TYPES`.
        user_id: whose subscription it is.
        after_cancel: the plan of those who have cancelled.

    Raises:
        RefusedError: it carries no subscription.
        psycopg.errors.LockNotAvailable: somebody else has the user locked.
    """
    subscription = stripe_objects.read_subscription(event)
    rank = _rank(event, subscription)
    kept = _kept(connection, subscription.id)
    if kept is not None and not _is_newer(connection, event, rank, kept):
        return Decision("outdated", f"by event {kept.event_id} it is {kept.status}", user_id)
    connection.execute(_LOCK_USER, {"user_id": user_id})
    before = _standing(connection, user_id, after_cancel)
    price, plan_code = _find_plan(connection, subscription)
    values = {
        "subscription_id": subscription.id,
        "customer_id": event.customer_id,
        "status": subscription.status,
        "created": subscription.created,
        "price_id": price.id if price else None,
        "plan_code": plan_code,
        "anniversary": subscription.anchor if price and price.longer_than_month else None,
        "event_id": event.id,
        "event_created": event.created,
        "event_rank": rank,
    }
    connection.execute(_KEEP, values)
    after = _standing(connection, user_id, after_cancel)
    decision = _set_plan(connection, event, user_id, before, after, lost=subscription.status in _LOST)
    stripe_inbox.wake(connection, stripe_customers.customers_of(connection, user_id), WAITS_FOR_PLAN)
    if decision is not None:
        return decision
    if subscription.status in ENTITLED and plan_code is None:
        return Decision("unknown_plan", _unnamed(price), user_id)
    return Decision("unchanged", None, user_id)


def _set_plan(  # noqa: PLR0913 - the event, the user, and both sides of it
    connection: psycopg.Connection[Any],
    event: Event,
    user_id: int,
    before: _Standing,
    after: _Standing,
    *,
    lost: bool,
) -> Decision | None:
    """Give the user the plan and the day that follow; None where they have them, or none follow."""
    day = None if before.day_is_stripes or after.day_is_stripes else before.day
    if after.lead is not None:
        plan_code, day = after.lead_plan, after.lead_day if after.lead_day is not None else day
    elif lost and (before.plan_is_stripes or after.plan_is_stripes):
        plan_code = after.after_cancel
    else:
        return None
    if (plan_code, day) == (before.plan_code, before.day):
        return None
    connection.execute(_SET, {"plan_code": plan_code, "day": day, "user_id": user_id})
    connection.execute(_RESTORE_DATE, {"user_id": user_id})
    detail: dict[str, Any] = {"event": event.id, "subscription": after.lead, "plan": [before.plan_code, plan_code]}
    if day != before.day:
        detail["creditRefreshDay"] = [before.day, day]
    connection.execute(_AUDIT, {"user_id": user_id, "detail": Jsonb(detail)})
    return Decision("plan_set", f"plan {plan_code or 'none'}" + (f", day {day}" if day is not None else ""), user_id)


def _kept(connection: psycopg.Connection[Any], subscription_id: str) -> _Kept | None:
    with connection.cursor(row_factory=class_row(_Kept)) as cursor:
        return cursor.execute(_KEPT, {"subscription_id": subscription_id}).fetchone()


def _standing(connection: psycopg.Connection[Any], user_id: int, after_cancel: str) -> _Standing:
    parameters = {"user_id": user_id, "after_cancel": after_cancel, "entitled": sorted(ENTITLED)}
    with connection.cursor(row_factory=class_row(_Standing)) as cursor:
        return one(cursor.execute(_STANDING, parameters))


def _find_plan(connection: psycopg.Connection[Any], subscription: Subscription) -> tuple[Price | None, str | None]:
    """The price that names a plan, and the plan; where none does, the first price."""
    names = [name for price in subscription.prices for name in price.names]
    there = {code for (code,) in connection.execute(_PLANS, {"names": names})}
    for price in subscription.prices:
        for name in price.names:
            if name in there:
                return price, name
    return (subscription.prices[0] if subscription.prices else None), None


def _unnamed(price: Price | None) -> str:
    if price is None:
        return "the subscription has no items"
    return f"price {price.id}: no plan is called {' or '.join(map(repr, price.names))}"


def _rank(event: Event, subscription: Subscription) -> int:
    if subscription.status in ENDED:
        return _RANK_ENDED
    if event.type == SUBSCRIPTION_CREATED:
        return _RANK_CREATED
    return _RANK_INCOMPLETE if subscription.status == "incomplete" else _RANK_LATER


def _is_newer(connection: psycopg.Connection[Any], event: Event, rank: int, kept: _Kept) -> bool:
    """Whether an event says more of its subscription than the one that is kept; the same one does, once more."""
    if event.id == kept.event_id:
        return True
    if kept.status in ENDED or event.created < kept.event_created:
        return False
    if event.created > kept.event_created:
        return True
    if rank != kept.event_rank:
        return rank > kept.event_rank
    # Of one second and one kind: the later one says of what it has changed that it was as the earlier one shows it.
    other = stripe_inbox.read_event(connection, kept.event_id)
    if other is not None:
        after, before = stripe_objects.follows(event, other), stripe_objects.follows(other, event)
        if after != before:
            return after
    return event.id > kept.event_id
