"""Every status that the OpenAPI document names is real: here is a request that gets it, and its answer fits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis

from api.application import create_app
from api.examples import STRIPE_EVENT
from settings import Settings
from tests.acceptance.http_service import ADMIN_TOKEN, CRON_SECRET, bearer, fresh_key, signed, stripe_signature
from tests.integration.hooks import endpoint
from tests.integration.test_webhook_endpoints import kill
from tests.integration.world import World

if TYPE_CHECKING:
    from tests.acceptance.http_service import Deployment
    from tests.acceptance.nodes import LocalApi

DOCUMENT = create_app(Settings(database_url="postgresql://nobody@127.0.0.1:1/none")).openapi()
DOCUMENTED = [
    (f"{method.upper()} {path}", int(status))
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
    for status in operation["responses"]
]
schema = schemathesis.openapi.from_dict(DOCUMENT)
Prepare = Callable[[World], dict[str, str]]
NOBODYS = "00000000-0000-4000-8000-000000000000"


def of_run(which: str) -> Prepare:
    """A run that a route can be asked about: live with a grant, dry, with a failed user, running, or for nobody."""

    def made(world: World) -> dict[str, str]:
        if which != "empty":
            world.user(f"{which}-{next(_numbers)}")
        if which == "failed":
            world.sql.execute("ALTER TABLE users ADD CONSTRAINT host_limit CHECK (credit_balance < 900) NOT VALID")
        run = world.scan(dry_run=which == "dry")
        if which in {"live", "dry", "failed"}:
            world.work(world.claim(run))
        if which == "failed":
            world.sql.execute("ALTER TABLE users DROP CONSTRAINT host_limit")
        return {"runId": str(run.run_id)}

    return made


def of_endpoint(events: str = "run.finished", format_: str = "standard", *, number: int = 1) -> Prepare:
    """So many endpoints, and none besides."""

    def made(world: World) -> dict[str, str]:
        world.sql.execute("DELETE FROM webhook_endpoints")
        added = [endpoint(world, events, format=format_)[0] for _ in range(number)]
        return {"endpointId": str(added[0].id)} if added else {}

    return made


def switched_off(world: World) -> dict[str, str]:
    made = of_endpoint()(world)
    world.sql.execute("UPDATE webhook_endpoints SET active = false")
    return made


def of_delivery(*, dead: bool) -> Prepare:
    def made(world: World) -> dict[str, str]:
        world.sql.execute("DELETE FROM webhook_endpoints")
        added, _ = endpoint(world, "run.finished")
        (delivery_id,) = kill(world, added, 1)
        if not dead:
            world.sql.execute(
                "UPDATE webhook_deliveries SET status = 'pending', next_attempt_at = now(), finished_at = NULL"
                " WHERE id = %s", (delivery_id,),
            )  # fmt: skip
        return {"deliveryId": str(delivery_id)}

    return made


_numbers = itertools.count()


@dataclass(frozen=True)
class Ask:
    """What to send where it is not what is right; a header that is empty is left out."""

    path: dict[str, str] = field(default_factory=dict)
    query: dict[str, Any] | None = None
    json: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    caller: str | None = None
    paused: bool = False
    api: str = "api"
    prepare: Prepare | None = None


NO_SUCH_USER, NO_SUCH_RUN = Ask({"userId": "nobody"}), Ask({"runId": NOBODYS})
BAD_USER, BAD_RUN, BAD_LIMIT = Ask({"userId": "%00"}), Ask({"runId": "x"}), Ask(query={"limit": 0})
NO_SUCH_ENDPOINT, BAD_ENDPOINT = Ask({"endpointId": NOBODYS}), Ask({"endpointId": "x"})
NO_SUCH_DELIVERY, BAD_DELIVERY = Ask({"deliveryId": "999999999"}), Ask({"deliveryId": "x"})
PAUSED = Ask(paused=True)
KEYLESS = Ask(headers={"Idempotency-Key": ""})
# Besides the successes, and what every guarded route has (`GENERAL`).
TABLE: dict[str, dict[int, Ask]] = {
    "POST /api/admin/users/{userId}/refresh-credits": {404: NO_SUCH_USER, 409: PAUSED, 422: BAD_USER},
    "GET /api/admin/users/{userId}/refresh-history": {404: NO_SUCH_USER, 422: BAD_LIMIT},
    "GET /api/admin/users/{userId}/refresh-verdict": {404: NO_SUCH_USER, 422: BAD_USER},
    "GET /api/admin/users/{userId}/refresh-settings": {404: NO_SUCH_USER, 422: BAD_USER},
    "PUT /api/admin/users/{userId}/refresh-settings": {
        404: NO_SUCH_USER,
        409: Ask(json={"timezone": "Nowhere"}),
        412: Ask(headers={"If-Match": '"stale"'}),
        422: Ask(json={"creditRefreshDay": 40}),
    },
    "POST /api/admin/credits/bulk-refresh": {
        400: KEYLESS,
        409: PAUSED,
        422: Ask(json={}),
    },
    "GET /api/admin/credits/refresh-stats": {
        409: Ask(query={"since": "2999-01-01T00:00:00Z"}), 422: Ask(query={"days": 0}),
    },
    "GET /api/admin/credits/forecast": {409: Ask(query={"set": "platinum.amount=1"}), 422: Ask(query={"days": 0})},
    "GET /api/admin/runs": {404: Ask(query={"before": NOBODYS}), 422: BAD_LIMIT},
    "GET /api/admin/runs/{runId}": {404: NO_SUCH_RUN, 422: BAD_RUN},
    "GET /api/admin/runs/{runId}/events": {
        204: Ask(headers={"Last-Event-ID": "succeeded-0-0-0"}),
        404: NO_SUCH_RUN,
        422: BAD_RUN,
    },
    "POST /api/admin/runs/{runId}/apply": {
        400: KEYLESS, 404: NO_SUCH_RUN, 409: Ask(prepare=of_run("live")), 422: BAD_RUN,
    },
    "POST /api/admin/runs/{runId}/rollback": {
        400: KEYLESS, 404: NO_SUCH_RUN, 409: Ask(prepare=of_run("dry")), 422: BAD_RUN,
    },
    "POST /api/admin/runs/{runId}/retry": {
        400: KEYLESS, 404: NO_SUCH_RUN, 409: Ask(prepare=of_run("dry")), 422: BAD_RUN,
    },
    "POST /api/admin/runs/{runId}/cancel": {404: NO_SUCH_RUN, 409: Ask(prepare=of_run("dry")), 422: BAD_RUN},
    "GET /api/admin/reset-monthly-tokens": {409: PAUSED},
    "POST /api/admin/reset-monthly-tokens": {409: PAUSED},
    "POST /api/reset/manual": {
        400: Ask(json={"bypass": True}, headers=KEYLESS.headers), 409: PAUSED, 422: Ask(json={"bypass": "yes"}),
    },
    "GET /api/reset/status": {},
    "GET /api/user/credits/next-refresh": {404: Ask(caller="a stranger")},
    "GET /api/user/credits/refresh-history": {404: Ask(caller="a stranger"), 422: BAD_LIMIT},
    "GET /api/admin/webhooks": {},
    "POST /api/admin/webhooks": {409: Ask(prepare=of_endpoint(number=20)), 422: Ask(json={"url": "https://127.0.0.1/"})},
    "GET /api/admin/webhooks/{endpointId}": {404: NO_SUCH_ENDPOINT, 422: BAD_ENDPOINT},
    "PATCH /api/admin/webhooks/{endpointId}": {
        404: NO_SUCH_ENDPOINT,
        409: Ask(json={"events": ["user.refreshed"]}, prepare=of_endpoint(format_="slack")),
        422: BAD_ENDPOINT,
    },
    "DELETE /api/admin/webhooks/{endpointId}": {404: NO_SUCH_ENDPOINT, 422: BAD_ENDPOINT},
    "POST /api/admin/webhooks/{endpointId}/test": {
        404: NO_SUCH_ENDPOINT, 409: Ask(prepare=switched_off), 422: BAD_ENDPOINT,
    },
    "GET /api/admin/webhook-deliveries": {422: BAD_LIMIT},
    "GET /api/admin/webhook-deliveries/{deliveryId}": {404: NO_SUCH_DELIVERY, 422: BAD_DELIVERY},
    "POST /api/admin/webhook-deliveries/{deliveryId}/retry": {
        404: NO_SUCH_DELIVERY, 409: Ask(prepare=of_delivery(dead=False)), 422: BAD_DELIVERY,
    },
    "POST /api/webhooks/stripe": {
        401: Ask(caller="nobody"),
        413: Ask(json={"id": "x" * 2**20}),
        422: Ask(json={"id": "evt_1"}),
        503: Ask(api="lost"),
    },
    "GET /healthz": {},
    "GET /readyz": {503: Ask(api="lost")},
    "GET /metrics": {},
    "GET /problems/{slug}": {404: Ask({"slug": "no-such"})},
}  # fmt: skip
GENERAL = {
    401: Ask(caller="nobody"),
    403: Ask(caller="the wrong one"),
    422: Ask(query={"nonsense": 1}),
    429: Ask(api="hasty"),
    503: Ask(caller="a key", api="lost"),
}
RIGHT: dict[str, Any] = {
    "bulk-refresh": {"userIds": ["ada"], "force": True, "dryRun": True},
    "refresh-credits": {"force": True, "dryRun": True},
    "refresh-settings": {"creditRefreshHold": False},
    "webhooks": {"url": "https://1.1.1.1/hooks"},  # nobody sends anything: there is no worker
    "{endpointId}": {"active": True},
    "stripe": STRIPE_EVENT,
}
PREPARED = {
    "{endpointId}": of_endpoint(),
    "{deliveryId}": of_delivery(dead=True),
    "/webhooks": of_endpoint(number=0),
    "/apply": of_run("dry"),
    "/retry": of_run("failed"),
    "/cancel": of_run("running"),
    "/events": of_run("empty"),
    "{runId}": of_run("live"),
}
"""What a route is about where nothing else is asked for: the first that its path has."""


@dataclass(frozen=True)
class Apis:
    """One that is well, one whose callers have had their request, one without database and broker; and a key."""

    by_name: dict[str, LocalApi]
    key: str


@pytest.fixture(scope="module")
def apis(deployment: Deployment) -> Apis:
    nowhere = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "REDIS_URL": "redis://127.0.0.1:1/0"}
    by_name = {
        "api": deployment.api,
        "hasty": deployment.launcher.api({**deployment.env, "API_RATE_LIMIT": "1/day"}),
        "lost": deployment.launcher.api({**deployment.env, **nowhere}),
    }
    return Apis(by_name, deployment.key("admin"))


def _token(path: str, caller: str | None, key: str) -> str | None:
    own, cron = path.startswith("/api/user/"), path.endswith("/reset-monthly-tokens")
    right = signed("ada") if own else CRON_SECRET if cron else ADMIN_TOKEN
    wrong = ADMIN_TOKEN if own or cron else signed("ada")
    named = {
        "nobody": None,
        "the wrong one": wrong,
        "a stranger": signed("stranger"),
        "a key": right if own or cron else key,
    }
    return named[caller] if caller is not None else right


def _path(world: World, path: str, ask: Ask) -> str:
    prepare = ask.prepare or next((made for part, made in PREPARED.items() if part in path), None)
    values = {"userId": "ada", "slug": "paused", **(prepare(world) if prepare else {}), **ask.path}
    for name, value in values.items():
        path = path.replace(f"{{{name}}}", value)
    return path


def _request(path: str, method: str, ask: Ask, key: str) -> dict[str, Any]:
    right = RIGHT.get(path.rpartition("/")[2]) if method not in {"get", "delete"} else None
    body = right if ask.json is None else ask.json
    content = json.dumps(body).encode() if body is not None else None
    headers = {
        **fresh_key(),
        **bearer(_token(path, ask.caller, key)),
        "Content-Type": "application/json",
        **ask.headers,
    }
    if path.endswith("/stripe") and ask.caller is None:
        headers |= stripe_signature(content or b"")
    given = {name: value for name, value in headers.items() if value}
    return {"headers": given, "params": ask.query, "content": content}


@pytest.mark.parametrize(("name", "status"), DOCUMENTED)
def test_a_documented_status_is_real(apis: Apis, world: World, name: str, status: int) -> None:
    method, path = name.lower().split()[0], name.split()[1]
    guarded = "HTTPBearer" in str(DOCUMENT["paths"][path][method].get("security"))
    ask = {**dict.fromkeys((200, 201, 202, 204), Ask()), **(GENERAL if guarded else {}), **TABLE[name]}[status]
    if not world.rows("SELECT FROM users WHERE external_id = 'ada'"):
        world.user("ada", due_in="3 days")
    world.sql.execute("UPDATE users SET active = true WHERE external_id = 'ada'")
    url, request = _path(world, path, ask), _request(path, method, ask, apis.key)
    world.sql.execute("UPDATE settings SET enabled = %s", (not ask.paused,))
    with httpx.Client(base_url=apis.by_name[ask.api].url, timeout=30, trust_env=False) as client:
        answer = client.request(method, url, **request)
        if status == 429 and answer.status_code != 429:
            answer = client.request(method, url, **request)
    assert answer.status_code == status, answer.text
    schema[path][method].validate_response(answer)


def test_the_table_has_nothing_that_is_not_documented() -> None:
    documented = {name: {status for other, status in DOCUMENTED if other == name} for name, _ in DOCUMENTED}
    assert TABLE.keys() == documented.keys()
    assert {
        name: asks.keys() - documented[name] for name, asks in TABLE.items() if asks.keys() - documented[name]
    } == {}
