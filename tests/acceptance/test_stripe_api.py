"""Stripe's webhook over HTTP: a uvicorn process, events signed as Stripe does, and whoever else may call."""

from __future__ import annotations

import hmac
import json
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

import settings
from embedded.processes import spawn, stop
from settings import CHECKOUT
from tests.integration import billing
from tests.integration.billing import Subscription
from tests.integration.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import embedded
    from db import Database

URL = "/api/webhooks/stripe"
SECRET = "whsec_0123456789abcdef0123456789abcdef"  # noqa: S105 - the test's own
OLD_SECRET = "whsec_fedcba9876543210fedcba9876543210"  # noqa: S105
START_SECONDS = 30.0


def sign(body: bytes, secret: str = SECRET, *, at: float | None = None) -> str:
    """As Stripe's documentation says: HMAC-SHA256 over the instant, a full stop and the body."""
    instant = int(time.time() if at is None else at)
    mac = hmac.new(secret.encode(), f"{instant}.".encode() + body, sha256)
    return f"t={instant},v1={mac.hexdigest()},v0={'0' * 64}"


@dataclass(frozen=True)
class Api:
    """A server process, and where its log is."""

    url: str
    log: Path

    def post(self, body: bytes, signature: str | bytes | None) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        if signature is not None:
            headers["Stripe-Signature"] = signature  # type: ignore[assignment]
        return httpx.post(f"{self.url}{URL}", content=body, headers=headers, timeout=30)

    def deliver(self, raw: dict[str, Any], secret: str = SECRET) -> httpx.Response:
        # Indented, as Stripe writes it: the bytes are what is signed.
        body = json.dumps(raw, indent=2).encode()
        return self.post(body, sign(body, secret))


@contextmanager
def serving(tmp_path: Path, database_url: str, redis_url: str, **variables: str) -> Iterator[Api]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "api.log"
    environment = settings.environment(
        DATABASE_URL=database_url, REDIS_URL=redis_url, CREDITS_STATE_DIR=str(tmp_path / "state"), **variables
    )
    argv = [sys.executable, "-m", "uvicorn", "api:app", "--host=127.0.0.1", f"--port={port}", "--no-access-log"]
    with log.open("ab") as output:
        process = spawn(argv, env=environment, cwd=CHECKOUT, stdout=output)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/problems/unauthenticated", timeout=5).raise_for_status()
                break
            except httpx.TransportError:
                if time.monotonic() > until or process.poll() is not None:
                    pytest.fail(log.read_text())
                time.sleep(0.05)
        yield Api(f"http://127.0.0.1:{port}", log)
    finally:
        stop(process, [(signal.SIGTERM, 10.0)])


@pytest.fixture
def api(tmp_path: Path, database_url: str, servers: embedded.Servers) -> Iterator[Api]:
    assert servers.redis_url is not None
    secrets = f"{OLD_SECRET}, {SECRET}"
    with serving(tmp_path, database_url, servers.redis_url, STRIPE_WEBHOOK_SECRET=secrets) as running:
        yield running


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    with database.statements() as connection:
        dsn = connection.info.dsn
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row, options="-c search_path=credits") as sql:
        made = World(database, sql)
        billing.plans(made)
        yield made


def test_a_signed_event_is_kept_and_takes_effect(api: Api, world: World) -> None:
    ada = world.user(due_in="10 days")
    subscription = Subscription(metadata={"userId": "ada"})
    created = subscription.says("created")
    answer = api.deliver(created)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {
        "eventId": created["id"],
        "type": "customer.subscription.created",
        "outcome": "plan_set",
        "userId": "ada",
        "runId": None,
        "periodStart": None,
        "periodEnd": None,
        "text": "the user's plan, or the day of their anniversary, is set; plan pro-monthly",
    }
    paid = api.deliver(subscription.paid(), OLD_SECRET).json()
    assert (paid["outcome"], paid["userId"]) == ("granted", "ada")
    assert paid["runId"] == str(world.value("SELECT id FROM credit_refresh_runs"))
    assert billing.windows(world, ada) == [(subscription.since, subscription.until, 20_000)]
    assert world.value("SELECT payload FROM stripe_events WHERE id = %s", created["id"]) == created
    # Nothing of the event but its ids is logged.
    assert "ada@example.com" not in api.log.read_text()
    assert SECRET not in api.log.read_text()


def test_sixteen_deliveries_at_once_grant_once(api: Api, world: World) -> None:
    ada = world.user(plan_code="pro-monthly", due_in=None)
    raw = Subscription(metadata={"userId": "ada"}).paid()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: api.deliver(raw), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["outcome"] for answer in answers} == {"granted"}
    assert len(billing.windows(world, ada)) == 1


def test_an_unknown_customer_is_recorded_and_answered(api: Api, world: World) -> None:
    answer = api.deliver(Subscription().paid())
    assert (answer.status_code, answer.json()["outcome"]) == (200, "unknown_customer")
    assert world.value("SELECT count(*) FROM stripe_events") == 1


BODY = json.dumps(Subscription().paid()).encode()
REFUSED: dict[str, tuple[bytes, str | bytes | None]] = {
    "nothing": (BODY, None),
    "empty": (BODY, ""),
    "no scheme": (BODY, "hello"),
    "no instant": (BODY, f"v1={'0' * 64}"),
    "another secret": (BODY, sign(BODY, "whsec_" + "x" * 32)),
    "another body": (BODY.replace(b"2000", b"9000"), sign(BODY)),
    "another scheme": (BODY, sign(BODY).replace("v1=", "v2=")),
    "too old": (BODY, sign(BODY, at=time.time() - 86_400)),
    "a signature that is no ASCII": (BODY, f"t={int(time.time())},v1=\xe9".encode("latin-1")),
    "a body that is no text": (b"\xff\xfe" + BODY, sign(BODY)),
    "an instant of many digits": (BODY, f"t={'9' * 5000},v1={'0' * 64}"),
}


def test_whoever_has_not_signed_gets_401_and_leaves_nothing(api: Api, world: World) -> None:
    for why, (body, signature) in REFUSED.items():
        answer = api.post(body, signature)
        assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json"), why
        assert answer.json()["type"] == "/problems/unauthenticated"
    assert world.value("SELECT count(*) FROM stripe_events") == 0


def test_without_a_secret_the_route_is_closed(
    tmp_path: Path, database_url: str, servers: embedded.Servers, world: World
) -> None:
    assert servers.redis_url is not None
    with serving(tmp_path, database_url, servers.redis_url, STRIPE_WEBHOOK_SECRET="") as api:
        for secret in (SECRET, "", " "):
            assert api.deliver(Subscription().paid(), secret).status_code == 401
    assert world.value("SELECT count(*) FROM stripe_events") == 0


@pytest.mark.parametrize(
    "body", [b"", b"null", b"{", b"[" * 100_000, json.dumps({"object": "v2.core.event", "id": "evt_1"}).encode()]
)
def test_what_is_signed_and_no_event_is_invalid(api: Api, world: World, body: bytes) -> None:
    answer = api.post(body, sign(body))
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-request"), answer.text
    assert answer.json()["errors"][0]["field"] == "body"
    assert world.value("SELECT count(*) FROM stripe_events") == 0


def test_a_body_larger_than_any_of_stripes_is_not_read_to_its_end(api: Api) -> None:
    body = b" " * (2**20 + 1)
    answer = api.post(body, sign(body))
    assert answer.status_code == 413


def test_what_cannot_be_done_now_is_503_and_kept_for_later(api: Api, world: World) -> None:
    ada = world.user(plan_code="pro-monthly", due_in=None)
    raw = Subscription(metadata={"userId": "ada"}).paid()
    with world.host() as host:
        host.execute("SELECT FROM users FOR UPDATE")
        answer = api.deliver(raw)
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert [event.outcome for event in billing.upkeep(world)] == ["granted"]
    # Stripe delivers once more, and is told what became of it.
    assert api.deliver(raw).json()["outcome"] == "granted"
    assert len(billing.windows(world, ada)) == 1
