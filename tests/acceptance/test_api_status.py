"""Where the periodic refresh stands, with beat and workers, and without."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.http_service import deployed

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from tests.acceptance.http_service import Deployment
    from tests.cluster import Cluster
    from tests.integration.world import World


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client()


def status(client: httpx.Client) -> dict[str, Any]:
    answer = client.get("/api/reset/status")
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def test_nobody_is_alive(client: httpx.Client, world: World) -> None:
    said = status(client)
    assert (said["workersAlive"], said["workers"], said["beatAlive"]) == (False, [], False)
    assert "are beat and a worker running" in said["beat"]
    assert (said["paused"], said["timezone"], said["timetable"]) == (False, "UTC", "every 1:00:00")
    assert (said["lastRun"], said["lastSuccess"], said["history"]) == (None, None, [])
    in_an_hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    assert abs(datetime.fromisoformat(said["nextRunAt"]) - in_an_hour) <= timedelta(hours=1)
    world.sql.execute("UPDATE settings SET enabled = false")
    assert (status(client)["paused"], status(client)["beatAlive"]) == (True, None)


def test_single_refreshes_do_not_hide_the_periodic_ones(client: httpx.Client, world: World) -> None:
    world.user("periodic")
    scanned = world.scan()
    world.work(world.claim(scanned))
    for number in range(12):
        world.user(f"by-support-{number}")
        assert client.post(f"/api/admin/users/by-support-{number}/refresh-credits").json()["outcome"] == "refreshed"
    said = status(client)
    assert [run["runId"] for run in said["history"]] == [str(scanned.run_id)]
    assert said["lastRun"]["runId"] == said["lastSuccess"]["runId"] == str(scanned.run_id)


def test_a_broker_that_is_away(deployment: Deployment) -> None:
    api = deployment.launcher.api({**deployment.env, "REDIS_URL": "redis://127.0.0.1:1/0"})
    said = status(deployment.client(api=api))
    assert (said["workersAlive"], said["workers"]) == (False, [])


def test_a_broker_that_hangs_holds_up_nobody(deployment: Deployment, client: httpx.Client, world: World) -> None:
    """Asked by more at once than there are threads for requests."""
    world.user("meanwhile")
    deployment.redis.kill(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(status, deployment.client()) for _ in range(20)]
            while not any(answer.done() for answer in asked):
                verdict = client.get("/api/admin/users/meanwhile/refresh-verdict")
                assert (verdict.status_code, verdict.elapsed.total_seconds() < 4) == (200, True)
            said = [answer.result() for answer in asked]
    finally:
        deployment.redis.kill(signal.SIGCONT)
    assert {(one["workersAlive"], one["lastRun"] is not None) for one in said} <= {(False, True), (False, False)}
    began = time.monotonic()
    assert status(client)["workersAlive"] is False  # nobody works here, and that is known in time
    assert time.monotonic() - began < 4


def test_a_timetable(deployment: Deployment) -> None:
    api = deployment.launcher.api({**deployment.env, "CREDIT_REFRESH_CRON": "30 2 1 * *"})
    said = status(deployment.client(api=api))
    assert said["timetable"] == "30 2 1 * *"
    coming = datetime.fromisoformat(said["nextRunAt"])
    assert (coming.day, coming.hour, coming.minute) == (1, 2, 30)
    assert coming > datetime.now(UTC)


def test_both_are_alive(cluster: Cluster, tmp_path: Path) -> None:
    """In a deployment of its own: the others have neither."""
    with deployed(cluster, tmp_path) as whole:
        client, worker = whole.client(), whole.start_worker()
        whole.launcher.beat(whole.env)
        whole.world.until(lambda: status(client)["beatAlive"] is True, "beat opened the slot")
        said = status(client)
        assert (said["workersAlive"], [name.partition("@")[0] for name in said["workers"]]) == (True, ["worker"])
        assert said["lastRun"]["source"] == "beat"
        assert said["lastSuccess"]["status"] == "succeeded"
        assert said["history"][0] == said["lastRun"]
        # Beat is told by its slots: moved into the past, the present one has no run.
        whole.world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 year'")
        assert status(client)["beatAlive"] is False
        worker.kill()
        assert status(client)["workersAlive"] is False
