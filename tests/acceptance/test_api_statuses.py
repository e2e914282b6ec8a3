"""Every status that the OpenAPI document names is real: here is a request that gets it, and its answer fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis

from api.application import create_app
from settings import Settings
from tests.acceptance.http_service import ADMIN_TOKEN, CRON_SECRET, bearer, fresh_key, signed

if TYPE_CHECKING:
    from tests.acceptance.http_service import Deployment
    from tests.acceptance.nodes import LocalApi
    from tests.integration.world import World

DOCUMENT = create_app(Settings(database_url="postgresql://nobody@127.0.0.1:1/none")).openapi()
DOCUMENTED = [
    (f"{method.upper()} {path}", int(status))
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
    for status in operation["responses"]
]
schema = schemathesis.openapi.from_dict(DOCUMENT)
NOBODYS = "00000000-0000-4000-8000-000000000000"


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


NO_SUCH_USER, NO_SUCH_RUN = Ask({"userId": "nobody"}), Ask({"runId": NOBODYS})
BAD_USER, BAD_RUN, BAD_LIMIT = Ask({"userId": "%00"}), Ask({"runId": "x"}), Ask(query={"limit": 0})
PAUSED = Ask(paused=True)
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
        400: Ask(headers={"Idempotency-Key": ""}),
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
        400: Ask(headers={"Idempotency-Key": ""}), 404: NO_SUCH_RUN, 409: Ask({"runId": "live"}), 422: BAD_RUN,
    },
    "POST /api/admin/runs/{runId}/rollback": {
        400: Ask(headers={"Idempotency-Key": ""}), 404: NO_SUCH_RUN, 409: Ask({"runId": "dry"}), 422: BAD_RUN,
    },
    "POST /api/admin/runs/{runId}/retry": {
        400: Ask(headers={"Idempotency-Key": ""}), 404: NO_SUCH_RUN, 409: Ask({"runId": "dry"}), 422: BAD_RUN,
    },
    "POST /api/admin/runs/{runId}/cancel": {404: NO_SUCH_RUN, 409: Ask({"runId": "dry"}), 422: BAD_RUN},
    "GET /api/admin/reset-monthly-tokens": {409: PAUSED},
    "POST /api/admin/reset-monthly-tokens": {409: PAUSED},
    "POST /api/reset/manual": {409: PAUSED, 422: Ask(json={"bypass": "yes"})},
    "GET /api/reset/status": {},
    "GET /api/user/credits/next-refresh": {404: Ask(caller="a stranger")},
    "GET /api/user/credits/refresh-history": {404: Ask(caller="a stranger"), 422: BAD_LIMIT},
    "GET /healthz": {},
    "GET /readyz": {503: Ask(api="lost")},
    "GET /metrics": {},
    "GET /problems/{slug}": {404: Ask({"slug": "no-such"})},
}  # fmt: skip
GENERAL = {
    401: Ask(caller="nobody"),
    403: Ask(caller="the wrong one"),
    429: Ask(api="hasty"),
    503: Ask(caller="a key", api="lost"),
}
RIGHT: dict[str, Any] = {
    "bulk-refresh": {"userIds": ["ada"], "force": True, "dryRun": True},
    "refresh-credits": {"force": True, "dryRun": True},
    "refresh-settings": {"creditRefreshHold": False},
}


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


def _run(world: World, which: str) -> str:
    """A run that a route can be asked about: live and with something granted, dry, or with a failed user."""
    world.user(f"{which}-{datetime.now(UTC).timestamp()}")
    if which == "failed":
        world.sql.execute("ALTER TABLE users ADD CONSTRAINT host_limit CHECK (credit_balance < 900) NOT VALID")
    run = world.scan(dry_run=which == "dry")
    if which != "running":
        world.work(world.claim(run))
    if which == "failed":
        world.sql.execute("ALTER TABLE users DROP CONSTRAINT host_limit")
    return str(run.run_id)


_RUNS = {"apply": "dry", "rollback": "live", "retry": "failed", "cancel": "running", "events": "empty"}


def _path(world: World, path: str, ask: Ask) -> str:
    """With a user, a problem and a run that the route can be asked about, unless others are asked for."""
    values = {"userId": "ada", "slug": "paused", **ask.path}
    if "{runId}" in path and ask.path.get("runId") not in {NOBODYS, "x"}:
        which = ask.path.get("runId", _RUNS.get(path.rpartition("/")[2], "live"))
        values["runId"] = str(world.scan().run_id) if which == "empty" else _run(world, which)
    for name, value in values.items():
        path = path.replace(f"{{{name}}}", value)
    return path


def _request(path: str, method: str, ask: Ask, key: str) -> dict[str, Any]:
    right = RIGHT.get(path.rpartition("/")[2]) if method != "GET" else None
    headers = {**fresh_key(), **bearer(_token(path, ask.caller, key)), **ask.headers}
    return {
        "headers": {name: value for name, value in headers.items() if value},
        "params": ask.query,
        "json": right if ask.json is None else ask.json,
    }


@pytest.mark.parametrize(("name", "status"), DOCUMENTED)
def test_a_documented_status_is_real(apis: Apis, world: World, name: str, status: int) -> None:
    method, path = name.split()
    guarded = "security" in DOCUMENT["paths"][path][method.lower()]
    ask = {200: Ask(), 202: Ask(), **(GENERAL if guarded else {}), **TABLE[name]}[status]
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
