"""What is read of Stripe's objects, in each shape that its events have carried.

Since API version 2025-03-31 an invoice and its lines name their subscription under `parent`, a line its price under
`pricing`, and a subscription's items their own periods; before, all of it lay on the objects themselves. An endpoint
keeps the version that it was made with, so both arrive. Nothing here relies on a shape: what is missing, or is of
another type, reads as absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from refresh.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

INVOICE_PAID = "invoice.paid"
SUBSCRIPTION_CREATED = "customer.subscription.created"
SUBSCRIPTION_DELETED = "customer.subscription.deleted"
SUBSCRIPTION_TYPES = frozenset(
    {SUBSCRIPTION_CREATED, SUBSCRIPTION_DELETED}
    | {f"customer.subscription.{change}" for change in ("updated", "paused", "resumed")}
)
"""Each carries the subscription as it stood when the event was made."""

ENTITLED = frozenset({"trialing", "active", "past_due"})
"""Statuses of a subscription whose customer has what it is for. `past_due` is Stripe's time of grace; `unpaid` and
`paused` follow on it."""
ENDED = frozenset({"canceled", "incomplete_expired"})
"""Statuses that no subscription leaves again."""

USER_KEYS = ("userId", "user_id", "external_id")
"""Keys of metadata under which an app says who a customer is, by its own id."""
NAME_MAX = 500

_SECONDS_MAX = 253_402_300_799  # the end of the year 9999


@dataclass(frozen=True, slots=True)
class Event:
    """A snapshot event.

    Attributes:
        created: when Stripe made it; in whole seconds.
        object: the object as it stood then.
        previous: what the values that have changed were before.
    """

    id: str
    type: str
    livemode: bool
    created: datetime
    object: dict[str, Any]
    previous: dict[str, Any]

    @property
    def customer_id(self) -> str | None:
        """Whom it is about: the object's customer, or the customer that it is."""
        if self.object.get("object") == "customer":
            return _id(self.object)
        return _id(self.object.get("customer")) or _id(self.object.get("customer_account"))

    @property
    def subscription_id(self) -> str | None:
        """Which subscription it is about."""
        if self.type in SUBSCRIPTION_TYPES:
            return _id(self.object)
        return read_invoice(self.object).subscription_id if self.type == INVOICE_PAID else None

    @property
    def user_named(self) -> str | None:
        """The app's own id of the user, where the object's metadata says it."""
        for metadata in _metadata(self.object):
            for key in USER_KEYS:
                if name := _name(metadata.get(key)):
                    return name
        if self.object.get("object") == "checkout.session":
            return _name(self.object.get("client_reference_id"))
        return None


@dataclass(frozen=True, slots=True)
class Price:
    """What a subscription's item costs, and so what it is.

    Attributes:
        names: what may be a plan's code, the likeliest first: `metadata.plan`, `lookup_key`, and the id, which in the
            days of Stripe's plans was the app's to choose.
        longer_than_month: one period of it is.
    """

    id: str | None
    names: tuple[str, ...]
    longer_than_month: bool


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription.

    Attributes:
        created: when it was made; of two, the younger one says what the user's plan is.
        anchor: where its billing cycle is anchored.
    """

    id: str
    status: str
    created: datetime
    anchor: datetime | None
    prices: tuple[Price, ...]


@dataclass(frozen=True, slots=True)
class Invoice:
    """An invoice, as far as it is a subscription's.

    Attributes:
        start, end: the billing period that it is for; None where it is for none, as for prorations alone.
        price_ids: what the period was paid for.
        cut_short: it has more lines than an event carries, and the period is on none of these.
    """

    id: str | None
    subscription_id: str | None
    start: datetime | None
    end: datetime | None
    price_ids: frozenset[str]
    cut_short: bool


def read_event(raw: object) -> Event:
    """Read a snapshot event.

    Raises:
        RefusedError: it is none.
    """
    event = _dict(raw)
    object_ = _dict(_dict(event.get("data")).get("object"))
    created = _instant(event.get("created"))
    id_, type_ = _name(event.get("id")), _name(event.get("type"))
    if event.get("object") != "event" or not id_ or not type_ or created is None or not object_:
        raise RefusedError(
            "the body is no snapshot event of Stripe's (`object`: `event`, with `id`, `type`, `created` and "
            "`data.object`): give the endpoint the payload style `snapshot`"
        )
    previous = _dict(_dict(event.get("data")).get("previous_attributes"))
    return Event(id_, type_, event.get("livemode") is True, created, object_, previous)


def read_subscription(event: Event) -> Subscription:
    """The subscription that a subscription event carries.

    Raises:
        RefusedError: it lacks its id, its status or its date.
    """
    found = event.object
    status = "canceled" if event.type == SUBSCRIPTION_DELETED else _name(found.get("status"))
    id_, created = _id(found), _instant(found.get("created"))
    if id_ is None or status is None or created is None:
        raise RefusedError(f"event {event.id} carries no subscription with `id`, `status` and `created`")
    items = [_dict(item) for item in _list(found.get("items")) if _dict(item).get("deleted") is not True]
    anchor = _instant(found.get("billing_cycle_anchor"))
    return Subscription(id_, status, created, anchor, tuple(_price(item) for item in items))


def read_invoice(found: dict[str, Any]) -> Invoice:
    """The billing period that an invoice is for.

    That of its subscription lines, prorations aside; but a new subscription's first period may be one that is cut off
    where its cycle is anchored, and that is a period. Where they differ, as prices by month and by year may in one
    subscription, it is the period that began last, and of those the shortest: such periods follow on each other.
    """
    first = found.get("billing_reason") == "subscription_create"
    subscription_id = (
        _id(_dict(_dict(found.get("parent")).get("subscription_details")).get("subscription"))
        or _id(found.get("subscription"))
    )  # fmt: skip
    lines = [
        (period[0], -period[1].timestamp(), period[1], line)
        for line in map(_dict, _list(found.get("lines")))
        if _is_subscriptions(line, first=first) and (period := _period(line))
    ]
    if not lines:
        cut_short = subscription_id is not None and _dict(found.get("lines")).get("has_more") is True
        return Invoice(_id(found), subscription_id, None, None, frozenset(), cut_short)
    start, _, end, line = max(lines, key=lambda each: each[:2])
    subscription_id = _line_subscription(line) or subscription_id
    price_ids = frozenset(filter(None, (_line_price(other) for begins, *_, other in lines if begins == start)))
    return Invoice(_id(found), subscription_id, start, end, price_ids, cut_short=False)


def follows(later: Event, earlier: Event) -> bool:
    """Whether an event says of what has changed that it was before as another event shows it."""
    return bool(later.previous) and _is_part(later.previous, earlier.object)


def storable(value: Any) -> Any:
    """JSON as `jsonb` takes it, which has no NUL and no half of a surrogate pair."""
    if isinstance(value, dict):
        return {_text(key): storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [storable(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _is_part(some: object, whole: object) -> bool:
    if isinstance(some, dict) and isinstance(whole, dict):
        return all(key in whole and _is_part(value, whole[key]) for key, value in some.items())
    return some == whole


def _metadata(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Where an app may have said whose the object is; on a line, Stripe repeats the subscription's."""
    yield _dict(found.get("metadata"))
    yield _dict(_dict(_dict(found.get("parent")).get("subscription_details")).get("metadata"))
    yield _dict(_dict(found.get("subscription_details")).get("metadata"))
    for line in map(_dict, _list(found.get("lines"))):
        if _is_subscriptions(line):
            yield _dict(line.get("metadata"))


def _is_subscriptions(line: dict[str, Any], *, first: bool = False) -> bool:
    """Whether a line is for a period of a subscription: no proration, no single item, no usage of the past.

    Args:
        line: an invoice's.
        first: of a subscription's first invoice, where a part of a period is the period; what comes of an invoice item
            is a proration there, too.
    """
    details = _dict(_dict(line.get("parent")).get("subscription_item_details"))
    prorated = details.get("proration") is True or line.get("proration") is True
    if prorated and not (first and _id(details.get("invoice_item")) is _id(line.get("invoice_item")) is None):
        return False
    for price in (_dict(line.get("price")), _dict(line.get("plan"))):
        if "metered" in {price.get("usage_type"), _dict(price.get("recurring")).get("usage_type")}:
            return False
    return bool(details) or line.get("type") == "subscription"


def _line_subscription(line: dict[str, Any]) -> str | None:
    details = _dict(_dict(line.get("parent")).get("subscription_item_details"))
    return _id(details.get("subscription")) or _id(line.get("subscription"))


def _line_price(line: dict[str, Any]) -> str | None:
    details = _dict(_dict(line.get("pricing")).get("price_details"))
    return _id(details.get("price")) or _id(line.get("price")) or _id(line.get("plan"))


def _period(line: dict[str, Any]) -> tuple[datetime, datetime] | None:
    period = _dict(line.get("period"))
    start, end = _instant(period.get("start")), _instant(period.get("end"))
    return (start, end) if start is not None and end is not None and start < end else None


def _price(item: dict[str, Any]) -> Price:
    price, plan = _dict(item.get("price")), _dict(item.get("plan"))
    id_ = _id(price) or _id(plan)
    said = (_dict(price.get("metadata")).get("plan"), price.get("lookup_key"), _dict(plan.get("metadata")).get("plan"))
    every = _dict(price.get("recurring")) or plan
    interval, count = every.get("interval"), every.get("interval_count")
    longer = interval == "year" or (interval == "month" and isinstance(count, int) and count > 1)
    return Price(id_, tuple(filter(None, map(_name, (*said, id_)))), longer)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    """A list of Stripe's, which is an object with `data`."""
    data = _dict(value).get("data")
    return data if isinstance(data, list) else []


def _id(value: object) -> str | None:
    """An object's id, whether or not the object is there."""
    return _name(value.get("id") if isinstance(value, dict) else value)


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= NAME_MAX else None


def _instant(value: object) -> datetime | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _SECONDS_MAX:
        return None
    return datetime.fromtimestamp(value, UTC)
