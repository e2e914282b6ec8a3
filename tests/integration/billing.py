"""Stripe as the tests play it: its objects in the shapes that its events carry, and the events about them.

The shapes are those of recorded events: `2026` as of API version 2025-03-31 and later, `2022` as before. Fields that
nobody reads are there as far as they could be mistaken for one that somebody does.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from refresh import stripe_events, stripe_inbox

if TYPE_CHECKING:
    from refresh.stripe_inbox import Stored
    from tests.integration.world import World

TERMS = stripe_events.Terms("free")
MONTH = timedelta(days=30)
YEAR = timedelta(days=365)

_numbers = itertools.count(1)
_ids = itertools.count(10**8, -1)


def now() -> datetime:
    """To the second, as Stripe tells the time."""
    return datetime.now(UTC).replace(microsecond=0)


def ts(at: datetime) -> int:
    return int(at.timestamp())


def event(
    type_: str,
    found: dict[str, Any],
    *,
    at: datetime | None = None,
    previous: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """An event about an object, made at an instant."""
    data = {"object": found, **({"previous_attributes": previous} if previous is not None else {})}
    return {
        "id": f"evt_1S{next(_ids):09d}",  # which says nothing of the order; where it did, it would be the wrong one
        "object": "event",
        "api_version": "2026-10-28.endive",
        "created": ts(at or now()),
        "data": data,
        "livemode": True,
        "pending_webhooks": 1,
        "request": {"id": None, "idempotency_key": None},
        "type": type_,
        **more,
    }


@dataclass(frozen=True)
class Price:
    """A price. `plan` is its metadata's."""

    id: str = "price_1Monthly"
    plan: str | None = "pro-monthly"
    lookup_key: str | None = None
    interval: str = "month"
    count: int = 1
    usage: str = "licensed"

    def recurring(self) -> dict[str, Any]:
        return {
            "interval": self.interval,
            "interval_count": self.count,
            "meter": None,
            "trial_period_days": None,
            "usage_type": self.usage,
        }

    def json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "price",
            "active": True,
            "billing_scheme": "per_unit",
            "currency": "usd",
            "lookup_key": self.lookup_key,
            "metadata": {"plan": self.plan} if self.plan else {},
            "nickname": None,
            "product": "prod_Q",
            "recurring": self.recurring(),
            "type": "recurring",
            "unit_amount": 2000,
        }

    def plan_json(self) -> dict[str, Any]:
        """The same as a plan, as items and lines showed it beside the price."""
        return {
            "id": self.id,
            "object": "plan",
            "interval": self.interval,
            "interval_count": self.count,
            "metadata": {"plan": self.plan} if self.plan else {},
            "product": "prod_Q",
            "usage_type": self.usage,
        }


MONTHLY = Price()
YEARLY = Price("price_1Yearly", "yearly", interval="year")


@dataclass
class Subscription:
    """A subscription of a customer's, at its start or later."""

    id: str = "sub_1Qa"
    customer: str = "cus_Ada"
    price: Price = MONTHLY
    status: str = "active"
    created: datetime = field(default_factory=lambda: now() - timedelta(minutes=30))
    start: datetime | None = None
    length: timedelta = MONTH
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def since(self) -> datetime:
        return self.start or self.created

    @property
    def until(self) -> datetime:
        return self.since + self.length

    def json(self, shape: str = "2026") -> dict[str, Any]:
        periods = {"current_period_start": ts(self.since), "current_period_end": ts(self.until)}
        item = {
            "id": f"si_{self.id}",
            "object": "subscription_item",
            "metadata": {},
            "plan": self.price.plan_json(),
            "price": self.price.json(),
            "quantity": 1,
            "subscription": self.id,
            **(periods if shape == "2026" else {}),
        }
        return {
            "id": self.id,
            "object": "subscription",
            "billing_cycle_anchor": ts(self.created),
            "cancel_at_period_end": False,
            "collection_method": "charge_automatically",
            "created": ts(self.created),
            "customer": self.customer,
            "items": {"object": "list", "data": [item], "has_more": False, "total_count": 1},
            "latest_invoice": "in_1",
            "metadata": self.metadata,
            "start_date": ts(self.created),
            "status": self.status,
            **(periods if shape == "2022" else {}),
        }

    def says(self, change: str, *, at: datetime | None = None, shape: str = "2026", **more: Any) -> dict[str, Any]:
        """`customer.subscription.…`."""
        return event(f"customer.subscription.{change}", self.json(shape), at=at or self.since, **more)

    def paid(
        self, *, reason: str = "subscription_create", shape: str = "2026", at: datetime | None = None, **more: Any
    ) -> dict[str, Any]:
        """`invoice.paid` for the present period."""
        return event("invoice.paid", self.invoice(reason=reason, shape=shape, **more), at=at or self.since)

    def invoice(
        self, *, reason: str, shape: str, lines: list[dict[str, Any]] | None = None, has_more: bool = False
    ) -> dict[str, Any]:
        lines = [self.line(shape)] if lines is None else lines
        if shape == "2026":
            details = {"metadata": self.metadata, "subscription": self.id}
            own: dict[str, Any] = {
                "parent": {"quote_details": None, "subscription_details": details, "type": "subscription_details"}
            }
        else:
            own = {"subscription": self.id, "subscription_details": {"metadata": self.metadata}, "paid": True}
        return {
            "id": f"in_1S{next(_numbers):08d}",
            "object": "invoice",
            "amount_paid": 2000,
            "billing_reason": reason,
            "created": ts(self.since),
            "customer": self.customer,
            "customer_email": "ada@example.com",
            "lines": {"object": "list", "data": lines, "has_more": has_more, "total_count": len(lines)},
            "metadata": {},
            # Of an invoice itself, they are about the period before.
            "period_start": ts(self.since - self.length),
            "period_end": ts(self.since),
            "status": "paid",
            **own,
        }

    def line(
        self, shape: str = "2026", *, proration: bool = False, stub: bool = False, amount: int = 2000, **more: Any
    ) -> dict[str, Any]:
        """A line for the present period, or a proration of it, or a first period that is cut off by the anchor."""
        item = "ii_1" if proration else None
        period = {"start": ts(self.since), "end": ts(self.until)}
        line = {"id": "il_1", "object": "line_item", "amount": amount, "metadata": self.metadata, "period": period}
        if shape == "2022":
            return {
                **line,
                "invoice_item": item,
                "plan": self.price.plan_json(),
                "price": self.price.json(),
                "proration": proration or stub,
                "subscription": self.id,
                "subscription_item": f"si_{self.id}",
                "type": "invoiceitem" if proration else "subscription",
                **more,
            }
        details = {
            "invoice_item": item,
            "proration": proration or stub,
            "subscription": self.id,
            "subscription_item": f"si_{self.id}",
        }
        return {
            **line,
            "parent": {
                "invoice_item_details": None,
                "subscription_item_details": details,
                "type": "subscription_item_details",
            },
            "pricing": {"price_details": {"price": self.price.id, "product": "prod_Q"}, "type": "price_details"},
            **more,
        }


def plans(world: World) -> None:
    """External plans of 20,000 and 5,000, and one for yearly subscriptions of 2,000 a month."""
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, cadence, grant_mode) VALUES"
        " ('pro-monthly', 'Pro', 20000, 'external', 'reset'), ('basic-monthly', 'Basic', 5000, 'external', 'reset')"
    )
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, cadence, day_of_month, grant_mode)"
        " VALUES ('yearly', 'Yearly', 2000, 'monthly', 1, 'reset')"
    )


def customer(world: World, user_id: int, customer_id: str = "cus_Ada") -> None:
    world.sql.execute("INSERT INTO stripe_customers VALUES (%s, %s, 'test')", (customer_id, user_id))


def deliver(world: World, raw: dict[str, Any], terms: stripe_events.Terms = TERMS) -> Stored:
    """What the route does with an event that Stripe has signed."""
    with world.database.statements() as connection:
        return stripe_events.process(connection, stripe_inbox.store(connection, raw), terms)


def outcomes(world: World, *events: dict[str, Any]) -> list[str | None]:
    """Deliver one after the other."""
    return [deliver(world, raw).outcome for raw in events]


def see(world: World, raw: dict[str, Any]) -> Stored:
    with world.database.statements() as connection:
        return stripe_inbox.read(connection, raw["id"])


def upkeep(world: World, terms: stripe_events.Terms = TERMS) -> list[Stored]:
    """What upkeep does, in an hour from now."""
    world.sql.execute("UPDATE stripe_events SET look_at = look_at - interval '1 hour'")
    with world.database.statements() as connection:
        return stripe_events.process_waiting(connection, terms, limit=200)


def windows(world: World, user_id: int) -> list[tuple[datetime, datetime, int]]:
    """Live grants: where they begin and end, and the amount."""
    rows = world.rows(
        "SELECT window_start, window_end, target FROM credit_refresh_histories WHERE user_id = %s"
        " AND status = 'refreshed' AND reversed_by_run_id IS NULL ORDER BY window_start",
        user_id,
    )
    return [(row["window_start"], row["window_end"], row["target"]) for row in rows]
