"""Many users at once: a run that workers do, from the dry run to the rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.http_service import fresh_key, problem

if TYPE_CHECKING:
    import httpx

    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client()


def bulk(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/api/admin/credits/bulk-refresh", json=body, headers=fresh_key())


def act(client: httpx.Client, run_id: str, action: str, **body: Any) -> httpx.Response:
    return client.post(f"/api/admin/runs/{run_id}/{action}", json=body, headers=fresh_key())


def shown(client: httpx.Client, run_id: str) -> dict[str, Any]:
    answer = client.get(f"/api/admin/runs/{run_id}")
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


def balances(world: World) -> list[int]:
    rows = world.rows("SELECT credit_balance FROM users WHERE active ORDER BY id")
    return [row["credit_balance"] for row in rows]


def test_a_bulk_refresh_is_accepted_and_done_by_workers(
    client: httpx.Client, deployment: Deployment, world: World
) -> None:
    for number in range(250):
        world.user(f"bulk-{number}", credit_balance=number)
    answer = bulk(client, all=True, reason="scan was down")
    assert answer.status_code == 202
    said = answer.json()
    assert answer.headers["location"] == f"/api/admin/runs/{said['runId']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert (said["status"], said["usersSelected"], said["usersDone"], said["existing"]) == ("running", 250, 0, False)
    assert (said["source"], said["requestedBy"], said["reason"]) == ("api", "api:admin-token", "scan was down")
    ended = deployment.ended(said["runId"])
    assert (ended["status"], ended["users_refreshed"]) == ("succeeded", 250)
    assert ended["credits_granted"] == sum(1_000 - number for number in range(250))
    assert set(balances(world)) == {1_000}
    detail = client.get(answer.headers["location"]).json()
    assert (detail["status"], detail["usersDone"], detail["creditsGranted"]) == ("succeeded", 250, 218_875)
    assert detail["batches"] == [
        {"status": "done", "batches": 3, "users": 250, "usersDeferred": 0, "attempts": 0, "credits": 218_875}
    ]


@pytest.mark.parametrize(
    ("body", "whom"),
    [
        ({"all": True}, {"due", "rich", "pro"}),
        ({"planCode": "free"}, {"due", "rich"}),
        ({"plan_code": "pro"}, {"pro"}),
        ({"userIds": ["due", "early", "unknown", "due"]}, {"due"}),
        ({"userIds": ["due", "early"], "force": True}, {"due", "early"}),
        ({"balanceBelow": 900}, {"due", "pro"}),
        ({"planCode": "free", "balanceBelow": "900", "force": True}, {"due", "early", "gone"}),
        ({"active": False, "force": True}, {"gone"}),
        ({"nextRefreshBefore": "2001-01-01T00:00:00+02:00"}, {"pro"}),
    ],
)
def test_whom_it_selects(client: httpx.Client, world: World, body: dict[str, Any], whom: set[str]) -> None:
    world.sql.execute("UPDATE users SET external_id = external_id || '-' || id WHERE NOT external_id LIKE '%-%'")
    everybody = {row["id"] for row in world.rows("SELECT id FROM users")}
    world.user("due")
    world.user("early", due_in="3 days")
    world.user("rich", credit_balance=950)
    world.user("pro", plan_code="pro", due_in="-30 years")
    world.user("gone", active=False)
    opened = bulk(client, **body, dryRun=True).json()
    query = (
        "SELECT DISTINCT u.external_id FROM credit_refresh_batches AS b JOIN users AS u ON u.id = ANY (b.user_ids)"
        " WHERE b.run_id = %s AND u.id <> ALL (%s)"
    )
    assert {row["external_id"] for row in world.rows(query, opened["runId"], list(everybody))} == whom


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({}, "body", "say whom"),
        ({"all": True, "planCode": "free"}, "body", "exclude one another"),
        ({"all": True, "balanceBelow": 5}, "body", "leave it out"),
        ({"all": True, "keepWindow": True}, "body", "keepWindow is for force"),
        ({"all": True, "atomic": True, "maxUsersPerSecond": 5}, "body", "cannot be paced"),
        ({"balanceBelow": str(2**63)}, "balanceBelow", "9223372036854775807"),
        ({"all": "yes"}, "all", "boolean"),
        ({"all": True, "dryRun": "off"}, "dryRun", "boolean"),
        ({"all": True, "dry_run": 1}, "dry_run", "boolean"),
        ({"all": True, "reason": ""}, "reason", "at least 1"),
        ({"all": True, "reason": "x" * 1_001}, "reason", "at most 1000"),
        ({"all": True, "reason": "a\0b"}, "reason", "code 0"),
        ({"all": True, "asOf": "2026-12-01"}, "asOf", "instant"),
        ({"all": True, "asOf": 1_700_000_000}, "asOf", "instant"),
        ({"all": True, "asOf": "9999-12-31T23:59:59Z", "dryRun": True}, "asOf", "years"),
        ({"userIds": []}, "userIds", "at least 1"),
        ({"userIds": ["a", 7]}, "userIds.1", "string"),
        ({"userIds": ["a", "\0"]}, "userIds.1", "code 0"),
        ({"all": True, "maxUsersPerSecond": 0}, "maxUsersPerSecond", "greater than or equal to 1"),
        ({"all": True, "everyone": True}, "everyone", "not permitted"),
    ],
)
def test_what_contradicts_itself_names_the_field(
    client: httpx.Client, world: World, body: dict[str, Any], field: str, says: str
) -> None:
    runs = world.value("SELECT count(*) FROM credit_refresh_runs")
    said = problem(bulk(client, **body), 422, "invalid-request")
    assert [error["field"] for error in said["errors"]] == [field]
    assert says in said["errors"][0]["message"]
    assert field in said["detail"]
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == runs


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"planCode": "platinum"}, "there is no plan 'platinum'; known are: free, pro"),
        ({"userIds": ["nobody-1", "nobody-2"]}, "none of the 2 ids in userIds is a user's"),
        ({"userIds": ["  "]}, "userIds.0 is no id"),
        ({"userIds": ["x" * 501]}, "userIds.0 is no id"),
        ({"all": True}, "nobody matches"),
        ({"all": True, "asOf": "2999-01-01T00:00:00Z"}, "lies in the future"),
        ({"all": True, "asOf": "2999-01-01T00:00:00Z", "dryRun": True}, "ahead"),
    ],
)
def test_what_cannot_be_done_is_refused(client: httpx.Client, world: World, body: dict[str, Any], says: str) -> None:
    runs = world.value("SELECT count(*) FROM credit_refresh_runs")
    assert says in problem(bulk(client, **body), 409, "refused")["detail"]
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == runs


def test_ids_that_are_nobodys_are_told(client: httpx.Client, world: World) -> None:
    """A slip in an id would otherwise be a user who is silently left out; the first answer says it again."""
    world.user("spelled")
    key, body = fresh_key(), {"userIds": ["spelled", "mispelled", "nobody"]}
    answers = [client.post("/api/admin/credits/bulk-refresh", json=body, headers=key) for _ in range(2)]
    for said in (answer.json() for answer in answers):
        assert (said["usersSelected"], said["unknownUsers"]) == (1, 2)
        assert said["unknownSample"] == ["mispelled", "nobody"]


def test_a_hundred_thousand_ids_fit_into_a_request(client: httpx.Client, world: World) -> None:
    world.user("one-of-many")
    ids = [f"user-of-the-app-with-a-long-id-{number:030}" for number in range(99_999)]
    assert bulk(client, userIds=[*ids, "one-of-many"]).json()["usersSelected"] == 1
    said = problem(bulk(client, userIds=[*ids, "one-of-many", "one more"]), 422, "invalid-request")
    assert said["errors"][0]["field"] == "userIds"


def test_from_the_dry_run_to_the_rollback_and_back(client: httpx.Client, deployment: Deployment, world: World) -> None:
    for number in range(120):
        world.user(f"tour-{number}", credit_balance=100)
    planned = bulk(client, all=True, dryRun=True, reason="what would it do?").json()
    assert deployment.ended(planned["runId"])["users_refreshed"] == 120
    assert set(balances(world)) == {100}

    applied = act(client, planned["runId"], "apply", reason="as planned")
    assert applied.status_code == 202
    assert (applied.json()["kind"], applied.json()["dryRun"]) == ("apply", False)
    deployment.ended(applied.json()["runId"])
    assert set(balances(world)) == {1_000}
    detail = shown(client, applied.json()["runId"])
    assert (detail["parentRunId"], detail["apply"]["usersApplied"]) == (planned["runId"], 120)
    assert [child["runId"] for child in shown(client, planned["runId"])["children"]] == [applied.json()["runId"]]
    problem(act(client, planned["runId"], "apply"), 409, "refused")

    # One has spent; a rollback takes what is there.
    world.sql.execute("UPDATE users SET credit_balance = 400 WHERE external_id = 'tour-0'")
    tried = act(client, applied.json()["runId"], "rollback", dryRun=True).json()
    deployment.ended(tried["runId"])
    assert set(balances(world)) == {400, 1_000}
    back = act(client, applied.json()["runId"], "rollback", reopen=True, reason="wrong plan").json()
    deployment.ended(back["runId"])
    assert sorted(set(balances(world))) == [0, 100]
    detail = shown(client, back["runId"])
    assert (detail["rollback"]["usersReversed"], detail["rollback"]["shortfall"]) == (120, 500)
    assert detail["rollback"]["creditsTakenBack"] == 120 * 900 - 500
    problem(act(client, applied.json()["runId"], "rollback"), 409, "refused")

    # The windows were given back as well: everybody is due again.
    again = bulk(client, all=True).json()
    assert deployment.ended(again["runId"])["users_refreshed"] == 120


def test_who_failed_is_taken_up_again(client: httpx.Client, deployment: Deployment, world: World) -> None:
    for number in range(5):
        world.user(f"retried-{number}", credit_balance=number)
    world.sql.execute(
        "ALTER TABLE users ADD CONSTRAINT host_limit CHECK (external_id <> 'retried-3' OR credit_balance < 9)"
    )
    try:
        run = bulk(client, all=True).json()
        assert deployment.ended(run["runId"])["status"] == "partial"
        detail = shown(client, run["runId"])
        assert [user["userId"] for user in detail["failedUsers"]] == ["retried-3"]
        assert "host_limit" in detail["failedUsers"][0]["error"]
    finally:
        world.sql.execute("ALTER TABLE users DROP CONSTRAINT host_limit")
    retried = act(client, run["runId"], "retry", reason="the limit is gone")
    assert (retried.status_code, retried.json()["kind"], retried.json()["work"]) == (202, "retry", "refresh")
    ended = deployment.ended(retried.json()["runId"])
    assert (ended["status"], ended["users_refreshed"]) == ("succeeded", 1)
    assert set(balances(world)) == {1_000}
    problem(act(client, retried.json()["runId"], "retry"), 409, "refused")


def test_a_run_is_cancelled(client: httpx.Client, world: World) -> None:
    for number in range(150):
        world.user(f"cancelled-{number}")
    # So slow that most of it is left.
    run = bulk(client, all=True, maxUsersPerSecond=1).json()
    answer = client.post(f"/api/admin/runs/{run['runId']}/cancel", json={"reason": "too slow"})
    assert answer.status_code == 200
    said = answer.json()
    assert said["status"] == "cancelled"
    assert said["usersCancelled"] + said["usersRefreshed"] == 150
    detail = shown(client, run["runId"])
    assert (detail["status"], detail["cancelledBy"], detail["cancelReason"]) == (
        "cancelled", "api:admin-token", "too slow",
    )  # fmt: skip
    problem(client.post(f"/api/admin/runs/{run['runId']}/cancel"), 409, "refused")
    retried = act(client, run["runId"], "retry").json()
    assert retried["usersSelected"] == said["usersCancelled"]
    act(client, retried["runId"], "cancel")  # as slow as the first, and tests come after this one


@pytest.mark.parametrize("action", ["apply", "rollback", "retry", "cancel"])
def test_runs_that_there_are_not(client: httpx.Client, action: str) -> None:
    run_id = "00000000-0000-4000-8000-000000000000"
    problem(act(client, run_id, action), 404, "not-found")
    said = problem(act(client, "the-last-one", action), 422, "invalid-request")
    assert said["errors"][0]["field"] == "path.runId"


def test_who_asked_is_kept(client: httpx.Client, deployment: Deployment, world: World) -> None:
    world.user("kept")
    key = deployment.key("admin")
    actor = f"api:key:{key.rpartition('_')[0]}"
    run = bulk(deployment.client(key), all=True, reason="ticket 9").json()
    deployment.ended(run["runId"])
    (detail,) = (shown(client, run["runId"]),)
    assert (detail["requestedBy"], detail["reason"]) == (actor, "ticket 9")
    user_id = world.value("SELECT id FROM users WHERE external_id = 'kept'")
    assert world.audit(user_id)[-1]["actor"] == actor
