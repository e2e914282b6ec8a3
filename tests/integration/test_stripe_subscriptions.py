"""Subscriptions set the plan and the day; what ends, what is unnamed, and what is somebody else's."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from refresh import stripe_events
from tests.integration import billing
from tests.integration.billing import MONTHLY, YEARLY, Price, Subscription, deliver, now, outcomes, see

if TYPE_CHECKING:
    from tests.integration.world import World

BASIC = Price("price_1Basic", "basic-monthly")


@pytest.fixture
def ada(world: World) -> int:
    """On the free plan, refreshed this hour, and known to be a customer."""
    billing.plans(world)
    user_id = world.user()
    billing.customer(world, user_id)
    world.refresh()
    return user_id


def seen(world: World, user_id: int) -> tuple[str | None, int | None]:
    user = world.see(user_id)
    return user["plan_code"], user["credit_refresh_day"]


@pytest.mark.parametrize("shape", ["2026", "2022"])
def test_a_subscription_sets_the_plan_that_its_price_names(world: World, ada: int, shape: str) -> None:
    done = deliver(world, Subscription().says("created", shape=shape))
    assert (done.outcome, done.user, done.note) == ("plan_set", "ada", "plan pro-monthly")
    assert seen(world, ada) == ("pro-monthly", None)
    (row,) = [row for row in world.audit(ada) if row["action"] == "stripe_plan_set"]
    assert (row["actor"], row["detail"]["plan"]) == ("stripe", ["free", "pro-monthly"])


@pytest.mark.parametrize(
    ("price", "plan"),
    [
        (Price(plan="pro-monthly", lookup_key="yearly"), "pro-monthly"),
        (Price(plan=None, lookup_key="pro-monthly"), "pro-monthly"),
        (Price(plan="no-such-plan", lookup_key="pro-monthly"), "pro-monthly"),
    ],
)
def test_metadata_goes_before_the_lookup_key(world: World, ada: int, price: Price, plan: str) -> None:
    deliver(world, Subscription(price=price).says("created"))
    assert seen(world, ada)[0] == plan


def test_of_several_items_the_one_that_names_a_plan_counts(world: World, ada: int) -> None:
    raw = Subscription().says("created")
    extra = Subscription(price=Price("price_1Extra", None)).json()["items"]["data"][0]
    gone = Subscription(price=YEARLY).json()["items"]["data"][0]
    raw["data"]["object"]["items"]["data"] = [{**gone, "deleted": True}, extra, *raw["data"]["object"]["items"]["data"]]
    assert deliver(world, raw).outcome == "plan_set"
    assert seen(world, ada)[0] == "pro-monthly"


def test_a_price_that_names_no_plan_leaves_the_plan_and_says_so(world: World, ada: int) -> None:
    done = deliver(world, Subscription(price=Price(plan="gold")).says("created"))
    assert (done.outcome, done.settled) == ("unknown_plan", True)
    assert "'gold'" in str(done.note)
    assert seen(world, ada) == ("free", None)
    # Once there is such a plan, the event can be processed again.
    world.sql.execute("INSERT INTO plans (code, name, amount) VALUES ('gold', 'Gold', 1)")
    with world.database.statements() as connection:
        again = stripe_events.process(connection, done.id, billing.TERMS, again=True)
    assert again.outcome == "plan_set"
    assert seen(world, ada) == ("gold", None)


def test_a_yearly_subscription_sets_the_day_of_its_anniversary(world: World, ada: int) -> None:
    anchor = datetime(2025, 1, 31, 23, 30, tzinfo=UTC)
    done = deliver(world, Subscription(price=YEARLY, created=anchor, start=now()).says("created"))
    assert (done.outcome, done.note) == ("plan_set", "plan yearly, day 31")
    assert seen(world, ada) == ("yearly", 31)
    # The credits of the free plan's window are not granted twice: the first own day comes after its end.
    user = world.see(ada)
    assert user["next_refresh_at"] >= billing.windows(world, ada)[0][1]
    local = user["next_refresh_at"].astimezone(UTC)
    assert (local + timedelta(days=1)).day == 1 or local.day == 31


def test_the_day_is_one_of_local_time(world: World, ada: int) -> None:
    world.sql.execute("UPDATE users SET timezone = 'Europe/Berlin'")
    deliver(world, Subscription(price=YEARLY, created=datetime(2025, 1, 31, 23, 30, tzinfo=UTC)).says("created"))
    assert seen(world, ada) == ("yearly", 1)


def test_a_change_to_months_takes_the_day_away_and_leaves_one_that_is_the_hosts(world: World, ada: int) -> None:
    yearly = Subscription(price=YEARLY, created=datetime(2025, 3, 17, 12, tzinfo=UTC))
    deliver(world, yearly.says("created"))
    assert seen(world, ada) == ("yearly", 17)
    deliver(world, replace(yearly, price=MONTHLY).says("updated", at=now()))
    assert seen(world, ada) == ("pro-monthly", None)
    world.sql.execute("UPDATE users SET credit_refresh_day = 9")
    deliver(world, replace(yearly, price=BASIC).says("updated", at=now() + timedelta(seconds=1)))
    assert seen(world, ada) == ("basic-monthly", 9)


def test_an_upgrade_changes_the_plan_and_grants_nothing_before_the_next_period(world: World, ada: int) -> None:
    basic = Subscription(price=BASIC)
    deliver(world, basic.says("created"))
    deliver(world, basic.paid())
    upgrade = replace(basic, price=MONTHLY).says("updated", at=now(), previous={"plan": {"id": BASIC.id}})
    assert deliver(world, upgrade).outcome == "plan_set"
    assert [target for _, _, target in billing.windows(world, ada)] == [1_000, 5_000]
    # The date still says up to when it is paid.
    assert world.see(ada)["next_refresh_at"] == basic.until


def test_a_subscription_that_is_not_paid_for_yet_sets_nothing(world: World, ada: int) -> None:
    subscription = Subscription(status="incomplete")
    assert deliver(world, subscription.says("created")).outcome == "unchanged"
    assert seen(world, ada) == ("free", None)
    assert deliver(world, replace(subscription, status="incomplete_expired").says("updated")).outcome == "unchanged"
    assert seen(world, ada) == ("free", None)


@pytest.mark.parametrize("status", ["trialing", "active", "past_due"])
def test_who_tries_and_who_is_late_has_the_plan(world: World, ada: int, status: str) -> None:
    deliver(world, Subscription(status=status).says("created"))
    assert seen(world, ada) == ("pro-monthly", None)


@pytest.mark.parametrize(("change", "status"), [("deleted", "canceled"), ("updated", "unpaid"), ("paused", "paused")])
def test_what_has_ended_gives_the_plan_for_those_who_cancelled(
    world: World, ada: int, change: str, status: str
) -> None:
    subscription = Subscription()
    deliver(world, subscription.says("created"))
    deliver(world, subscription.paid())
    done = deliver(world, replace(subscription, status=status).says(change, at=now()))
    assert (done.outcome, done.note) == ("plan_set", "plan free")
    user = world.see(ada)
    # What is paid stays, and the free plan begins when all that was granted has ended.
    assert (user["plan_code"], user["credit_balance"]) == ("free", 20_000)
    assert user["next_refresh_at"] == max(end for _, end, _ in billing.windows(world, ada))


def test_a_subscription_that_comes_back_has_its_plan_again(world: World, ada: int) -> None:
    subscription = Subscription(created=now() - timedelta(minutes=3))
    steps = [("created", "active"), ("paused", "paused"), ("resumed", "active")]
    for minutes, (change, status) in enumerate(steps):
        at = subscription.created + timedelta(minutes=minutes)
        deliver(world, replace(subscription, status=status).says(change, at=at))
    assert seen(world, ada) == ("pro-monthly", None)


def test_a_cancellation_at_the_periods_end_changes_nothing_until_then(world: World, ada: int) -> None:
    subscription = Subscription()
    deliver(world, subscription.says("created"))
    raw = subscription.says("updated", at=now(), previous={"cancel_at_period_end": False})
    raw["data"]["object"]["cancel_at_period_end"] = True
    assert deliver(world, raw).outcome == "unchanged"
    assert seen(world, ada) == ("pro-monthly", None)


def test_a_yearly_subscriber_who_cancels_loses_the_day(world: World, ada: int) -> None:
    yearly = Subscription(price=YEARLY, created=datetime(2025, 3, 17, 12, tzinfo=UTC))
    deliver(world, yearly.says("created"))
    deliver(world, replace(yearly, status="canceled").says("deleted", at=now()))
    assert seen(world, ada) == ("free", None)
    assert world.see(ada)["next_refresh_at"] == billing.windows(world, ada)[0][1]


def test_where_there_is_no_plan_for_them_they_have_none(world: World, ada: int) -> None:
    subscription = Subscription()
    deliver(world, subscription.says("created"))
    terms = stripe_events.Terms("no-such-plan")
    deliver(world, replace(subscription, status="canceled").says("deleted", at=now()), terms)
    assert seen(world, ada) == (None, None)


def test_a_plan_that_somebody_else_has_given_stays_when_a_subscription_ends(world: World, ada: int) -> None:
    subscription = Subscription()
    deliver(world, subscription.says("created"))
    world.sql.execute("UPDATE users SET plan_code = 'pro'")
    assert deliver(world, replace(subscription, status="canceled").says("deleted", at=now())).outcome == "unchanged"
    assert seen(world, ada) == ("pro", None)


def test_the_end_of_the_old_subscription_does_not_end_the_new_one(world: World, ada: int) -> None:
    """Stripe's checkout makes a customer anew, and the user has both."""
    old = Subscription(created=now() - timedelta(days=9))
    new = Subscription("sub_2", "cus_Ada2", price=BASIC)
    billing.customer(world, ada, "cus_Ada2")
    ends = replace(old, status="canceled").says("deleted", at=now())
    assert outcomes(world, old.says("created"), new.says("created"), ends) == ["plan_set", "plan_set", "unchanged"]
    assert seen(world, ada) == ("basic-monthly", None)
    # And of two that run, the younger one says it, whichever event comes last.
    assert deliver(world, new.says("updated", at=now())).outcome == "unchanged"


def test_an_older_event_does_not_undo_a_newer_one(world: World, ada: int) -> None:
    subscription = Subscription()
    newer = replace(subscription, price=BASIC).says("updated", at=now())
    assert outcomes(world, newer, subscription.says("created")) == ["plan_set", "outdated"]
    assert seen(world, ada) == ("basic-monthly", None)


def test_what_has_ended_stays_ended_whatever_comes(world: World, ada: int) -> None:
    subscription = Subscription()
    ended = replace(subscription, status="canceled").says("deleted", at=now())
    later = subscription.says("updated", at=now() + timedelta(seconds=9))
    assert outcomes(world, ended, subscription.says("created"), later) == ["unchanged", "outdated", "outdated"]
    assert seen(world, ada) == ("free", None)


@pytest.mark.parametrize("order", ["first", "last"])
def test_within_a_second_the_one_that_changed_what_the_other_shows_is_later(world: World, ada: int, order: str) -> None:
    """The payment method and then the price, by the customer portal, in one second."""
    at = now()
    subscription = Subscription(created=at - timedelta(days=1), price=BASIC)
    deliver(world, subscription.says("created"))
    first = subscription.says("updated", at=at, previous={"default_payment_method": None}, id="evt_Z")
    item = subscription.json()["items"]["data"][0]
    second = replace(subscription, price=MONTHLY).says(
        "updated", at=at, previous={"items": {"data": [item]}}, id="evt_A"
    )
    both = [first, second] if order == "last" else [second, first]
    for raw in both:
        deliver(world, raw)
    assert seen(world, ada) == ("pro-monthly", None)


def test_the_same_event_twice_is_once(world: World, ada: int) -> None:
    raw = Subscription().says("created")
    assert outcomes(world, raw, raw) == ["plan_set", "plan_set"]
    assert [row["action"] for row in world.audit(ada)].count("stripe_plan_set") == 1


def test_an_invoice_that_comes_before_its_subscription_is_granted_with_it(world: World, ada: int) -> None:
    subscription = Subscription()
    paid = subscription.paid()
    assert deliver(world, paid).outcome == "not_external"
    assert deliver(world, subscription.says("created")).outcome == "plan_set"
    assert see(world, paid).outcome == "granted"
    assert billing.windows(world, ada)[1:] == [(subscription.since, subscription.until, 20_000)]


def test_a_renewal_at_another_price_waits_for_the_plan_that_it_is(world: World, ada: int) -> None:
    """A downgrade at the period's end, whose event is late."""
    length = timedelta(hours=1)
    first = Subscription(created=now() - length, length=length)
    deliver(world, first.says("created", at=first.created))
    second = replace(first, start=first.until, price=BASIC)
    paid = second.paid(reason="subscription_cycle", at=now())
    done = deliver(world, paid)
    assert (done.outcome, done.settled) == ("awaits_subscription", False)
    deliver(world, second.says("updated", at=second.since))
    assert see(world, paid).outcome == "granted"
    assert billing.windows(world, ada)[-1][2] == 5_000


def test_a_renewal_of_several_items_waits_for_nothing(world: World, ada: int) -> None:
    """Whichever of them comes first on the invoice, and with no event that tells of the new period."""
    length = timedelta(hours=1)
    first = Subscription(created=now() - length, length=length)
    deliver(world, first.says("created", at=first.created))
    second = replace(first, start=first.until)
    addon = replace(second, price=Price("price_1Addon", None))
    paid = second.paid(reason="subscription_cycle", at=now(), lines=[addon.line(), second.line()])
    assert deliver(world, paid).outcome == "granted"
    assert billing.windows(world, ada)[-1] == (second.since, second.until, 20_000)


def test_it_does_not_wait_for_longer_than_an_hour(world: World, ada: int) -> None:
    length = timedelta(hours=1)
    first = Subscription(created=now() - length, length=length)
    deliver(world, first.says("created", at=first.created))
    paid = replace(first, start=first.until, price=BASIC).paid(reason="subscription_cycle", at=now())
    deliver(world, paid)
    world.sql.execute("UPDATE stripe_events SET received_at = received_at - interval '61 minutes'")
    assert [event.outcome for event in billing.upkeep(world)] == ["granted"]
    assert billing.windows(world, ada)[-1][2] == 20_000


def test_a_subscription_without_items_says_so(world: World, ada: int) -> None:
    raw: dict[str, Any] = Subscription().says("created")
    raw["data"]["object"]["items"] = {"object": "list", "data": []}
    done = deliver(world, raw)
    assert (done.outcome, done.note) == ("unknown_plan", "the subscription has no items")
    assert seen(world, ada) == ("free", None)
