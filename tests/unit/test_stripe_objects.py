"""What is read of Stripe's objects: every shape that its events have carried, and whatever else may come."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refresh import stripe_objects
from refresh.errors import RefusedError
from tests.integration.billing import MONTH, YEARLY, Price, Subscription, event, now, ts

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("shape", ["2026", "2022"])
def test_an_invoice_is_for_the_period_of_its_subscription_line(shape: str) -> None:
    subscription = Subscription()
    raw = subscription.paid(shape=shape)
    read = stripe_objects.read_invoice(raw["data"]["object"])
    assert (read.subscription_id, read.price_ids) == ("sub_1Qa", frozenset({"price_1Monthly"}))
    assert (read.start, read.end, read.cut_short) == (subscription.since, subscription.until, False)
    found = stripe_objects.read_event(raw)
    assert (found.customer_id, found.subscription_id) == ("cus_Ada", "sub_1Qa")


@pytest.mark.parametrize("shape", ["2026", "2022"])
def test_prorations_are_no_period(shape: str) -> None:
    subscription = Subscription()
    lines = [
        subscription.line(shape, proration=True, amount=-1200),
        subscription.line(shape, proration=True, amount=3000),
    ]
    read = stripe_objects.read_invoice(
        subscription.invoice(reason="subscription_update", shape=shape, lines=lines)
    )  # fmt: skip
    assert (read.start, read.end, read.cut_short) == (None, None, False)


@pytest.mark.parametrize("shape", ["2026", "2022"])
def test_beside_prorations_the_new_period_counts(shape: str) -> None:
    """As when a change of the price begins a new cycle."""
    before = Subscription()
    after = Subscription(start=now(), price=YEARLY)
    lines = [before.line(shape, proration=True, amount=-1200), after.line(shape)]
    read = stripe_objects.read_invoice(after.invoice(reason="subscription_update", shape=shape, lines=lines))
    assert (read.start, read.price_ids) == (after.since, frozenset({YEARLY.id}))


@pytest.mark.parametrize("shape", ["2026", "2022"])
def test_a_first_period_that_the_anchor_cuts_off_is_one(shape: str) -> None:
    stub = Subscription(length=timedelta(days=12))
    line = stub.line(shape, stub=True, amount=800)
    other = Subscription(start=now()).line(shape, proration=True)
    read = stripe_objects.read_invoice(stub.invoice(reason="subscription_create", shape=shape, lines=[other, line]))
    assert (read.start, read.end) == (stub.since, stub.until)
    for reason in ("subscription_update", "subscription_cycle", "manual"):
        assert stripe_objects.read_invoice(stub.invoice(reason=reason, shape=shape, lines=[line])).start is None


def test_all_that_a_period_was_paid_for_counts() -> None:
    addon = Subscription(price=Price("price_1Addon", None))
    usage = Subscription(created=addon.created - MONTH, price=Price("price_1Usage", None))
    lines = [addon.line(), Subscription(created=addon.created).line(), usage.line()]
    read = stripe_objects.read_invoice(addon.invoice(reason="subscription_cycle", shape="2026", lines=lines))
    assert read.price_ids == {"price_1Addon", "price_1Monthly"}


def test_usage_of_the_past_is_no_period() -> None:
    metered = Subscription(price=Price(usage="metered"))
    read = stripe_objects.read_invoice(metered.invoice(reason="subscription_cycle", shape="2022"))
    assert read.start is None
    # Newer lines do not say what they are; their period is the one before.
    licensed = Subscription(start=now())
    usage = Subscription(start=now() - MONTH, price=Price("price_1Usage", None, usage="metered"))
    lines = [usage.line(), licensed.line()]
    assert stripe_objects.read_invoice(licensed.invoice(reason="x", shape="2026", lines=lines)).start == licensed.since


def test_of_periods_that_begin_together_the_shortest_counts() -> None:
    month, year = Subscription(start=now()), Subscription(start=now(), length=12 * MONTH)
    for lines in ([month.line(), year.line()], [year.line(), month.line()]):
        read = stripe_objects.read_invoice(month.invoice(reason="x", shape="2026", lines=lines))
        assert read.end == month.until


def test_an_invoice_whose_lines_were_cut_short_says_so() -> None:
    subscription = Subscription()
    invoice = subscription.invoice(
        reason="subscription_cycle", shape="2026", lines=[subscription.line(proration=True)], has_more=True
    )
    assert stripe_objects.read_invoice(invoice).cut_short
    invoice = subscription.invoice(reason="subscription_cycle", shape="2026", has_more=True)
    assert not stripe_objects.read_invoice(invoice).cut_short


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"object": "subscription", "metadata": {"userId": "ada"}}, "ada"),
        ({"object": "subscription", "metadata": {"user_id": "ada"}}, "ada"),
        ({"object": "subscription", "metadata": {"external_id": "ada", "userId": "eve"}}, "eve"),
        ({"object": "invoice", "metadata": {}, "subscription_details": {"metadata": {"userId": "ada"}}}, "ada"),
        (Subscription(metadata={"userId": "ada"}).invoice(reason="x", shape="2026"), "ada"),
        ({"object": "invoice", "lines": {"data": [Subscription(metadata={"userId": "ada"}).line("2022")]}}, "ada"),
        ({"object": "checkout.session", "client_reference_id": "ada", "metadata": {}}, "ada"),
        ({"object": "checkout.session", "client_reference_id": "cart-7", "metadata": {"userId": "ada"}}, "ada"),
        ({"object": "subscription", "client_reference_id": "ada"}, None),
        ({"object": "customer", "metadata": {"userId": ""}}, None),
        ({"object": "customer", "metadata": {"userId": 7}}, None),
        ({"object": "customer", "metadata": None}, None),
    ],
)
def test_whom_an_object_names(found: dict[str, Any], named: str | None) -> None:
    assert stripe_objects.read_event(event("x", found)).user_named == named


@pytest.mark.parametrize(
    ("found", "customer"),
    [
        ({"object": "customer", "id": "cus_1"}, "cus_1"),
        ({"object": "invoice", "customer": "cus_1"}, "cus_1"),
        ({"object": "invoice", "customer": {"id": "cus_1", "object": "customer"}}, "cus_1"),
        ({"object": "invoice", "customer": None, "customer_account": "acct_1"}, "acct_1"),
        ({"object": "invoice", "customer": None}, None),
    ],
)
def test_whose_an_object_is(found: dict[str, Any], customer: str | None) -> None:
    assert stripe_objects.read_event(event("x", found)).customer_id == customer


def test_what_a_price_may_be_called() -> None:
    raw = Subscription(price=Price("price_1", "gold", "gold-lookup", "year")).says("created")
    read = stripe_objects.read_subscription(stripe_objects.read_event(raw))
    assert [(price.names, price.longer_than_month) for price in read.prices] == [
        (("gold", "gold-lookup", "gold", "price_1"), True)
    ]
    for interval, count, longer in (("month", 1, False), ("month", 3, True), ("week", 1, False), ("year", 1, True)):
        raw = Subscription(price=Price(interval=interval, count=count)).says("created")
        read = stripe_objects.read_subscription(stripe_objects.read_event(raw))
        assert read.prices[0].longer_than_month is longer


def test_a_plan_of_the_old_kind_is_a_price() -> None:
    raw = Subscription(price=Price("gold", None, interval="year")).says("created", shape="2022")
    del raw["data"]["object"]["items"]["data"][0]["price"]
    read = stripe_objects.read_subscription(stripe_objects.read_event(raw))
    assert (read.prices[0].id, read.prices[0].names, read.prices[0].longer_than_month) == ("gold", ("gold",), True)


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        {},
        {"object": "v2.core.event", "id": "evt_1", "type": "x", "created": "2026-01-01T00:00:00Z", "data": {}},
        {**event("x", {"id": "y"}), "id": 7},
        {**event("x", {"id": "y"}), "created": "now"},
        {**event("x", {"id": "y"}), "created": -1},
        {**event("x", {"id": "y"}), "created": 10**20},
        {**event("x", {"id": "y"}), "created": True},
        {**event("x", {"id": "y"}), "data": {"object": []}},
    ],
)
def test_what_is_no_snapshot_event(raw: object) -> None:
    with pytest.raises(RefusedError, match="payload style `snapshot`"):
        stripe_objects.read_event(raw)


def test_a_subscription_without_its_facts_is_refused() -> None:
    raw = Subscription().says("created")
    del raw["data"]["object"]["status"]
    with pytest.raises(RefusedError, match="carries no subscription"):
        stripe_objects.read_subscription(stripe_objects.read_event(raw))


@given(JSON, JSON, JSON)
def test_nothing_that_may_come_breaks_the_reading(lines: Any, parent: Any, other: Any) -> None:
    found = {"id": "x", "lines": lines, "parent": parent, "subscription": other, "customer": other, "metadata": parent}
    found |= {"items": lines, "status": "active", "created": 1, "billing_cycle_anchor": other}
    for type_ in ("invoice.paid", "customer.subscription.updated", "customer.updated"):
        read = stripe_objects.read_event(event(type_, found))
        assert read.customer_id is None or read.customer_id
        _ = read.subscription_id, read.user_named
        stripe_objects.read_subscription(read)


@given(JSON)
def test_one_line_of_anything(value: Any) -> None:
    subscription = Subscription()
    for key in ("parent", "period", "pricing", "price", "plan", "type", "metadata", "subscription"):
        invoice = subscription.invoice(reason="x", shape="2026", lines=[{**subscription.line(), key: value}])
        stripe_objects.read_invoice(invoice)


@given(JSON)
def test_what_is_stored_is_what_postgresql_takes(value: Any) -> None:
    text = json.dumps(stripe_objects.storable({"a\0\ud800": value, "b": "\udc00\0"}))
    assert "\\u0000" not in text
    json.loads(text.encode("ascii").decode()).__str__().encode("utf-8")
    assert stripe_objects.storable({"plain": ["text", 1, None]}) == {"plain": ["text", 1, None]}


def test_the_later_of_two_says_what_was_before() -> None:
    first = stripe_objects.read_event(Subscription().says("updated", previous={"default_payment_method": None}))
    second = stripe_objects.read_event(
        Subscription(status="past_due").says("updated", previous={"status": "active", "items": {"has_more": False}})
    )
    assert stripe_objects.follows(second, first)
    assert not stripe_objects.follows(first, second)


def test_instants_are_utc() -> None:
    at = datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
    assert stripe_objects.read_event(event("x", {"id": "y"}, at=at)).created == at
    assert ts(at) == 1774747800
