"""A paid invoice grants its billing period: to whom, for which window, once, and what is in the way."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from refresh import stripe_events
from refresh.errors import RefusedError
from tests.integration import billing, hooks
from tests.integration.billing import (
    MONTH,
    TERMS,
    YEAR,
    YEARLY,
    Price,
    Subscription,
    deliver,
    now,
    outcomes,
    see,
    upkeep,
)
from tests.integration.test_verify import found

if TYPE_CHECKING:
    from tests.integration.world import World


@pytest.fixture
def ada(world: World) -> int:
    """On an external plan by the host's own doing, and known to be a customer."""
    billing.plans(world)
    user_id = world.user(plan_code="pro-monthly", due_in=None)
    billing.customer(world, user_id)
    return user_id


@pytest.mark.parametrize("shape", ["2026", "2022"])
def test_the_period_is_the_window(world: World, ada: int, shape: str) -> None:
    subscription = Subscription()
    done = deliver(world, subscription.paid(shape=shape))
    assert (done.outcome, done.user, done.look_at) == ("granted", "ada", None)
    assert billing.windows(world, ada) == [(subscription.since, subscription.until, 20_000)]
    user = world.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"]) == (20_000, subscription.until)
    run = world.row("SELECT * FROM credit_refresh_runs")
    assert (run["id"], run["source"], run["status"], run["users_refreshed"]) == (done.run_id, "stripe", "succeeded", 1)
    assert (run["as_of"], run["window_end"]) == (subscription.since, subscription.until)
    audit = world.audit(ada)
    assert [(row["actor"], row["action"], row["credits"]) for row in audit] == [("stripe", "refreshed", 19_600)]


def test_a_period_is_granted_once_however_often_and_by_whichever_event(world: World, ada: int) -> None:
    subscription = Subscription()
    raw = subscription.paid()
    assert outcomes(world, raw, raw) == ["granted", "granted"]
    # Another event about the same invoice, another invoice about the same period.
    assert outcomes(world, {**raw, "id": "evt_again"}, subscription.paid()) == ["already_granted"] * 2
    assert see(world, {"id": "evt_again"}).run_id == see(world, raw).run_id
    assert len(billing.windows(world, ada)) == 1
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


@pytest.mark.usefixtures("ada")
def test_nobody_elses_run_passes_for_the_periods(world: World) -> None:
    subscription = Subscription()
    key = f"stripe:{subscription.id}:{subscription.since:%Y-%m-%dT%H:%M:%SZ}"
    with pytest.raises(RefusedError, match="are those of Stripe's billing periods"):
        world.open(force=True, dry_run=True, idempotency_key=key)
    assert deliver(world, subscription.paid()).outcome == "granted"
    assert world.value("SELECT idempotency_key FROM credit_refresh_runs") == key


def test_periods_follow_on_each_other_without_a_gap(world: World, ada: int) -> None:
    first = Subscription(created=now() - timedelta(seconds=3), length=timedelta(seconds=5))
    second = Subscription(created=first.created, start=first.until)
    assert deliver(world, first.paid()).outcome == "granted"
    assert deliver(world, second.paid(reason="subscription_cycle")).outcome == "granted"
    assert billing.windows(world, ada) == [
        (first.since, first.until, 20_000),
        (second.since, second.until, 20_000),
    ]


def test_what_is_paid_for_late_is_granted_for_the_period_that_runs(world: World, ada: int) -> None:
    subscription = Subscription(created=now() - timedelta(days=12))
    assert deliver(world, subscription.paid(at=now())).outcome == "granted"
    assert billing.windows(world, ada) == [(subscription.since, subscription.until, 20_000)]


def test_a_period_that_is_over_is_nobodys(world: World, ada: int) -> None:
    subscription = Subscription(created=now() - MONTH)
    done = deliver(world, subscription.paid())
    assert (done.outcome, done.settled) == ("period_over", True)
    assert world.history(ada) == []


def test_prorations_grant_nothing(world: World, ada: int) -> None:
    subscription = Subscription()
    lines = [subscription.line(proration=True, amount=-1_000), subscription.line(proration=True, amount=1_500)]
    upgrade = subscription.paid(reason="subscription_update", lines=lines)
    assert outcomes(world, subscription.paid(), upgrade) == ["granted", "no_period"]
    assert len(billing.windows(world, ada)) == 1


def test_a_first_period_up_to_the_anchor_is_granted_and_the_next_one_follows(world: World, ada: int) -> None:
    first = Subscription(created=now() - timedelta(seconds=3), length=timedelta(seconds=5))
    second = Subscription(created=first.created, start=first.until)
    assert deliver(world, first.paid(lines=[first.line(stub=True, amount=800)])).outcome == "granted"
    assert deliver(world, second.paid(reason="subscription_cycle")).outcome == "granted"
    assert [window[:2] for window in billing.windows(world, ada)] == [
        (first.since, first.until), (second.since, second.until)
    ]  # fmt: skip


def test_an_invoice_of_no_subscription_grants_nothing(world: World, ada: int) -> None:
    raw = Subscription().paid(lines=[])
    del raw["data"]["object"]["parent"]
    assert deliver(world, raw).outcome == "no_period"
    assert world.history(ada) == []


def test_an_invoice_whose_period_is_not_shown_is_given_up_and_says_so(world: World, ada: int) -> None:
    subscription = Subscription()
    done = deliver(world, subscription.paid(lines=[subscription.line(proration=True)], has_more=True))
    assert (done.outcome, done.settled) == ("failed", True)
    assert "none of the lines" in done.text
    assert world.history(ada) == []


def test_a_new_cycle_inside_a_granted_period_waits_for_its_end(world: World, ada: int) -> None:
    """Month to year and back would otherwise be granted each time, for next to no money."""
    monthly = Subscription(created=now() - timedelta(days=10))
    deliver(world, monthly.paid())
    again = Subscription(created=monthly.created, start=now() - timedelta(minutes=1))
    raw = again.paid(reason="subscription_update")
    done = deliver(world, raw)
    assert (done.outcome, done.look_at) == ("not_begun", monthly.until)
    assert len(billing.windows(world, ada)) == 1
    # What is left of it is granted then.
    world.sql.execute(
        "UPDATE credit_refresh_histories SET window_end = now() - interval '1 second' WHERE user_id = %s", (ada,)
    )
    ended = world.value("SELECT window_end FROM credit_refresh_histories WHERE user_id = %s", ada)
    world.sql.execute("UPDATE stripe_events SET look_at = now() WHERE id = %s", (raw["id"],))
    assert [event.outcome for event in upkeep(world)] == ["granted"]
    assert billing.windows(world, ada)[1] == (ended, again.until, 20_000)


def test_a_period_inside_one_that_is_granted_whole_is_granted_with_it(world: World, ada: int) -> None:
    yearly = Subscription(created=now() - timedelta(days=10), length=YEAR, price=YEARLY)
    monthly = Subscription(created=yearly.created, start=now() - timedelta(minutes=1))
    assert outcomes(world, yearly.paid(), monthly.paid(reason="subscription_update")) == ["granted", "already_granted"]
    assert len(billing.windows(world, ada)) == 1


def test_another_subscription_is_another_purchase(world: World, ada: int) -> None:
    first = Subscription(created=now() - timedelta(days=10))
    second = Subscription(id="sub_2", created=now() - timedelta(minutes=1))
    assert outcomes(world, first.paid(), second.paid()) == ["granted", "granted"]
    assert world.see(ada)["next_refresh_at"] == second.until


def test_of_two_that_run_the_one_that_names_the_plan_grants(world: World, ada: int) -> None:
    base = Subscription()
    extra = Subscription(id="sub_Extra", price=Price("price_1Extra", None))
    events = [base.says("created"), extra.says("created"), extra.paid(), base.paid()]
    assert outcomes(world, *events) == ["unchanged", "unknown_plan", "other_subscription", "granted"]
    assert len(billing.windows(world, ada)) == 1


def test_the_free_plans_window_does_not_stand_in_the_way(world: World) -> None:
    """Whoever pays in the middle of a free window is granted at once."""
    billing.plans(world)
    ada = world.user()
    billing.customer(world, ada)
    world.refresh()
    subscription = Subscription(length=timedelta(days=7))
    assert outcomes(world, subscription.says("created"), subscription.paid()) == ["plan_set", "granted"]
    free, paid = billing.windows(world, ada)
    assert paid == (subscription.since, subscription.until, 20_000)
    # And the free window is not granted twice after that: no date before its end.
    assert free[1] > paid[1]
    assert world.see(ada)["next_refresh_at"] == free[1]


def test_plans_with_dates_of_their_own_are_left_to_them(world: World) -> None:
    billing.plans(world)
    ada = world.user(plan_code="pro", due_in="1 day")
    billing.customer(world, ada)
    done = deliver(world, Subscription().paid())
    assert (done.outcome, done.settled) == ("not_external", True)
    assert world.history(ada) == []
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0


@pytest.mark.parametrize(
    ("change", "outcome", "back"),
    [
        ("UPDATE users SET active = false", "inactive", "UPDATE users SET active = true"),
        ("UPDATE plans SET active = false", "no_plan", "UPDATE plans SET active = true"),
        ("UPDATE settings SET enabled = false", "paused", "UPDATE settings SET enabled = true"),
        ("UPDATE settings SET dry_run = true", "paused", "UPDATE settings SET dry_run = false"),
        (
            "UPDATE users SET credit_refresh_hold = true, hold_reason = 'fraud'",
            "held",
            "UPDATE users SET credit_refresh_hold = false",
        ),
    ],
)
def test_what_is_in_the_way_is_waited_for(world: World, ada: int, change: str, outcome: str, back: str) -> None:
    world.sql.execute(change)
    raw = Subscription().paid()
    assert (deliver(world, raw).outcome, see(world, raw).settled) == (outcome, False)
    assert all(event.outcome == outcome for event in upkeep(world))
    assert world.history(ada) == []
    world.sql.execute(back)
    assert [event.outcome for event in upkeep(world)] == ["granted"]
    assert upkeep(world) == []
    assert len(billing.windows(world, ada)) == 1


def test_what_waits_until_its_period_is_over_is_not_granted(world: World, ada: int) -> None:
    world.sql.execute("UPDATE users SET credit_refresh_hold = true, hold_reason = 'fraud'")
    subscription = Subscription(created=now() - timedelta(days=2), length=timedelta(days=2, seconds=2))
    raw = subscription.paid()
    assert deliver(world, raw).outcome == "held"
    world.sql.execute("UPDATE users SET credit_refresh_hold = false")
    world.sql.execute("SELECT pg_sleep_until(%s)", (subscription.until,))
    assert [event.outcome for event in upkeep(world)] == ["period_over"]
    assert see(world, raw).settled
    assert billing.windows(world, ada) == []


def test_a_hold_that_ran_out_since_the_period_began_is_none(world: World, ada: int) -> None:
    world.sql.execute(
        "UPDATE users SET credit_refresh_hold = true, hold_reason = 'fraud', hold_until = now() - interval '1 minute'"
    )
    subscription = Subscription(created=now() - timedelta(days=1))
    assert deliver(world, subscription.paid()).outcome == "granted"
    user = world.see(ada)
    assert (user["credit_refresh_hold"], user["hold_until"]) == (False, None)
    assert [row["action"] for row in world.audit(ada)][-2:] == ["hold_expired", "refreshed"]


def test_a_process_that_is_switched_off_leaves_it_to_others(world: World, ada: int) -> None:
    raw = Subscription().paid()
    off = stripe_events.Terms("free", enabled=False)
    assert deliver(world, raw, off).outcome == "paused"
    assert [event.outcome for event in upkeep(world)] == ["granted"]
    assert len(billing.windows(world, ada)) == 1


def test_a_period_that_begins_in_a_moment_is_waited_for(world: World, ada: int) -> None:
    """Stripe's clock is before the database's."""
    subscription = Subscription(created=now() + timedelta(seconds=2))
    assert deliver(world, subscription.paid()).outcome == "granted"
    assert billing.windows(world, ada)[0][0] == subscription.since


def test_a_period_that_is_paid_for_in_advance_is_granted_when_it_begins(world: World, ada: int) -> None:
    subscription = Subscription(created=now() + timedelta(days=3))
    done = deliver(world, subscription.paid())
    assert (done.outcome, done.look_at) == ("not_begun", subscription.since)
    assert world.history(ada) == []


def test_a_period_from_before_the_books_is_refused(world: World, ada: int) -> None:
    world.sql.execute("UPDATE settings SET books_since = now() - interval '400 days'")
    subscription = Subscription(created=now() - timedelta(days=500), length=timedelta(days=730))
    done = deliver(world, subscription.paid())
    assert (done.outcome, done.settled) == ("before_books", True)
    assert "--force" in done.text
    assert world.history(ada) == []


def test_a_balance_that_would_not_fit_is_no_half_of_a_grant(world: World, ada: int) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'add' WHERE code = 'pro-monthly'")
    world.sql.execute("UPDATE users SET credit_balance = 9223372036854775807")
    raw = Subscription().paid()
    with pytest.raises(RefusedError, match="may not fit 64 bits"):
        deliver(world, raw)
    stored = see(world, raw)
    assert stored.outcome is None
    assert "64 bits" in str(stored.error)
    assert world.history(ada) == []
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0
    world.sql.execute("UPDATE users SET credit_balance = 0")
    assert [event.outcome for event in upkeep(world)] == ["granted"]
    assert see(world, raw).error is None


def test_a_user_in_an_unfinished_batch_is_left_to_it(world: World, ada: int) -> None:
    world.sql.execute("UPDATE users SET plan_code = 'free', next_refresh_at = now() - interval '1 hour'")
    run = world.scan()
    world.sql.execute("UPDATE users SET plan_code = 'pro-monthly'")
    raw = Subscription().paid()
    with pytest.raises(RefusedError, match="unfinished batch"):
        deliver(world, raw)
    world.work(world.claim(run))
    assert [event.outcome for event in upkeep(world)] == ["granted"]
    assert len(billing.windows(world, ada)) == 1


def test_what_cannot_be_processed_for_a_week_is_given_up(world: World, ada: int) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'add' WHERE code = 'pro-monthly'")
    world.sql.execute("UPDATE users SET credit_balance = 9223372036854775807")
    raw = Subscription().paid()
    with pytest.raises(RefusedError):
        deliver(world, raw)
    world.sql.execute("UPDATE stripe_events SET received_at = now() - interval '8 days'")
    assert upkeep(world) == []
    stored = see(world, raw)
    assert (stored.outcome, stored.settled) == ("failed", True)
    assert world.history(ada) == []


def test_what_was_rolled_back_is_not_granted_again_by_the_same_event(world: World, ada: int) -> None:
    raw = Subscription().paid()
    run_id = deliver(world, raw).run_id
    world.sql.execute(
        "UPDATE credit_refresh_histories SET reversed_by_run_id = gen_random_uuid() WHERE run_id = %s", (run_id,)
    )
    with world.database.statements() as connection:
        again = stripe_events.process(connection, raw["id"], TERMS, again=True)
    assert again.outcome == "granted"
    assert deliver(world, {**raw, "id": "evt_again"}).outcome == "already_granted"
    assert billing.windows(world, ada) == []


def test_endpoints_that_want_to_know_are_told_in_the_same_transaction(world: World, ada: int) -> None:
    del ada
    hooks.endpoint(world, "user.refreshed", "run.finished")
    deliver(world, Subscription().paid())
    assert sorted(row["type"] for row in hooks.outbox(world)) == ["run.finished", "user.refreshed"]


def test_plans_that_are_all_or_none(world: World, ada: int) -> None:
    world.sql.execute("UPDATE plans SET atomic = true")
    assert deliver(world, Subscription().paid()).outcome == "granted"
    assert len(billing.windows(world, ada)) == 1


def test_the_auditor_finds_nothing(world: World, ada: int) -> None:
    subscription = Subscription(created=now() - timedelta(days=3))
    deliver(world, subscription.says("created"))
    deliver(world, subscription.paid())
    deliver(world, Subscription(created=subscription.created, status="canceled").says("deleted", at=now()))
    assert world.see(ada)["next_refresh_at"] == subscription.until
    assert found(world) == []
