"""Errors as problems, the page that explains each, correlation ids, and what happens when a server is away."""

from __future__ import annotations

import json
import re
import signal
import socket
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from api.problems import KINDS
from tests.acceptance.http_service import ADMIN_TOKEN, bearer, fresh_key, problem, signed

if TYPE_CHECKING:
    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World

BULK = "/api/admin/credits/bulk-refresh"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client()


# --- what the framework refuses


@pytest.mark.parametrize(
    "path",
    ["/", "/api", "/api/admin", "/api/admin/users/ada", "/api/admin/runs/", "/DOCS", "/docs/..%2Fstart.js", "/%00"],
)
def test_unknown_addresses(client: httpx.Client, path: str) -> None:
    problem(client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/admin/runs"), ("DELETE", "/api/admin/users/ada/refresh-settings"), ("PATCH", "/healthz"),
        ("GET", BULK), ("TRACE", "/api/reset/status"), ("PUT", "/api/reset/manual"),
    ],
)  # fmt: skip
def test_unknown_methods(client: httpx.Client, method: str, path: str) -> None:
    answer = client.request(method, path)
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"]


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"{", JSON), (b"{'all': true}", JSON), (b"all=true", {"Content-Type": "application/x-www-form-urlencoded"}),
        (b'{"all": true}', {"Content-Type": "text/plain"}), (b"", JSON), (b"null", JSON), (b"[]", JSON), (b"7", JSON),
        (b"\xff\xfe", JSON), (b'{"reason": "\\ud800", "all": true}', JSON), (b"[" * 100_000, JSON),
        (b'{"balanceBelow": ' + b"9" * 5_000 + b"}", JSON), (b'{"balanceBelow": 1e999}', JSON),
        (b'{"balanceBelow": NaN}', JSON), (b'{"balanceBelow": 5, "balanceBelow": [], "all": true}', JSON),
    ],
)  # fmt: skip
def test_bodies_that_are_none(client: httpx.Client, content: bytes, headers: dict[str, str]) -> None:
    said = problem(client.post(BULK, content=content, headers={**headers, **fresh_key()}), 422, "invalid-request")
    assert said["detail"]
    for error in said.get("errors", []):
        assert not re.search(r"\d", error["field"])


def test_a_body_that_is_too_large(client: httpx.Client) -> None:
    small = b'{"reason": "' + b"x" * 2**20 + b'"}'
    for content in (small, iter([small[:1000], small[1000:]])):
        answer = client.post("/api/reset/manual", content=content, headers=JSON)
        problem(answer, 413, "too-large")
    large = b'{"reason": "' + b"x" * 2**25 + b'"}'
    problem(client.post(BULK, content=large, headers={**JSON, **fresh_key()}), 413, "too-large")
    assert client.post(BULK, content=small, headers={**JSON, **fresh_key()}).status_code == 422


@pytest.mark.parametrize(
    "head",
    [
        "GET /api/admin/runs HTTP/1.1\r\nHost: [\r\nAuthorization: Bearer x\r\n",
        "GET /api/admin/runs HTTP/1.1\r\nHost: a b\r\n",
        "GET //evil.example/%2e%2e/api HTTP/1.1\r\nHost: localhost\r\n",
        "GET http://other.example/api/admin/runs HTTP/1.1\r\nHost: other.example\r\n",
        "GET /api/admin/runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n",
        "GET /api/admin/runs HTTP/1.1\r\nHost: localhost\r\nX-Correlation-ID: \xff\r\n",
        "GET /api/admin/runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + "a" * 5_000 + "\r\n",
    ],
)
def test_odd_requests_are_answered(deployment: Deployment, head: str) -> None:
    with socket.create_connection(("127.0.0.1", deployment.api.port), timeout=10) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode("latin-1"))
        answer = connection.makefile("rb").read().decode("latin-1")
    assert re.match(r"HTTP/1.1 4\d\d ", answer), answer
    assert "Traceback" not in answer


# --- the types


def test_every_type_explains_itself(deployment: Deployment) -> None:
    anybody = deployment.client(token=None)
    for slug, kind in KINDS.items():
        answer = anybody.get(f"/problems/{slug}")
        assert answer.status_code == 200
        assert answer.json() == {
            "type": f"/problems/{slug}", "title": kind.title, "status": kind.status, "meaning": kind.meaning,
        }  # fmt: skip
    said = problem(anybody.get("/problems/no-such"), 404, "not-found")
    assert "known are: unauthenticated" in said["detail"]


def test_paused(client: httpx.Client, deployment: Deployment, world: World) -> None:
    world.user("resting")
    single = "/api/admin/users/resting/refresh-credits"
    run = client.post(BULK, json={"all": True, "dryRun": True}, headers=fresh_key()).json()
    world.work(world.value("SELECT array_agg(id) FROM credit_refresh_batches WHERE run_id = %s", run["runId"]))
    actions = [f"/api/admin/runs/{run['runId']}/apply", single, "/api/reset/manual"]
    world.sql.execute("UPDATE settings SET enabled = false")
    for url in (*actions, BULK):
        answer = client.post(url, json={"all": True} if url == BULK else {}, headers=fresh_key())
        assert "`credits resume` ends that" in problem(answer, 409, "paused")["detail"]
    assert client.get("/api/admin/users/resting/refresh-verdict").json()["paused"] is True
    deployment.rest()
    disabled = deployment.client(api=deployment.launcher.api({**deployment.env, "CREDIT_REFRESH_ENABLED": "false"}))
    for url in actions:
        assert "CREDIT_REFRESH_ENABLED" in problem(disabled.post(url, headers=fresh_key()), 409, "paused")["detail"]


def test_settings_that_make_all_runs_dry(deployment: Deployment, world: World) -> None:
    user_id = world.user("all-dry")
    dry = deployment.client(api=deployment.launcher.api({**deployment.env, "CREDIT_REFRESH_DRY_RUN": "true"}))
    said = dry.post("/api/admin/users/all-dry/refresh-credits", json={"dryRun": False}).json()
    assert (said["outcome"], said["dryRun"]) == ("planned", True)
    assert world.see(user_id)["credit_balance"] == 400


# --- the database, and the broker, are away


def test_the_database_is_away(deployment: Deployment) -> None:
    nowhere = {"DATABASE_URL": "postgresql://credits:s3cret@127.0.0.1:1/credits"}
    client = deployment.client(api=deployment.launcher.api({**deployment.env, **nowhere}))
    for method, url in [
        ("GET", "/api/admin/runs"), ("POST", BULK), ("GET", "/api/admin/users/ada/refresh-verdict"),
        ("GET", "/api/reset/status"), ("GET", "/api/admin/runs/00000000-0000-4000-8000-000000000000/events"),
    ]:  # fmt: skip
        answer = client.request(method, url, json={"all": True} if method == "POST" else None, headers=fresh_key())
        said = problem(answer, 503, "unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert not re.search("s3cret|127.0.0.1|5432", answer.text), said
    key = {"Authorization": f"Bearer {deployment.key('read')}"}
    problem(client.get("/api/admin/runs", headers=key), 503, "unavailable")
    assert "s3cret" not in deployment.launcher.processes[-1].all_logs()


def test_it_serves_again_when_the_database_is_back(deployment: Deployment, client: httpx.Client) -> None:
    """Sessions that the server has ended are no error to whoever asks next."""
    assert client.get("/api/admin/runs").status_code == 200
    name = deployment.database_name
    with deployment.cluster.admin() as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'credits-api'"
            " AND datname = %s", (name,),
        )  # fmt: skip
        problem(client.get("/api/admin/runs"), 503, "unavailable")
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert client.get("/api/admin/runs").status_code == 200


def test_a_broker_that_is_away_delays_and_loses_nothing(
    deployment: Deployment, client: httpx.Client, world: World
) -> None:
    user_id = world.user("delayed")
    deployment.redis.kill(signal.SIGSTOP)
    try:
        answer = client.post(BULK, json={"all": True}, headers=fresh_key())
        assert answer.status_code == 202
        at_once = client.post("/api/admin/users/delayed/refresh-credits", json={"force": True})
        assert problem(at_once, 409, "not-granted")["outcome"] == "unfinished"
    finally:
        deployment.redis.kill(signal.SIGCONT)
    deployment.start_worker()  # whose first upkeep publishes it
    deployment.ended(answer.json()["runId"])
    assert [row["status"] for row in world.history(user_id)] == ["refreshed"]


def test_a_defect_says_nothing_of_itself(deployment: Deployment, client: httpx.Client, world: World) -> None:
    """A table is gone, which nobody foresees: the log has it, under the id that the answer names."""
    world.user("unlucky")
    world.sql.execute("ALTER TABLE plans RENAME COLUMN grant_mode TO hidden")
    try:
        answer = client.get("/api/admin/users/unlucky/refresh-verdict", headers={"X-Correlation-ID": "defect-1"})
    finally:
        world.sql.execute("ALTER TABLE plans RENAME COLUMN hidden TO grant_mode")
    said = problem(answer, 500, "internal")
    assert "grant_mode" not in answer.text
    assert said["correlationId"] == "defect-1"
    logged = [line for line in _logged(deployment.api.all_logs()) if line.get("event") == "A defect"]
    assert logged[-1]["correlation_id"] == "defect-1"
    assert "UndefinedColumn" in logged[-1]["exception"]


# --- correlation ids


def test_a_correlation_id_goes_from_the_request_to_the_audit_log(
    deployment: Deployment, client: httpx.Client, world: World
) -> None:
    deployment.start_worker()
    user_id = world.user("traced")
    trace = {"X-Correlation-ID": "checkout-7/ab:12"}
    answer = client.post(BULK, json={"all": True}, headers={**fresh_key(), **trace})
    assert answer.headers["x-correlation-id"] == "checkout-7/ab:12"
    run = deployment.ended(answer.json()["runId"])
    assert run["metadata"]["correlationId"] == "checkout-7/ab:12"
    assert world.audit(user_id)[-1]["correlation_id"] == "checkout-7/ab:12"
    requests = [line for line in _logged(deployment.api.all_logs()) if line.get("event") == "Request"]
    assert any(
        (line["correlation_id"], line["path"], line["status"]) == ("checkout-7/ab:12", BULK, 202) for line in requests
    )

    def of_workers() -> list[dict[str, Any]]:
        workers = [process for process in deployment.launcher.processes if process.name.startswith("worker")]
        lines = [line for process in workers for line in _logged(process.all_logs())]
        return [line for line in lines if line.get("run_id") == str(run["id"])]

    world.until(lambda: bool(of_workers()), "a worker has logged it")
    assert {line.get("correlation_id") for line in of_workers()} == {"checkout-7/ab:12"}


def test_a_single_refresh_carries_it_too(client: httpx.Client, world: World) -> None:
    user_id = world.user("traced-alone")
    answer = client.post("/api/admin/users/traced-alone/refresh-credits")
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-correlation-id"])
    assert world.audit(user_id)[-1]["correlation_id"] == answer.headers["x-correlation-id"]


@pytest.mark.parametrize("sent", ["", "x" * 129, "a\tb", "é"])
def test_what_is_no_correlation_id_is_replaced(client: httpx.Client, sent: str) -> None:
    answer = client.get("/healthz", headers={b"X-Correlation-ID": sent.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-correlation-id"])


def _logged(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# --- the page with the try-out


def test_the_page_loads_nothing_from_elsewhere(deployment: Deployment) -> None:
    anybody = deployment.client(token=None)
    page = anybody.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "http" not in policy
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) == 4
    assert not re.search(r"https?://|<script>|\son\w+=", page.text)
    kinds = {".js": "javascript", ".css": "text/css", ".png": "image/png"}
    for path in loaded:
        answer = anybody.get(f"/{path}")
        assert answer.status_code == 200
        assert kinds[path[path.rindex(".") :]] in answer.headers["content-type"]
        assert answer.content
    assert "SwaggerUIBundle" in anybody.get("/docs/swagger-ui-bundle.js").text
    assert 'url: "openapi.json"' in anybody.get("/docs/start.js").text


def test_users_and_admins_are_not_mixed_up(deployment: Deployment) -> None:
    """A subject that is spelled like an admin is a user all the same."""
    for subject in ("api:admin-token", ADMIN_TOKEN, "admin", "*"):
        answer = httpx.get(
            f"{deployment.api.url}/api/admin/runs", headers=bearer(signed(subject)), timeout=10, trust_env=False
        )
        problem(answer, 403, "forbidden")


def test_a_parameter_that_nobody_reads_is_refused(client: httpx.Client, world: World) -> None:
    """`dryRun` belongs in the body: left unread, it would be a refresh."""
    user_id = world.user("not-dry")
    url = "/api/admin/users/not-dry/refresh-credits"
    said = problem(client.post(url, params={"dryRun": "true"}), 422, "invalid-request")
    assert said["detail"] == "query.dryRun: is no parameter here; this address knows none"
    assert world.history(user_id) == []
    said = problem(client.get("/api/admin/runs", params={"limits": "1"}), 422, "invalid-request")
    assert "query.limits" in said["detail"]
    assert "limit" in said["detail"].partition("known are")[2]
