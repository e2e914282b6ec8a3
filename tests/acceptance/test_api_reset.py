"""The routes of the systems before: the cron job's call, and the manual reset."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.http_service import CRON_SECRET, fresh_key, problem

if TYPE_CHECKING:
    import httpx

    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World

CRON = "/api/admin/reset-monthly-tokens"
MANUAL = "/api/reset/manual"

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client()


@pytest.fixture(scope="module")
def cron(deployment: Deployment) -> httpx.Client:
    return deployment.client(CRON_SECRET)


class TestTheCronJob:
    """By POST, and by GET."""

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_ten_calls_at_once_grant_once(
        self, deployment: Deployment, cron: httpx.Client, world: World, method: str
    ) -> None:
        ids = [world.user(f"cron-{method}-{number}") for number in range(120)]
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda _: cron.request(method, CRON), range(10)))
        assert {answer.status_code for answer in answers} == {200}
        said = [answer.json() for answer in answers]
        assert all(one["success"] for one in said)
        assert sorted(one["resetCount"] for one in said) == [0] * 9 + [120]
        (run,) = [one["run"] for one in said if one["run"]]
        assert (run["source"], run["requestedBy"], run["reason"]) == ("cron", "api:cron", "scheduled")
        deployment.ended(run["runId"])
        today = str(world.value("SELECT (now() AT TIME ZONE 'UTC')::date"))
        assert {one["date"] for one in said} <= {today, run["createdAt"][:10]}
        assert cron.request(method, CRON).json() == {"success": True, "resetCount": 0, "date": today, "run": None}
        for user_id in ids:
            assert [(row["status"], row["credits_added"]) for row in world.history(user_id)] == [("refreshed", 600)]

    def test_a_get_is_kept_by_no_cache(self, cron: httpx.Client, world: World) -> None:
        world.user("cached")
        answer = cron.get(CRON)
        assert (answer.headers["cache-control"], answer.json()["resetCount"]) == ("no-store", 1)
        assert answer.headers["location"] == f"/api/admin/runs/{answer.json()['run']['runId']}"
        assert "retry-after" not in answer.headers

    def test_dry_runs_plan_a_window_once(self, deployment: Deployment, cron: httpx.Client, world: World) -> None:
        """While every run is a dry one nobody ceases to be due, and a call comes every minute."""
        user_id = world.user("dry-cron")
        world.sql.execute("UPDATE settings SET dry_run = true")
        said = cron.post(CRON).json()
        assert (said["resetCount"], said["run"]["dryRun"]) == (1, True)
        deployment.ended(said["run"]["runId"])
        assert [cron.request(method, CRON).json()["resetCount"] for method in ("GET", "POST", "GET")] == [0, 0, 0]
        assert [row["status"] for row in world.history(user_id)] == ["planned"]

    def test_while_paused(self, cron: httpx.Client, world: World) -> None:
        user_id = world.user("paused")
        world.sql.execute("UPDATE settings SET enabled = false")
        for method in ("GET", "POST"):
            assert "paused" in problem(cron.request(method, CRON), 409, "paused")["detail"]
        assert world.history(user_id) == []


class TestTheManualReset:
    """With need, and without."""

    def test_without_need_nothing_happens(self, client: httpx.Client, world: World) -> None:
        user_id = world.user("not-due", due_in="3 days")
        said = client.post(MANUAL).json()
        assert (said["success"], said["resetCount"], said["run"]) == (True, 0, None)
        assert world.history(user_id) == []

    def test_who_is_due_is_refreshed(self, deployment: Deployment, client: httpx.Client, world: World) -> None:
        due, early = world.user("manual-due"), world.user("manual-early", due_in="3 days")
        said = client.post(MANUAL, json={"reason": "after the outage"}).json()
        assert (said["success"], said["resetCount"], said["run"]["reason"]) == (True, 1, "after the outage")
        deployment.ended(said["run"]["runId"])
        assert [len(world.history(user_id)) for user_id in (due, early)] == [1, 0]

    def test_bypass_resets_everybody(self, deployment: Deployment, client: httpx.Client, world: World) -> None:
        ids = [world.user(f"bypass-{number}", due_in="3 days") for number in range(3)]
        held = world.user("bypass-held", credit_refresh_hold=True)
        run = client.post(MANUAL, json={"bypass": True}, headers=fresh_key()).json()["run"]
        deployment.ended(run["runId"])
        assert [[row["status"] for row in world.history(user_id)] for user_id in ids] == [["refreshed"]] * 3
        assert "refreshed" not in {row["status"] for row in world.history(held)}

    def test_bypass_needs_a_key(self, client: httpx.Client, world: World) -> None:
        """Sent twice, as by a proxy that heard no answer, it would grant everybody twice."""
        user_id = world.user("bypass-keyless", due_in="3 days")
        problem(client.post(MANUAL, json={"bypass": True}), 400, "idempotency-key-missing")
        assert world.history(user_id) == []

    def test_a_dry_run(self, deployment: Deployment, client: httpx.Client, world: World) -> None:
        user_id = world.user("manual-dry")
        run = client.post(MANUAL, json={"dryRun": True}).json()["run"]
        assert run["dryRun"] is True
        deployment.ended(run["runId"])
        assert world.see(user_id)["credit_balance"] == 400
