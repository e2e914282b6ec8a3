"""The routes of outgoing webhooks, on a real server process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from celeryconfig import QueueNames
from embedded.processes import spawn, stop
from settings import CHECKOUT
from tasks.app import app, use_broker
from tasks.publish import messages_waiting
from tests.acceptance.nodes import free_port
from tests.integration.hooks import endpoint, outbox, see
from tests.integration.test_webhook_endpoints import CHAT, SECRET, URL, kill

if TYPE_CHECKING:
    from collections.abc import Iterator

    import embedded
    from tests.integration.command import Cli
    from tests.integration.world import World

TOKEN = "an-admin-token-for-tests"  # noqa: S105 - made up
HOOKS, DELIVERIES = "/api/admin/webhooks", "/api/admin/webhook-deliveries"
NOBODY = "00000000-0000-0000-0000-000000000000"


@contextmanager
def serving(cli: Cli, **variables: str) -> Iterator[httpx.Client]:
    port = free_port()
    environment = {**cli.environment, "ADMIN_TOKEN": TOKEN, **variables}
    argv = [sys.executable, "-m", "uvicorn", "api:app", f"--port={port}", "--no-access-log"]
    process = spawn(argv, env=environment, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    try:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        transport = httpx.HTTPTransport(retries=8)  # while it starts: 0.5, 1, 2 … s
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=bearer, transport=transport, timeout=30
        ) as client:
            client.get("/problems/refused")
            yield client
    finally:
        stop(process, ((signal.SIGTERM, 10),))


@pytest.fixture
def client(cli: Cli) -> Iterator[httpx.Client]:
    with serving(cli) as made:
        yield made


def purge() -> None:
    with app.connection_for_write() as broker:
        channel: Any = broker.default_channel
        channel.queue_purge(QueueNames.WEBHOOKS)


def problem(answer: httpx.Response, status: int, slug: str, says: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    told: dict[str, Any] = answer.json()
    assert told["type"] == f"/problems/{slug}"
    assert says in told["detail"]
    return told


def test_an_endpoint_is_added_read_changed_and_removed(world: World, client: httpx.Client) -> None:
    asked = {"url": URL, "events": ["user.refreshed", "run.finished"], "noGrantsDays": 3, "description": "the app"}
    added = client.post(HOOKS, json=asked)
    assert added.status_code == 201, added.text
    made = added.json()
    assert added.headers["location"] == f"{HOOKS}/{made['id']}"
    assert added.headers["cache-control"] == "no-store"
    assert SECRET.fullmatch(made.pop("secret"))
    assert made == made | {**asked, "events": ["run.finished", "user.refreshed"], "format": "standard", "active": True}
    assert made["createdBy"] == "api:admin-token"

    assert client.get(added.headers["location"]).json() == made
    assert client.get(HOOKS).json() == {"endpoints": [made]}
    changed = client.patch(added.headers["location"], json={"active": False, "no_grants_days": None})
    assert changed.json() == made | {"active": False, "noGrantsDays": None}
    moved = client.patch(added.headers["location"], json={"url": "https://hooks.example/other"})
    assert moved.json()["url"] == "https://hooks.example/other"
    removed = client.delete(added.headers["location"])
    assert (removed.status_code, removed.content) == (204, b"")
    problem(client.get(added.headers["location"]), 404, "not-found", "there is no webhook endpoint")
    log = world.rows("SELECT actor, action FROM credit_audit_logs ORDER BY occurred_at, id")
    assert [row["action"] for row in log] == ["webhook_added", *["webhook_changed"] * 2, "webhook_removed"]
    assert {row["actor"] for row in log} == {"api:admin-token"}


def test_a_chats_address_is_not_shown(client: httpx.Client) -> None:
    added = client.post(HOOKS, json={"url": CHAT, "format": "slack"})
    assert (added.json()["secret"], added.json()["url"]) == (None, "https://hooks.slack.example/…")
    assert "c4nary" not in added.text + client.get(HOOKS).text


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "url", "required"),
    ({"url": "http://hooks.example/"}, "url", "https://"), ({"url": "https://127.0.0.1/"}, "url", "no public address"),
    ({"url": "https://localhost/"}, "url", "localhost leads to"),
    ({"url": "https://[::ffff:169.254.169.254]/"}, "url", "no public address"),
    ({"url": URL, "events": ["user.eaten"]}, "events.0", "Input should be"),
    ({"url": URL, "events": []}, "events", "told of nothing"),
    ({"url": URL, "events": ["user.refreshed"], "format": "discord"}, "events", "no chat takes"),
    ({"url": URL, "noGrantsDays": 0}, "noGrantsDays", "greater than or equal"),
    ({"url": URL, "format": "teams"}, "format", "Input should be"), ({"url": URL, "secret": "x"}, "secret", "Extra"),
]  # fmt: skip


def test_what_cannot_be_is_refused_by_the_name_of_its_field(world: World, client: httpx.Client) -> None:
    for body, field, says in BAD:
        (error,) = problem(client.post(HOOKS, json=body), 422, "invalid-request", "")["errors"]
        assert error["field"] == field, error
        assert says in error["message"]
    assert world.value("SELECT count(*) FROM webhook_endpoints") == 0
    added, _ = endpoint(world, "run.finished", format="slack")
    one = f"{HOOKS}/{added.id}"
    for change, field in (({"active": None}, "active"), ({"events": None}, "events"), ({"url": None}, "url")):
        (error,) = problem(client.patch(one, json=change), 422, "invalid-request", "")["errors"]
        assert error["field"] == field
    problem(client.patch(one, json={"events": ["user.refreshed"]}), 409, "refused", "no chat takes")
    problem(client.patch(one, json={"url": "https://127.0.0.1/"}), 422, "invalid-request", "no public address")
    for method, path in (("PATCH", ""), ("DELETE", ""), ("GET", ""), ("POST", "/test")):
        body = {"json": {}} if method == "PATCH" else {}
        problem(client.request(method, f"{HOOKS}/{NOBODY}{path}", **body), 404, "not-found", "there is no")


def test_a_test_is_written_and_rung_for_and_can_be_followed(
    world: World, client: httpx.Client, servers: embedded.Servers
) -> None:
    use_broker(servers.redis_url)
    purge()
    added, _ = endpoint(world, "run.finished")
    for _ in range(3):
        sent = client.post(f"{HOOKS}/{added.id}/test")
        assert sent.status_code == 202, sent.text
    assert messages_waiting(QueueNames.WEBHOOKS) == 1
    purge()
    followed = client.get(sent.headers["location"]).json()
    assert followed == sent.json()
    assert (followed["type"], followed["status"], followed["attempts"]) == ("ping", "pending", 0)
    assert followed["data"] == {"endpointId": str(added.id)}
    world.sql.execute("UPDATE webhook_endpoints SET active = false")
    problem(client.post(f"{HOOKS}/{added.id}/test"), 409, "refused", "is not active")


def test_deliveries_are_listed_by_pages_and_dead_ones_sent_again(world: World, client: httpx.Client) -> None:
    added, _ = endpoint(world, "run.finished")
    other, _ = endpoint(world, "run.finished")
    dead = sorted(kill(world, added, 5), reverse=True)
    kill(world, other, 2)
    first = client.get(DELIVERIES, params={"status": "dead", "endpointId": str(added.id), "limit": 3}).json()
    assert [one["id"] for one in first["deliveries"]] == dead[:3]
    assert "data" not in first["deliveries"][0]
    rest = client.get(
        DELIVERIES, params={"endpointId": str(added.id), "limit": 3, "before": first["next"], "status": "dead"}
    ).json()
    assert ([one["id"] for one in rest["deliveries"]], rest["next"]) == (dead[3:], None)
    assert len(client.get(DELIVERIES).json()["deliveries"]) == 7
    again = client.post(f"{DELIVERIES}/{dead[0]}/retry")
    assert (again.status_code, again.json()["status"], again.json()["attempts"]) == (202, "pending", 0)
    problem(client.post(f"{DELIVERIES}/{dead[0]}/retry"), 409, "refused", "only a dead one")
    problem(client.post(f"{DELIVERIES}/999999/retry"), 404, "not-found", "no webhook delivery")
    problem(client.get(f"{DELIVERIES}/999999"), 404, "not-found", "no webhook delivery")
    problem(client.get(f"{DELIVERIES}/x"), 422, "invalid-request", "")
    problem(client.get(DELIVERIES, params={"status": "lost"}), 422, "invalid-request", "status")


def test_what_a_message_tells_is_exact(world: World, client: httpx.Client) -> None:
    added, _ = endpoint(world, "run.finished")
    world.sql.execute(
        "INSERT INTO webhook_deliveries (endpoint_id, type, payload) VALUES (%s, 'user.refreshed', %s)",
        (added.id, json.dumps({"newBalance": 2**60, "creditsAdded": 5})),
    )
    (row,) = outbox(world)
    assert client.get(f"{DELIVERIES}/{row['id']}").json()["data"] == {"newBalance": str(2**60), "creditsAdded": 5}


def test_private_targets_where_the_setting_allows_them(world: World, cli: Cli) -> None:
    with serving(cli, WEBHOOKS_ALLOW_PRIVATE="true") as client:
        added = client.post(HOOKS, json={"url": "http://127.0.0.1:8080/hooks"})
        assert added.status_code == 201, added.text
        assert see(world, added.json()["id"])["url"] == "http://127.0.0.1:8080/hooks"
