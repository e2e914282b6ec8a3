"""Which user a customer is: by a link, by metadata, or not yet; and events that are stored whatever they are."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from refresh import stripe_customers, stripe_events, stripe_inbox
from refresh.errors import NotFoundError, RefusedError
from tests.integration import billing
from tests.integration.billing import TERMS, Subscription, deliver, event, now, outcomes, see, upkeep

if TYPE_CHECKING:
    from refresh.stripe_customers import Linked
    from tests.integration.world import World

CUSTOMER = {"object": "customer", "id": "cus_Ada", "email": "ada@example.com"}


@pytest.fixture
def ada(world: World) -> int:
    billing.plans(world)
    return world.user(due_in="10 days")


def link(world: World, customer: str = "cus_Ada", user: str = "ada") -> Linked:
    with world.database.transaction() as connection:
        return stripe_customers.link(connection, customer, user, actor="cli:ops")


def links(world: World) -> list[tuple[str, int, str]]:
    rows = world.rows("SELECT customer_id, user_id, linked_by FROM stripe_customers ORDER BY 1")
    return [(row["customer_id"], row["user_id"], row["linked_by"]) for row in rows]


def test_metadata_tells_and_is_remembered(world: World, ada: int) -> None:
    named = Subscription(metadata={"userId": "ada"}).says("created")
    assert deliver(world, named).outcome == "plan_set"
    assert links(world) == [("cus_Ada", ada, f"event {named['id']}")]
    # The invoice of the older shape says it nowhere, and need not.
    assert deliver(world, Subscription().paid(shape="2022")).outcome == "granted"
    assert [row["action"] for row in world.audit(ada)] == ["stripe_linked", "stripe_plan_set", "refreshed"]


@pytest.mark.parametrize(
    "teaching",
    [
        event("customer.updated", {**CUSTOMER, "metadata": {"external_id": "ada"}}),
        event(
            "checkout.session.completed",
            {"object": "checkout.session", "customer": "cus_Ada", "client_reference_id": "ada"},
        ),
    ],
)
def test_what_came_before_somebody_told_is_processed_then(world: World, ada: int, teaching: dict[str, Any]) -> None:
    subscription = Subscription()
    early = [subscription.paid(), subscription.says("created")]
    assert outcomes(world, *early) == ["unknown_customer"] * 2
    assert all(see(world, raw).settled for raw in early)
    assert deliver(world, {**teaching, "id": "evt_told"}).outcome == "linked"
    assert [see(world, raw).outcome for raw in early] == ["granted", "plan_set"]
    assert len(billing.windows(world, ada)) == 1


def test_a_link_by_hand_goes_before_what_events_say(world: World, ada: int) -> None:
    eve = world.user("eve", due_in="10 days")
    assert link(world, user="eve").was is None
    assert deliver(world, Subscription(metadata={"userId": "ada"}).says("created")).user == "eve"
    assert (world.see(ada)["plan_code"], world.see(eve)["plan_code"]) == ("free", "pro-monthly")


def test_a_link_wakes_what_has_waited_and_can_be_corrected(world: World, ada: int) -> None:
    raw = Subscription().says("created")
    assert deliver(world, raw).outcome == "unknown_customer"
    linked = link(world)
    assert (linked.was, linked.events) == (None, 1)
    with world.database.statements() as connection:
        done = stripe_events.process_customer(connection, "cus_Ada", TERMS)
    assert [event.outcome for event in done] == ["plan_set"]
    again = link(world)
    assert (again.was, again.events) == ("ada", 0)
    eve = world.user("eve", due_in="10 days")
    assert link(world, user="eve").was == "ada"
    assert links(world) == [("cus_Ada", eve, "cli:ops")]
    # What was set stays as it is.
    assert (world.see(ada)["plan_code"], world.see(eve)["plan_code"]) == ("pro-monthly", "free")


def test_a_user_who_is_named_and_comes_later_is_waited_for(world: World, ada: int) -> None:
    """An app often adds its user after the checkout."""
    del ada
    raw = Subscription(metadata={"userId": "bob"}).says("created")
    done = deliver(world, raw)
    assert (done.outcome, done.note, done.settled) == ("unknown_customer", "named 'bob'", False)
    assert [event.outcome for event in upkeep(world)] == ["unknown_customer"]
    bob = world.user("bob", due_in="10 days")
    assert [event.outcome for event in upkeep(world)] == ["plan_set"]
    assert world.see(bob)["plan_code"] == "pro-monthly"


def test_nobody_is_waited_for_longer_than_a_week(world: World, ada: int) -> None:
    del ada
    raw = Subscription(metadata={"userId": "bob"}).says("created")
    deliver(world, raw)
    world.sql.execute("UPDATE stripe_events SET received_at = now() - interval '8 days'")
    upkeep(world)
    stored = see(world, raw)
    assert (stored.outcome, stored.settled) == ("unknown_customer", True)


def test_two_customers_may_be_one_user(world: World, ada: int) -> None:
    younger = Subscription()
    older = Subscription("sub_2", "cus_Ada2", created=younger.created - timedelta(minutes=9))
    link(world)
    link(world, "cus_Ada2")
    paid = older.paid()
    assert outcomes(world, younger.says("created"), older.says("created"), paid) == [
        "plan_set", "unchanged", "other_subscription",
    ]  # fmt: skip
    # What becomes of one of them decides over what the other one has paid for.
    ended = replace(younger, status="canceled").says("deleted", at=now())
    assert deliver(world, ended).outcome == "unchanged"
    assert see(world, paid).outcome == "granted"
    assert billing.windows(world, ada) == [(older.since, older.until, 20_000)]


def test_a_deleted_user_takes_the_link_along_and_leaves_the_event(world: World, ada: int) -> None:
    raw = Subscription(metadata={"userId": "ada"}).says("created")
    deliver(world, raw)
    world.sql.execute("DELETE FROM users WHERE id = %s", (ada,))
    assert links(world) == []
    assert (see(world, raw).user, see(world, raw).outcome) == (None, "plan_set")
    assert deliver(world, Subscription().says("updated", at=now())).outcome == "unknown_customer"


def test_events_of_other_types_are_kept_and_ignored(world: World, ada: int) -> None:
    del ada
    raw = event("payment_intent.created", {"object": "payment_intent", "id": "pi_1", "customer": "cus_Eve"})
    done = deliver(world, raw)
    assert (done.outcome, done.settled, done.customer_id) == ("ignored", True, "cus_Eve")
    nobodys = event("balance.available", {"object": "balance"})
    assert deliver(world, nobodys).outcome == "ignored"
    with world.database.statements() as connection:
        assert stripe_inbox.read_payload(connection, nobodys["id"]) == nobodys


def test_what_postgresql_cannot_hold_is_stored_without_it(world: World, ada: int) -> None:
    del ada
    raw = event("customer.created", {**CUSTOMER, "name": "A\0da \ud83d", "metadata": {"userId": "a\0da"}})
    assert deliver(world, raw).outcome == "ignored"
    kept = world.value("SELECT payload -> 'data' -> 'object' ->> 'name' FROM stripe_events")
    assert kept == "A\N{REPLACEMENT CHARACTER}da \N{REPLACEMENT CHARACTER}"


def test_what_is_no_event_is_not_stored(world: World, ada: int) -> None:
    del ada
    with world.database.statements() as connection, pytest.raises(RefusedError, match="no snapshot event"):
        stripe_inbox.store(connection, {"object": "v2.core.event"})
    assert world.value("SELECT count(*) FROM stripe_events") == 0


def test_a_broken_subscription_is_kept_with_its_error(world: World, ada: int) -> None:
    del ada
    raw = Subscription(metadata={"userId": "ada"}).says("created")
    del raw["data"]["object"]["status"]
    with pytest.raises(RefusedError, match="carries no subscription"):
        deliver(world, raw)
    stored = see(world, raw)
    assert (stored.outcome, stored.error is not None, stored.look_at is not None) == (None, True, True)
    assert stored.text.startswith("not processed yet: event ")
    # The link that it told went with it; what is whole tells it again.
    assert links(world) == []


def test_unknown_names(world: World, ada: int) -> None:
    del ada
    with pytest.raises(NotFoundError, match="there is no user 'bob'"):
        link(world, user="bob")
    with pytest.raises(RefusedError, match="is no id of a customer"):
        link(world, " ")
    with world.database.statements() as connection, pytest.raises(NotFoundError, match="there is no event 'evt_0'"):
        stripe_events.process(connection, "evt_0", TERMS)
