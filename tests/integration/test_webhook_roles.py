"""Webhooks under roles of few rights: what workers, readers and hosts may see of the outbox, and what a host sets off.

Apart from the others, because they log in as these roles: the embedded server lets nobody do so before PostgreSQL 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

from refresh import webhook_deliveries as deliveries
from refresh.webhook_events import tell_silence
from refresh.webhook_outbox import anything_due, claim
from tests import roles
from tests.integration.hooks import endpoint, told, write
from tests.integration.test_grants_cli import connected, denied
from tests.integration.test_webhook_events import iso

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World


def test_a_worker_sends_tells_and_tidies_and_adds_no_endpoint(world: World) -> None:
    added, _ = endpoint(world, "run.finished", no_grants_days=1)
    write(world, added, 3)
    world.sql.execute("UPDATE webhook_endpoints SET created_at = now() - interval '3 days'")
    with roles.made(world.sql, "worker") as role, connected(world, role) as worker:
        with psycopg.connect(world.sql.info.dsn, user=role, autocommit=True, options="-c search_path=credits") as plain:
            assert tell_silence(plain) == 1
            assert anything_due(plain)
            assert len(claim(plain)) == 4
            assert deliveries.tidy(plain) == (0, 0)
        for statement in (
            "INSERT INTO webhook_endpoints (url, events, created_by) VALUES ('x', '{}', 'x')",
            "UPDATE webhook_endpoints SET url = 'x'", "UPDATE webhook_endpoints SET secret = 'x'",
            "DELETE FROM webhook_endpoints", "TRUNCATE webhook_endpoints", "TRUNCATE webhook_deliveries",
        ):  # fmt: skip
            denied(worker, statement)


def test_a_reader_sees_neither_secrets_nor_addresses_and_a_host_nothing(world: World) -> None:
    endpoint(world, "run.finished")
    with roles.made(world.sql, "read") as role, connected(world, role) as reader:
        reader.execute("SELECT id, events, active, failures FROM webhook_endpoints")
        reader.execute("SELECT * FROM webhook_deliveries")
        for statement in (
            "SELECT secret FROM webhook_endpoints", "SELECT url FROM webhook_endpoints",
            "UPDATE webhook_endpoints SET active = false", "DELETE FROM webhook_deliveries",
        ):  # fmt: skip
            denied(reader, statement)
    with roles.made(world.sql, "host") as role, connected(world, role) as host:
        for statement in (
            "SELECT FROM webhook_endpoints", "SELECT FROM webhook_deliveries",
            "INSERT INTO webhook_deliveries (endpoint_id, type, payload) VALUES (gen_random_uuid(), 'x', '{}')",
            "SELECT tell_of_user(u, 'refreshed', 'x', 'x', 1, 1, now(), now(), 1) FROM users AS u",
        ):  # fmt: skip
            denied(host, statement)


def test_hosts_that_refresh_by_function_trigger_and_insert_tell_too(world: World, cli: Cli) -> None:
    """By a role that may not see the outbox."""
    ada, bob = world.user("ada"), world.user("bob")
    world.user("eve", credit_refresh_hold=True)
    cli.says("db", "triggers", "on")
    endpoint(world, "user.refreshed", "user.held")
    with roles.made(world.sql, "host") as role, connected(world, role) as host:
        host.execute("SET timezone = 'America/New_York'")
        for _ in range(2):
            host.execute("SELECT refresh_credits_if_due('ada'), refresh_credits_if_due('eve')")
        host.execute("UPDATE users SET credit_balance = credit_balance - 1 WHERE external_id = 'bob'")
        host.execute("INSERT INTO users (external_id, plan_code) VALUES ('fay', 'pro')")
        host.execute("INSERT INTO users (external_id, plan_code, credit_balance) VALUES ('gus', 'pro', 7)")
    refreshed = {payload["userId"]: payload for payload in told(world, "user.refreshed")}
    assert {name: payload["source"] for name, payload in refreshed.items()} == {
        "ada": "function", "bob": "trigger", "fay": "insert",
    }  # fmt: skip
    assert (refreshed["fay"]["oldBalance"], refreshed["fay"]["newBalance"]) == (0, 20_000)
    for user in (ada, bob):
        (history,) = world.history(user)
        payload = refreshed[world.see(user)["external_id"]]
        assert payload["windowEnd"] == iso(world, history["window_end"])
        assert (payload["runId"], payload["creditsAdded"]) == (None, history["credits_added"])
    assert [payload["userId"] for payload in told(world, "user.held")] == ["eve"]
