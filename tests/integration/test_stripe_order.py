"""Whatever the order in which events come, and however often: one plan, one day, and each period granted once at most.

Stripe's side of a customer's life is made up first, in its true order; then its events are shuffled and repeated. What
the user ends up with is worked out here from the life itself, and not from the events.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration import billing
from tests.integration.billing import MONTHLY, YEARLY, Price, Subscription, deliver, event, now, upkeep
from tests.integration.test_verify import found

if TYPE_CHECKING:
    from tests.integration.world import World

# As in test_host_properties.py: one database for all examples, each with a user of its own.
some = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
names = count(1)

BASIC = Price("price_1Basic", "basic-monthly")
UNNAMED = Price("price_1Unnamed", None)
PRICES = {"pro-monthly": MONTHLY, "basic-monthly": BASIC, "yearly": YEARLY, None: UNNAMED}
EXTERNAL = {"pro-monthly", "basic-monthly"}
ENTITLED = {"trialing", "active", "past_due"}


@dataclass
class Life:
    """What happens to one customer, or to one user who is two, in its true order.

    Attributes:
        at: when the last thing happened.
        events: in the order in which they were made.
        subscriptions: as they stand in the end.
        paid: periods for which there is a paid invoice.
        updates: how many of these there were in the present second.
    """

    user: str
    at: datetime
    events: list[dict[str, Any]] = field(default_factory=list)
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    paid: set[tuple[datetime, datetime]] = field(default_factory=set)
    updates: int = 0

    def happen(self, subscription: Subscription, change: str, *, later: int = 1, previous: Any = None) -> None:
        if self.updates > 1:  # of three in one second nobody could say which was the last
            later = max(later, 1)
        self.updates = (self.updates if later == 0 else 0) + (change == "updated")
        self.at += timedelta(seconds=later)
        self.subscriptions[subscription.id] = subscription
        self.events.append(subscription.says(change, at=self.at, previous=previous))

    def subscribe(self, plan: str | None, *, customer: str, pays_at_once: bool) -> None:
        self.at += timedelta(seconds=1)
        self.updates = 0
        subscription = Subscription(
            f"sub_{next(names)}", customer, PRICES[plan], created=self.at, metadata={"userId": self.user}
        )
        if pays_at_once:
            self.happen(subscription, "created", later=0)
        else:  # all of it within one second, as Stripe's checkout does
            self.happen(replace(subscription, status="incomplete"), "created", later=0)
            self.happen(subscription, "updated", later=0, previous={"status": "incomplete"})
        self.pay(subscription)

    def pay(self, subscription: Subscription) -> None:
        self.paid.add((subscription.since, subscription.until))
        self.events.append(subscription.paid(at=self.at, shape="2026" if self.at.second % 2 else "2022"))

    def change_price(self, subscription: Subscription, plan: str | None, *, later: int) -> None:
        if subscription.price == PRICES[plan]:
            return
        item = subscription.json()["items"]["data"][0]
        changed = replace(subscription, price=PRICES[plan])
        self.happen(changed, "updated", later=later, previous={"items": {"data": [item]}})
        prorations = [subscription.line(proration=True, amount=-900), changed.line(proration=True, amount=1_900)]
        self.events.append(changed.paid(reason="subscription_update", lines=prorations, at=self.at))

    def end(self, subscription: Subscription, status: str) -> None:
        change = "deleted" if status == "canceled" else "updated"
        if status == "canceled":  # Stripe says it twice
            self.happen(replace(subscription, status=status), "updated", previous={"status": subscription.status})
        self.happen(
            replace(subscription, status=status), change, later=0 if status == "canceled" else 1,
            previous=None if change == "deleted" else {"status": subscription.status},
        )  # fmt: skip

    @property
    def lead(self) -> Subscription | None:
        entitled = [s for s in self.subscriptions.values() if s.status in ENTITLED and s.price.plan]
        return max(entitled, key=lambda s: (s.created, s.id), default=None)


@st.composite
def lives(draw: st.DrawFn) -> tuple[Life, list[dict[str, Any]]]:
    """A life, and its events as they arrive."""
    name = f"user-{next(names)}"
    customers = [f"cus_{name}_{number}" for number in range(draw(st.integers(1, 2)))]
    life = Life(name, now() - timedelta(hours=2))
    plan = st.sampled_from([*PRICES])
    for _ in range(draw(st.integers(1, 6))):
        living = [s for s in life.subscriptions.values() if s.status != "canceled"]
        act = draw(st.sampled_from(["subscribe", "change", "end", "lapse", "return", "dun"])) if living else "subscribe"
        if act == "subscribe" and len(life.subscriptions) < 3:
            life.subscribe(draw(plan), customer=draw(st.sampled_from(customers)), pays_at_once=draw(st.booleans()))
            continue
        if not living:
            break
        chosen = draw(st.sampled_from(living))
        if act == "change":
            life.change_price(chosen, draw(plan.filter(bool)), later=draw(st.integers(0, 2)))
        elif act == "end":
            life.end(chosen, "canceled")
        elif act == "lapse" and chosen.status != "unpaid":
            life.end(chosen, "unpaid")
        elif act == "return" and chosen.status == "unpaid":
            life.happen(replace(chosen, status="active"), "updated", previous={"status": "unpaid"})
        elif act == "dun" and chosen.status == "active":
            life.happen(replace(chosen, status="past_due"), "updated", previous={"status": "active"})
    teaching = [
        event("customer.created", {"object": "customer", "id": c, "metadata": {"userId": name}}) for c in customers
    ]
    everything = [*life.events, *draw(st.lists(st.sampled_from(teaching), max_size=2))]
    repeated = draw(st.lists(st.sampled_from(everything), max_size=6))
    return life, draw(st.permutations([*everything, *repeated]))


@pytest.fixture
def planned(world: World) -> World:
    billing.plans(world)
    return world


def state(world: World, user_id: int) -> dict[str, Any]:
    user = world.see(user_id)
    kept = ("plan_code", "credit_refresh_day", "credit_balance", "next_refresh_at", "last_credit_refresh")
    return {"user": {name: user[name] for name in kept}, "windows": billing.windows(world, user_id)}


def test_any_order_and_any_repetition_come_to_the_same(planned: World) -> None:
    @some
    @given(lives())
    def converge(made_up: tuple[Life, list[dict[str, Any]]]) -> None:
        life, arriving = made_up
        user_id = planned.user(life.user, due_in="10 days")
        for raw in arriving:
            deliver(planned, raw)
        upkeep(planned)
        lead = life.lead
        user = planned.see(user_id)
        assert user["plan_code"] == (lead.price.plan if lead else "free")
        assert user["credit_refresh_day"] == (lead.created.day if lead and lead.price is YEARLY else None)
        granted = [(start, end) for start, end, _ in billing.windows(planned, user_id)]
        assert len(granted) == len(set(granted))
        assert set(granted) <= life.paid
        if lead and lead.price.plan in EXTERNAL:
            assert (lead.since, lead.until) in granted
            assert user["next_refresh_at"] == max(end for _, end in granted)

        before = state(planned, user_id)
        for raw in arriving:
            deliver(planned, raw)
        upkeep(planned)
        assert state(planned, user_id) == before

    converge()
    assert planned.value("SELECT count(*) FROM stripe_events WHERE outcome IS NULL OR error IS NOT NULL") == 0
    assert found(planned) == []


def test_a_plain_life_in_any_order_is_what_it_is_in_its_true_order(planned: World) -> None:
    """One subscription that stays as it is: every order ends in the very same books."""

    @settings(some, max_examples=25)
    @given(st.permutations(range(4)), st.sampled_from(["pro-monthly", "yearly"]))
    def same(order: list[int], plan: str) -> None:
        name = f"user-{next(names)}"
        user_id = planned.user(name, due_in="10 days")
        customer = f"cus_{name}"
        subscription = Subscription(f"sub_{name}", customer, PRICES[plan])
        incomplete = replace(subscription, status="incomplete")
        events = [
            event("checkout.session.completed", {
                "object": "checkout.session", "id": "cs_1", "customer": customer, "client_reference_id": name,
                "metadata": {},
            }),
            incomplete.says("created"),
            subscription.says("updated", previous={"status": "incomplete"}),
            subscription.paid(),
        ]  # fmt: skip
        for number in order:
            deliver(planned, events[number])
        user = planned.see(user_id)
        assert user["plan_code"] == plan
        windows = billing.windows(planned, user_id)
        if plan == "yearly":
            assert (user["credit_refresh_day"], windows) == (subscription.created.day, [])
        else:
            assert windows == [(subscription.since, subscription.until, 20_000)]
            assert (user["credit_balance"], user["next_refresh_at"]) == (20_000, subscription.until)

    same()
    assert found(planned) == []
