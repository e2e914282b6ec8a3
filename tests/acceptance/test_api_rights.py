"""Who may what: every route of the app by every kind of caller, against statuses that are listed by hand."""

from __future__ import annotations

import hmac
import json
import re
import time
import uuid
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.routing import iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.application import create_app
from settings import Settings
from tests.acceptance.http_service import ADMIN_TOKEN, CRON_SECRET, JWT_SECRET, bearer, fresh_key, problem, signed

if TYPE_CHECKING:
    import httpx

    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World

# Columns: everybody without valid credentials (`STRANGERS`); the admin token; keys of the scopes read, support, admin;
# a user's own token; the cron secret.
OPEN = (200, 200, 200, 200, 200, 200, 200)
READ = (401, 200, 200, 200, 200, 403, 403)
SUPPORT = (401, 200, 403, 200, 200, 403, 403)
ADMIN = (401, 200, 403, 403, 200, 403, 403)
OPENS_RUN = (401, 202, 403, 403, 202, 403, 403)
NO_SUCH_RUN = (401, 404, 403, 403, 404, 403, 403)
NO_SUCH_THING = NO_SUCH_RUN
BAD_TARGET = (401, 422, 403, 403, 422, 403, 403)
OWN = (401, 403, 403, 403, 403, 200, 403)
CRON = (401, 403, 403, 403, 403, 403, 200)
SIGNED = (401, 401, 401, 401, 401, 401, 401)
TABLE = {
    "GET /openapi.json": OPEN,
    "GET /docs": OPEN,
    "GET /docs/{name}": OPEN,
    "GET /problems/{slug}": OPEN,
    "GET /healthz": OPEN,
    "GET /readyz": OPEN,
    "GET /metrics": READ,
    "POST /api/admin/users/{userId:path}/refresh-credits": SUPPORT,
    "GET /api/admin/users/{userId:path}/refresh-history": READ,
    "GET /api/admin/users/{userId:path}/refresh-verdict": READ,
    "GET /api/admin/users/{userId:path}/refresh-settings": READ,
    "PUT /api/admin/users/{userId:path}/refresh-settings": SUPPORT,
    "POST /api/admin/credits/bulk-refresh": OPENS_RUN,
    "GET /api/admin/credits/refresh-stats": READ,
    "GET /api/admin/credits/forecast": READ,
    "GET /api/admin/runs": READ,
    "GET /api/admin/runs/{runId}": READ,
    "GET /api/admin/runs/{runId}/events": READ,
    "POST /api/admin/runs/{runId}/apply": NO_SUCH_RUN,
    "POST /api/admin/runs/{runId}/rollback": NO_SUCH_RUN,
    "POST /api/admin/runs/{runId}/retry": NO_SUCH_RUN,
    "POST /api/admin/runs/{runId}/cancel": NO_SUCH_RUN,
    "POST /api/admin/reset-monthly-tokens": CRON,
    "GET /api/admin/reset-monthly-tokens": CRON,
    "POST /api/reset/manual": ADMIN,
    "GET /api/reset/status": READ,
    "GET /api/admin/webhooks": ADMIN,
    "POST /api/admin/webhooks": BAD_TARGET,
    "GET /api/admin/webhooks/{endpointId}": NO_SUCH_THING,
    "PATCH /api/admin/webhooks/{endpointId}": NO_SUCH_THING,
    "DELETE /api/admin/webhooks/{endpointId}": NO_SUCH_THING,
    "POST /api/admin/webhooks/{endpointId}/test": NO_SUCH_THING,
    "GET /api/admin/webhook-deliveries": ADMIN,
    "GET /api/admin/webhook-deliveries/{deliveryId}": NO_SUCH_THING,
    "POST /api/admin/webhook-deliveries/{deliveryId}/retry": NO_SUCH_THING,
    "POST /api/webhooks/stripe": SIGNED,
    "GET /api/user/credits/next-refresh": OWN,
    "GET /api/user/credits/refresh-history": OWN,
}

STRANGERS = (
    "nobody", "a word", "another admin token", "an expired key", "a revoked key", "a key that was never made",
    "an expired token", "a token for others", "a token by another secret", "a token of alg none",
    "a token without an end", "a token without a user", "basic",
)  # fmt: skip
MEMBERS = ("the admin token", "a read key", "a support key", "an admin key", "a user", "cron")

BODIES: dict[str, dict[str, Any]] = {
    "refresh-credits": {"force": True, "dryRun": True},
    "refresh-settings": {"creditRefreshHold": False},
    "bulk-refresh": {"userIds": ["ada"], "force": True, "dryRun": True},
    "manual": {"dryRun": True},
    "webhooks": {"url": "https://127.0.0.1/"},
    "{endpointId}": {"active": False},
    "stripe": {"id": "evt_1", "object": "event"},
}


def routes() -> list[str]:
    """Every route that the app has, whoever added it."""
    app = create_app(Settings(database_url="postgresql://nobody@127.0.0.1:1/none"))
    found = iter_route_contexts(app.routes)
    return [f"{method} {route.path}" for route in found for method in sorted(route.methods or ()) if method != "HEAD"]


ROUTES = routes()


@dataclass(frozen=True)
class Callers:
    """Headers of each kind of caller."""

    headers: dict[str, dict[str, str]]
    run_id: str

    @property
    def secrets(self) -> list[str]:
        return [header.split()[1] for headers in self.headers.values() for header in headers.values()]

    def request(self, route: str) -> dict[str, Any]:
        """A request that is well-formed: rights are all that can be wrong with it."""
        method, path = route.split()
        body = BODIES.get(path.rpartition("/")[2]) if method not in {"GET", "DELETE"} else None
        nobodys = str(uuid.uuid4())
        values = {
            "userId:path": "ada", "slug": "paused", "name": "start.js", "deliveryId": "1", "endpointId": nobodys,
            "runId": self.run_id if method == "GET" else nobodys,
        }  # fmt: skip
        for name, value in values.items():
            path = path.replace(f"{{{name}}}", value)
        return {"method": method, "url": path, "json": body}


@pytest.fixture(scope="module")
def deployment(deployment: Deployment) -> Deployment:
    """At the level that logs most: no token is in it."""
    deployment.env["LOG_LEVEL"] = "DEBUG"
    return deployment


@pytest.fixture(scope="module")
def callers(deployment: Deployment) -> Callers:
    world, now = deployment.world, int(time.time())
    world.user("ada", due_in="20 days")
    run = world.scan()  # for nobody, so it has ended
    keys = {scope: deployment.key(scope) for scope in ("read", "support", "admin")}
    expired, revoked = deployment.key("admin"), deployment.key("admin")
    set_at = "UPDATE api_keys SET {} = now() WHERE prefix = %s"
    world.sql.execute(set_at.format("expires_at"), (expired.split("_")[1],))
    world.sql.execute(set_at.format("revoked_by = 'test', revoked_at"), (revoked.split("_")[1],))
    tokens = {
        "a word": "letmein",
        "another admin token": ADMIN_TOKEN[:-1],
        "an expired key": expired,
        "a revoked key": revoked,
        "a key that was never made": keys["admin"][:-1] + ("x" if keys["admin"][-1] != "x" else "y"),
        "an expired token": signed(exp=now - 60),
        "a token for others": signed(aud="another-service"),
        "a token by another secret": signed(secret=JWT_SECRET[::-1]),
        "a token of alg none": signed(secret="", algorithm="none"),
        "a token without an end": signed(exp=None),
        "a token without a user": signed(subject=""),
        "the admin token": ADMIN_TOKEN,
        "a read key": keys["read"],
        "a support key": keys["support"],
        "an admin key": keys["admin"],
        "a user": signed("ada"),
        "cron": CRON_SECRET,
    }
    headers = {name: bearer(token) for name, token in tokens.items()}
    headers |= {"nobody": {}, "basic": {"Authorization": f"Basic {ADMIN_TOKEN}"}}
    assert headers.keys() == {*STRANGERS, *MEMBERS}
    return Callers(headers, str(run.run_id))


def test_the_table_has_a_row_for_each_route_and_for_no_other() -> None:
    assert len(ROUTES) == len(set(ROUTES))
    assert set(ROUTES) == TABLE.keys()


@pytest.mark.parametrize("route", ROUTES)
def test_each_route_opens_to_whom_it_is_for(deployment: Deployment, callers: Callers, route: str) -> None:
    assert route in TABLE, "the table has no row for this route"
    stranger, *members = TABLE[route]
    expected = dict.fromkeys(STRANGERS, stranger) | dict(zip(MEMBERS, members, strict=True))
    client = deployment.client(token=None)
    answers = {
        name: client.request(**callers.request(route), headers={**headers, **fresh_key()})
        for name, headers in callers.headers.items()
    }
    assert {name: answer.status_code for name, answer in answers.items()} == expected
    for answer in answers.values():
        if answer.status_code == 401:
            problem(answer, 401, "unauthenticated")
            assert answer.headers["www-authenticate"] == "Bearer"
        elif answer.status_code == 403:
            problem(answer, 403, "forbidden")


@pytest.fixture(scope="module")
def closed(deployment: Deployment) -> httpx.Client:
    secrets = dict.fromkeys(("ADMIN_TOKEN", "CRON_SECRET", "JWT_SECRET", "STRIPE_WEBHOOK_SECRET"), "")
    return deployment.client(token=None, api=deployment.launcher.api({**deployment.env, **secrets}))


@pytest.mark.parametrize("route", [route for route in ROUTES if TABLE.get(route) != OPEN])
def test_routes_without_a_secret_are_closed(closed: httpx.Client, callers: Callers, route: str) -> None:
    """Whatever is shown: nothing, words that a careless check would let in, what would open them elsewhere."""
    request = callers.request(route)
    unsigned = signed(secret="", algorithm="none")
    empty = ("", "None", "null", "Bearer", "undefined", unsigned, _by_an_empty_secret())
    shown = [{"Authorization": f"Bearer {word}".strip()} for word in empty]
    shown += [callers.headers[name] for name in ("nobody", "the admin token", "cron", "a user")]
    for headers in shown:
        problem(closed.request(**request, headers={**headers, **fresh_key()}), 401, "unauthenticated")


def _by_an_empty_secret() -> str:
    """A token that is right, for whoever takes an absent secret for an empty one; PyJWT makes none."""
    parts = ({"alg": "HS256", "typ": "JWT"}, {"sub": "ada", "aud": "credits", "exp": int(time.time()) + 3_600})
    text = b".".join(urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    signature = urlsafe_b64encode(hmac.digest(b"", text, "sha256")).rstrip(b"=")
    return b".".join((text, signature)).decode()


# --- a user sees their own, and nothing of anybody else's

USERS = [f"user-{number}-of-five" for number in range(5)]


@dataclass(frozen=True)
class Traces:
    """What would give a user away: their ids, and numbers that nobody else has."""

    of: dict[str, set[str]]
    ids: dict[str, list[int]]
    run_id: str


@pytest.fixture(scope="module")
def traces(deployment: Deployment, callers: Callers) -> Traces:  # noqa: ARG001 - made before, so that its run is empty
    world = deployment.world
    of, ids = {}, {}
    for number, name in enumerate(USERS, 1):
        has, gets = 7_000_000 + 13_577 * number, 90_000_000 + 24_683 * number
        ids[name] = [world.user(name, credit_balance=has, custom_credit_amount=gets)]
        of[name] = {name, str(has), str(gets), str(gets - has)}
    run = world.scan()
    world.work(world.claim(run))
    for name in USERS:
        rows = world.history(ids[name][0])
        assert [(str(row["credits_added"]) in of[name], row["status"]) for row in rows] == [(True, "refreshed")]
        ids[name] = [row["id"] for row in rows]
    return Traces(of, ids, str(run.run_id))


GETS = [route for route in ROUTES if route.startswith("GET /api/")]


@pytest.fixture(scope="module")
def anybody(deployment: Deployment) -> httpx.Client:
    return deployment.client(token=None)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_users_token_never_shows_anybody_else(anybody: httpx.Client, traces: Traces, data: st.DataObject) -> None:
    me, other = data.draw(st.permutations(USERS).map(lambda names: names[:2]))
    path = data.draw(st.sampled_from(GETS)).split()[1]
    url = path.replace("{userId:path}", data.draw(st.sampled_from(USERS))).replace("{runId}", traces.run_id)
    asked: dict[str, st.SearchStrategy[str | int]] = {
        "before": st.sampled_from(traces.ids[other] + traces.ids[me] + [10**17]),
        "limit": st.integers(1, 500),
        "userId": st.just(other), "user": st.just(other), "sub": st.just(other),
    }  # fmt: skip
    query = data.draw(st.fixed_dictionaries({}, optional=asked))
    headers = data.draw(st.sampled_from([{}, {"X-User-Id": other}, {"X-Forwarded-User": other}]))
    answer = anybody.get(url, params=query, headers={**headers, **bearer(signed(me))})
    others = set().union(*(found for name, found in traces.of.items() if name != me))
    # What the request itself said comes back in a problem's `instance`, and in no other way.
    told = set(re.findall(r"[\w-]+", answer.text.replace(url, "")))
    assert not others & told
    if "/api/user/" not in path:
        problem(answer, 403, "forbidden")
    elif not {"before", "limit"} >= query.keys() or (query and path.endswith("/next-refresh")):
        problem(answer, 422, "invalid-request")
    elif "before" not in query:
        assert answer.status_code == 200
        assert traces.of[me] & told


def test_no_token_is_logged(deployment: Deployment, callers: Callers, world: World) -> None:
    """At level DEBUG, in headers, in the query, in the path, in a body; known ones and unknown ones."""
    world.user("somebody")
    client = deployment.client(token=None)
    for name, headers in callers.headers.items():
        for secret in [header.split()[1] for header in headers.values()]:
            client.get("/api/admin/runs", headers=headers, params={"token": secret, "limit": secret})
            client.post("/api/reset/manual", headers=headers, json={"reason": 7, "token": secret})
            client.get("/readyz", headers={"Cookie": f"token={secret}", "X-Api-Key": secret})
            client.get("/api/user/credits/refresh-history", headers=headers, params={"before": secret}), name
    logs = deployment.api.all_logs()
    assert logs.count('"/api/admin/runs"') >= len(callers.secrets)
    assert [secret for secret in callers.secrets if secret in logs] == []
