"""`credits webhooks`: what came, what became of it, and what somebody can do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from refresh import stripe_events, stripe_inbox
from tests import roles
from tests.integration import billing
from tests.integration.billing import Price, Subscription, deliver
from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World


@pytest.fixture
def ada(world: World) -> int:
    billing.plans(world)
    return world.user(due_in="10 days")


def test_an_unknown_customer_is_listed_linked_and_granted(world: World, cli: Cli, ada: int) -> None:
    assert "Stripe has sent no events yet." in cli.says("webhooks", "list")
    subscription = Subscription()
    paid, created = subscription.paid(), subscription.says("created")
    for raw in (paid, created):
        deliver(world, raw)
    facts = cli.facts("webhooks", "list", "--unsettled")
    assert (len(facts["events"]), facts["more"]) == (2, False)
    assert {event["outcome"] for event in facts["events"]} == {"unknown_customer"}
    assert facts["events"][0]["customerId"] == "cus_Ada"
    assert paid["id"] in cli.says("webhooks", "list", "--outcome", "unknown_customer")

    linked = cli.facts("webhooks", "link", "cus_Ada", "ada")
    assert (linked["was"], linked["userId"]) == (None, "ada")
    assert [event["outcome"] for event in linked["events"]] == ["plan_set", "granted"]
    assert billing.windows(world, ada) == [(subscription.since, subscription.until, 20_000)]
    assert cli.says("webhooks", "link", "cus_Ada", "ada") == "cus_Ada is ada already.\n"
    assert cli.facts("webhooks", "list", "--unsettled")["events"] == []
    (row,) = [row for row in world.audit(ada) if row["action"] == "stripe_linked"]
    assert row["actor"].startswith("cli:")


def test_an_event_is_shown_with_what_stripe_sent(world: World, cli: Cli, ada: int) -> None:
    del ada
    raw = Subscription(metadata={"userId": "ada"}).paid()
    deliver(world, raw)
    said = cli.says("webhooks", "show", raw["id"])
    assert "not_external" in said
    assert "the user's plan is none that waits for billing periods" in said
    assert "ada@example.com" in said
    facts = cli.facts("webhooks", "show", raw["id"])
    assert (facts["payload"], facts["outcome"], facts["userId"]) == (raw, "not_external", "ada")


def test_replay_takes_what_is_unsettled_or_what_is_named(world: World, cli: Cli, ada: int) -> None:
    raw = Subscription(price=Price(plan="gold"), metadata={"userId": "ada"}).says("created")
    unknown = Subscription("sub_9", "cus_Nobody").paid()
    deliver(world, raw)
    deliver(world, unknown)
    refused(cli("webhooks", "replay"), 2, "say so with --yes")
    done = cli.facts("webhooks", "replay", "--yes")
    assert [(event["eventId"], event["outcome"]) for event in done["events"]] == [(unknown["id"], "unknown_customer")]
    cli.says("plans", "set", "gold", "--amount", "7", "--cadence", "external", "--yes")
    done = cli.facts("webhooks", "replay", "--outcome", "unknown_plan", "--yes")
    assert [event["outcome"] for event in done["events"]] == ["plan_set"]
    assert world.see(ada)["plan_code"] == "gold"
    assert "1 event processed: 1 unchanged." in cli.says("webhooks", "replay", raw["id"])
    assert [row["action"] for row in world.audit(ada)].count("stripe_plan_set") == 1


def test_replay_says_what_could_not_be_processed(world: World, cli: Cli, ada: int) -> None:
    del ada
    raw = Subscription(metadata={"userId": "ada"}).says("created")
    with world.host() as host, world.database.statements() as connection:
        host.execute("SELECT FROM users FOR UPDATE")
        connection.execute("SET lock_timeout = '100ms'")  # a test's own is a hundred times as long
        with pytest.raises(psycopg.errors.LockNotAvailable):
            stripe_events.process(connection, stripe_inbox.store(connection, raw), billing.TERMS)
        done = cli("webhooks", "replay", raw["id"])
        assert done.returncode == 3, done
        assert raw["id"] in done.stderr
        assert "could not be" in done.stdout
    assert "1 event processed" in cli.says("webhooks", "replay", "--yes")


def test_the_plan_after_a_cancellation_is_a_setting(world: World, cli: Cli, ada: int) -> None:
    subscription = Subscription(metadata={"userId": "ada"})
    deliver(world, subscription.says("created"))
    raw = Subscription(status="canceled").says("deleted", at=billing.now())
    with world.database.statements() as connection:
        stripe_inbox.store(connection, raw)
    done = cli("webhooks", "replay", raw["id"], STRIPE_PLAN_AFTER_CANCEL="basic-monthly")
    assert done.returncode == 0, done
    assert world.see(ada)["plan_code"] == "basic-monthly"


def test_bad_arguments(world: World, cli: Cli, ada: int) -> None:
    del world, ada
    refused(cli("webhooks", "show", "evt_0"), 2, "there is no event 'evt_0'")
    refused(cli("webhooks", "replay", "evt_0"), 2, "there is no event 'evt_0'")
    refused(cli("webhooks", "replay", "evt_0", "--outcome", "failed"), 2, "name events, or say which")
    refused(cli("webhooks", "link", "cus_Ada", "bob"), 2, "there is no user 'bob'")
    refused(cli("webhooks", "list", "--outcome", "lost"), 2, "is not one of")
    assert cli.says("webhooks", "list", "--user", "bob") == "There are no such events.\n"


def test_a_reader_sees_what_became_of_events_and_not_what_was_sent(world: World, ada: int) -> None:
    del ada
    deliver(world, Subscription(metadata={"userId": "ada"}).says("created"))
    with roles.made(world.sql, "read") as role, world.sql.transaction():
        world.sql.execute(f'SET LOCAL ROLE "{role}"')
        assert world.value("SELECT outcome FROM stripe_events") == "plan_set"
        assert world.value("SELECT count(*) FROM stripe_customers") == 1
        with pytest.raises(Exception, match="permission denied"), world.sql.transaction():
            world.sql.execute("SELECT payload FROM stripe_events")


def test_a_worker_may_do_what_upkeep_does(world: World, cli: Cli, ada: int, database_url: str) -> None:
    subscription = Subscription(metadata={"userId": "ada"})
    with world.database.statements() as connection:
        ids = [stripe_inbox.store(connection, raw) for raw in (subscription.paid(), subscription.says("created"))]
    with roles.made(world.sql, "worker") as role:
        done = cli("webhooks", "replay", *ids, DATABASE_URL=roles.url(database_url, role))
        assert done.returncode == 0, done
    assert len(billing.windows(world, ada)) == 1
