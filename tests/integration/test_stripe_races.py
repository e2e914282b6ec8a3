"""Events that come at the same time, users whom a host has locked, and processes that die in between."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest

from refresh import runs, stripe_events, stripe_inbox
from tests.integration import billing
from tests.integration.billing import MONTHLY, TERMS, Price, Subscription, deliver, now, see, upkeep
from tests.integration.test_verify import found

if TYPE_CHECKING:
    from refresh.stripe_inbox import Stored
    from tests.integration.world import World

BASIC = Price("price_1Basic", "basic-monthly")


@pytest.fixture
def ada(world: World) -> int:
    billing.plans(world)
    user_id = world.user(plan_code="pro-monthly", due_in=None)
    billing.customer(world, user_id)
    return user_id


def test_one_event_delivered_eight_times_at_once_grants_once(world: World, ada: int) -> None:
    raw = Subscription().paid()

    def deliver_it() -> Stored:
        return deliver(world, raw)

    with world.calls(*[deliver_it] * 8) as calls:
        calls.start()
        done = calls.results()
    assert {event.outcome for event in done} == {"granted"}
    assert len({event.run_id for event in done}) == 1
    assert len(billing.windows(world, ada)) == 1
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


def test_eight_events_about_one_period_at_once_grant_once(world: World, ada: int) -> None:
    events = [Subscription().paid() for _ in range(8)]
    period = events[0]["data"]["object"]["lines"]["data"][0]["period"]
    for raw in events:
        raw["data"]["object"]["lines"]["data"][0]["period"] = period

    with world.calls(*[lambda raw=raw: deliver(world, raw) for raw in events]) as calls:
        calls.start()
        done = calls.results()
    assert sorted(str(event.outcome) for event in done) == ["already_granted"] * 7 + ["granted"]
    assert len(billing.windows(world, ada)) == 1


def test_a_whole_checkout_at_once_comes_to_what_it_is(world: World) -> None:
    billing.plans(world)
    for number in range(10):
        user_id = world.user(f"user-{number}", due_in="10 days")
        subscription = Subscription(f"sub_{number}", f"cus_{number}")
        named = replace(subscription, metadata={"userId": f"user-{number}"})
        events = [
            replace(subscription, status="incomplete", price=MONTHLY).says("created"),
            named.says("updated", previous={"status": "incomplete"}),
            subscription.paid(shape="2022"),
        ]
        with world.calls(*[lambda raw=raw: deliver(world, raw) for raw in events]) as calls:
            calls.start()
            calls.results()
        assert world.see(user_id)["plan_code"] == "pro-monthly"
        assert billing.windows(world, user_id) == [(subscription.since, subscription.until, 20_000)]
    assert found(world) == []


def test_a_user_whom_the_host_has_locked_for_a_moment_is_waited_for(world: World, ada: int) -> None:
    raw = Subscription().paid()
    with world.host() as host, world.calls(lambda: deliver(world, raw)) as calls:
        host.execute("UPDATE users SET credit_balance = credit_balance - 1")
        calls.start()
        world.until(
            lambda: world.value("SELECT count(*) > 0 FROM pg_stat_activity WHERE query ILIKE '%%pg_sleep%%'"
                                " AND application_name = 'test'"),
            "the event waits a moment",
        )  # fmt: skip
        host.commit()
        assert [event.outcome for event in calls.results()] == ["granted"]
    assert len(billing.windows(world, ada)) == 1


def test_a_user_who_stays_locked_is_left_for_later_and_nobody_waits_at_the_door(world: World, ada: int) -> None:
    raw = Subscription().paid()
    with world.host() as host:
        host.execute("SELECT FROM users FOR UPDATE")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            deliver(world, raw)
        stored = see(world, raw)
        assert stored.outcome is None
        assert "somebody else has the user" in str(stored.error)
        # Whoever opens a run meanwhile does.
        assert isinstance(world.open(), runs.Opened)
    assert world.history(ada) == []
    assert [event.outcome for event in upkeep(world)] == ["granted"]


def test_a_subscriptions_event_waits_for_a_locked_user_too(world: World, ada: int) -> None:
    raw = Subscription(price=BASIC).says("created")
    with world.host() as host:
        host.execute("SELECT FROM users FOR UPDATE")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            deliver(world, raw)
    assert [event.outcome for event in upkeep(world)] == ["plan_set"]
    assert world.see(ada)["plan_code"] == "basic-monthly"


def test_what_was_stored_and_never_processed_is_found(world: World, ada: int) -> None:
    """Whoever stored it was killed."""
    raw = Subscription().paid()
    with world.database.statements() as connection:
        stripe_inbox.store(connection, raw)
        assert stripe_events.process_waiting(connection, TERMS, limit=10) == []  # not within the first minute
    assert [event.outcome for event in upkeep(world)] == ["granted"]
    assert len(billing.windows(world, ada)) == 1


def test_two_upkeeps_take_each_event_once(world: World, ada: int) -> None:
    del ada
    with world.database.statements() as connection:
        ids = {stripe_inbox.store(connection, Subscription(f"sub_{number}").paid()) for number in range(20)}
    world.sql.execute("UPDATE stripe_events SET look_at = now()")

    def claim() -> list[str]:
        with world.database.statements() as connection:
            return stripe_inbox.claim(connection, limit=15)

    with world.calls(claim, claim) as calls:
        calls.start()
        first, second = calls.results()
    assert not set(first) & set(second)
    assert set(first) | set(second) == ids


def test_the_grant_and_what_became_of_the_event_are_one(
    world: World, ada: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Subscription().paid()

    def dies(*_: object) -> None:
        raise RuntimeError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(stripe_inbox, "conclude", dies)
        with pytest.raises(RuntimeError):
            deliver(world, raw)
    assert world.history(ada) == []
    assert world.see(ada)["credit_balance"] == 400
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0
    assert "killed here" in str(see(world, raw).error)
    assert deliver(world, raw).outcome == "granted"


def test_spending_goes_on_beside_the_grant(world: World, ada: int) -> None:
    subscription = Subscription(created=now() - timedelta(days=3))
    world.sql.execute("UPDATE plans SET grant_mode = 'add' WHERE code = 'pro-monthly'")

    def spend() -> Stored | None:
        for _ in range(50):
            world.sql.execute("UPDATE users SET credit_balance = credit_balance - 1")
        return None

    with world.calls(spend, lambda: deliver(world, subscription.paid())) as calls:
        calls.start()
        calls.results()
    assert world.see(ada)["credit_balance"] == 400 - 50 + 20_000
