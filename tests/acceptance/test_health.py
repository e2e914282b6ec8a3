"""Health, readiness and metrics of a real API process, while its servers go and come back."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import settings
from db import REVISION
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import Launcher, LocalRedis

ADMIN = "an-admin-token-of-the-tests-0001"
READY_SECONDS = 2.0
MARGIN_SECONDS = 1.5
DEADLINE_SECONDS = 20.0

OK = {"status": "ok", "detail": "answers"}
SILENT = {"status": "failed", "detail": "does not answer"}
MIGRATED = {"status": "ok", "detail": f"the tables are at migration {REVISION}"}
UNASKED = {"status": "unasked", "detail": "not asked before the database answers"}


@pytest.fixture
def wire(database_url: str) -> Iterator[Proxy]:
    """Between the API and the database."""
    (folder,) = parse_qs(urlsplit(database_url).query)["host"]
    with Proxy(Path(folder) / ".s.PGSQL.5432") as proxy:
        yield proxy


@pytest.fixture
def api(
    wire: Proxy, launcher: Launcher, default_redis_broker: LocalRedis, database_url: str, tmp_path: Path
) -> Iterator[httpx.Client]:
    env = settings.environment(
        DATABASE_URL=f"postgresql://postgres@127.0.0.1:{wire.port}{urlsplit(database_url).path}",
        REDIS_URL=default_redis_broker.url,
        CREDITS_STATE_DIR=str(tmp_path / "api"),
        ADMIN_TOKEN=ADMIN,
    )
    with httpx.Client(base_url=launcher.api(env).url, timeout=30) as client:
        yield client


def ready(api: httpx.Client) -> tuple[int, dict[str, Any]]:
    began = time.monotonic()
    response = api.get("/readyz")
    assert time.monotonic() - began < READY_SECONDS + MARGIN_SECONDS
    answer = response.json()
    assert answer["status"] == ("ready" if response.status_code == 200 else "unready")
    return response.status_code, answer["checks"]


def samples(api: httpx.Client) -> dict[str, float]:
    response = api.get("/metrics", headers={"Authorization": f"Bearer {ADMIN}"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + "".join(f" {key}={sample.labels[key]}" for key in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not in {DEADLINE_SECONDS:.0f} seconds: {what}")
        time.sleep(0.05)


def is_ready(api: httpx.Client) -> bool:
    return ready(api)[0] == 200


def assert_alive(api: httpx.Client) -> None:
    began = time.monotonic()
    response = api.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "alive"})
    assert time.monotonic() - began < MARGIN_SECONDS


def test_all_is_well_and_a_refresh_is_counted(api: httpx.Client, ledger: Ledger) -> None:
    assert_alive(api)
    assert ready(api) == (200, {"database": OK, "migrations": MIGRATED, "broker": OK})
    ledger.add_due_users(3)
    before = samples(api)
    assert (before["credits_database_up"], before["credits_broker_up"], before["credits_users_due"]) == (1, 1, 3)
    assert before["credits_oldest_overdue_seconds"] == pytest.approx(3_600, abs=60)
    assert before["credits_queue_messages queue=bulk"] == before["credits_queue_unacked_messages"] == 0

    done = api.post("/api/admin/users/user-1/refresh-credits", headers={"Authorization": f"Bearer {ADMIN}"})
    assert done.status_code == 200, done.text
    after = samples(api)
    assert after["credits_users_due"] == 2
    assert after["credits_run_users_total outcome=refreshed work=refresh"] == 1
    assert after["credits_granted_total work=refresh"] == done.json()["creditsAdded"] == 999

    for headers in ({}, {"Authorization": "Bearer guessed-000000000000000000000000"}):
        response = api.get("/metrics", headers=headers)
        assert response.status_code == 401
        assert "credits_" not in response.text


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_redis_goes_and_comes_back(api: httpx.Client, default_redis_broker: LocalRedis, fault: str) -> None:
    assert is_ready(api)
    default_redis_broker.kill(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    assert ready(api) == (503, {"database": OK, "migrations": MIGRATED, "broker": SILENT})
    assert_alive(api)
    began = time.monotonic()
    found = samples(api)
    assert time.monotonic() - began < 2 * READY_SECONDS + MARGIN_SECONDS
    assert (found["credits_database_up"], found["credits_broker_up"]) == (1, 0)
    assert "credits_queue_messages queue=bulk" not in found
    if fault == "killed":
        default_redis_broker.restart()
    else:
        default_redis_broker.kill(signal.SIGCONT)
    until(lambda: is_ready(api), "the broker is back")
    assert samples(api)["credits_broker_up"] == 1


@pytest.mark.parametrize("fault", ["cut", "frozen"])
def test_the_database_goes_and_comes_back(api: httpx.Client, wire: Proxy, fault: str) -> None:
    assert is_ready(api)
    samples(api)
    (wire.cut if fault == "cut" else wire.freeze)()
    for _ in range(3):  # what waits for an answer is not asked again meanwhile
        assert ready(api) == (503, {"database": SILENT, "migrations": UNASKED, "broker": OK})
    assert_alive(api)
    found = samples(api)
    assert (found["credits_database_up"], found["credits_broker_up"]) == (0, 1)
    assert "credits_users_due" not in found
    wire.restore()
    until(lambda: is_ready(api), "the database is back")
    until(lambda: samples(api)["credits_database_up"] == 1, "its metrics, too")


def test_tables_of_another_release_are_not_ready(api: httpx.Client, ledger: Ledger) -> None:
    ledger.execute("UPDATE alembic_version SET version_num = '0001'")
    said = f"the tables are not at migration {REVISION}: run `credits db upgrade`"
    assert ready(api) == (503, {"database": OK, "migrations": {"status": "failed", "detail": said}, "broker": OK})
    assert_alive(api)
    ledger.execute("UPDATE alembic_version SET version_num = %s", REVISION)
    assert is_ready(api)
