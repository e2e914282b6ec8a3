"""The HTTP API as its callers meet it: a uvicorn process, a database, a broker, and callers with credentials."""

from __future__ import annotations

import hmac
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httpx
import jwt
import psycopg
from psycopg.rows import dict_row

import settings
from db import Database
from refresh.keys import create_key
from tests import roles
from tests.acceptance.nodes import Launcher
from tests.conftest import LOCK_TIMEOUT_MS
from tests.integration.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.acceptance.nodes import LocalApi, LocalRedis, LocalWorker
    from tests.cluster import Cluster

ADMIN_TOKEN = "admin-token-of-the-tests"  # noqa: S105 - theirs alone, like the others
CRON_SECRET = "cron-secret-of-the-tests"  # noqa: S105
JWT_SECRET = "jwt-secret-of-the-tests-with-32-bytes"  # noqa: S105
STRIPE_SECRET = "whsec_of_the_tests_0123456789abcdef"  # noqa: S105
PROBLEM = "application/problem+json"
SECONDS = 30.0
"""For an answer: an opening that waits for another on a busy machine."""
YEAR = 31_536_000

_REST = """
WITH awake AS (UPDATE settings SET enabled = true, dry_run = false)
UPDATE users SET active = false WHERE active
"""


def signed(subject: str = "ada", *, secret: str = JWT_SECRET, algorithm: str = "HS256", **claims: object) -> str:
    """A user's own token, as the host app signs it."""
    now = int(time.time())
    payload = {"sub": subject, "aud": "credits", "iat": now, "exp": now + YEAR, **claims}
    return jwt.encode(payload, secret, algorithm)


def stripe_signature(body: bytes) -> dict[str, str]:
    """Stripe's header for a body: HMAC-SHA256 over the instant, a full stop and the body."""
    instant = int(time.time())
    mac = hmac.digest(STRIPE_SECRET.encode(), f"{instant}.".encode() + body, "sha256")
    return {"Stripe-Signature": f"t={instant},v1={mac.hex()}", "Content-Type": "application/json"}


def bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token is not None else {}


def fresh_key() -> dict[str, str]:
    """A header for a request that is nobody else's."""
    return {"Idempotency-Key": uuid.uuid4().hex}


def problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The problem that an answer is; nothing of ours shows in it."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), answer.text
    said: dict[str, Any] = answer.json()
    assert (said["type"], said["status"]) == (f"/problems/{slug}", status), said
    assert said["title"]
    assert said["detail"]
    assert unquote(said["instance"]) == unquote(answer.request.url.raw_path.decode().partition("?")[0])
    assert said["correlationId"] == answer.headers["x-correlation-id"]
    assert not any(word in answer.text for word in ("Traceback", "psycopg", ".py", "SELECT", "sqlalchemy"))
    return said


@dataclass
class Deployment:
    """A database, a broker and processes of the service."""

    cluster: Cluster
    database: Database
    database_name: str
    world: World
    launcher: Launcher
    redis: LocalRedis
    env: dict[str, str]
    worker_env: dict[str, str]
    clients: list[httpx.Client] = field(default_factory=list)
    _api: LocalApi | None = None

    @property
    def api(self) -> LocalApi:
        """The process that the module's tests share."""
        if self._api is None:
            self._api = self.launcher.api(self.env)
        return self._api

    def start_worker(self) -> LocalWorker:
        return self.launcher.worker(self.worker_env)

    def client(self, token: str | None = ADMIN_TOKEN, *, api: LocalApi | None = None, **headers: str) -> httpx.Client:
        """Somebody who asks; closed at the module's end."""
        base = (api or self.api).url
        made = httpx.Client(base_url=base, headers={**bearer(token), **headers}, timeout=SECONDS, trust_env=False)
        self.clients.append(made)
        return made

    def key(self, *scopes: str) -> str:
        """A new API key."""
        with self.database.transaction() as connection:
            return create_key(connection, name="test", scopes=scopes, expires_at=None, actor="test").key

    def rest(self) -> None:
        """Put everybody to sleep, so that a test finds its own users alone."""
        self.world.sql.execute(_REST)

    def ended(self, run_id: str) -> dict[str, Any]:
        """A run's row, once workers have done it."""
        query = "SELECT * FROM credit_refresh_runs WHERE id = %s"
        self.world.until(lambda: self.world.row(query, run_id)["status"] != "running", f"run {run_id} ended")
        return self.world.row(query, run_id)


@contextmanager
def deployed(cluster: Cluster, folder: Path) -> Iterator[Deployment]:
    """A deployment with every secret set, each process in a role of few rights; its API starts when first asked for."""
    name = cluster.create(cluster.template)
    url = cluster.url(name)
    database = Database(url, "credits", name="test", pool=2, lock_timeout_ms=LOCK_TIMEOUT_MS)
    launcher = Launcher(folder)
    try:
        with database.statements() as connection:
            dsn = connection.info.dsn
        options = "-c search_path=credits -c timezone=UTC"
        with (
            psycopg.connect(dsn, autocommit=True, row_factory=dict_row, options=options) as sql,
            roles.made(sql, "api") as api_role,
            roles.made(sql, "worker") as worker_role,
        ):
            redis = launcher.redis()
            env = settings.environment(
                DATABASE_URL=roles.url(url, api_role),
                REDIS_URL=redis.url,
                CREDITS_STATE_DIR=str(folder / "state"),
                ADMIN_TOKEN=ADMIN_TOKEN,
                CRON_SECRET=CRON_SECRET,
                JWT_SECRET=JWT_SECRET,
                STRIPE_WEBHOOK_SECRET=STRIPE_SECRET,
                API_RATE_LIMIT="100000/second",
                LOG_FORMAT="json",
            )
            worker_env = env | {"DATABASE_URL": roles.url(url, worker_role)}
            made = Deployment(cluster, database, name, World(database, sql), launcher, redis, env, worker_env)
            yield made
            for client in made.clients:
                client.close()
    finally:
        launcher.stop()
        database.close()
        cluster.drop(name)
