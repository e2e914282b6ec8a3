"""One user: refreshed there and then, their verdict and their history, and credits that are exact at any size."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.http_service import fresh_key, problem, signed
from tests.integration.command import Cli

if TYPE_CHECKING:
    import httpx

    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World

BEYOND = 2**53 + 1
"""The first number that JavaScript, and many a JSON library, reads as another."""
ALMOST = 2**63 - 1_000
LARGE = [2**53 - 1, 2**53, BEYOND, ALMOST]


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client()


def refresh(client: httpx.Client, user: str, **body: Any) -> httpx.Response:
    return client.post(f"/api/admin/users/{user}/refresh-credits", json=body)


def about(client: httpx.Client, user: str, what: str, **query: Any) -> Any:
    answer = client.get(f"/api/admin/users/{user}/refresh-{what}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- outcomes


def test_a_due_user_is_refreshed_there_and_then(client: httpx.Client, world: World) -> None:
    user_id = world.user("due")
    answer = refresh(client, "due", reason="ticket 7")
    assert answer.status_code == 200
    said = answer.json()
    assert (said["userId"], said["outcome"], said["status"]) == ("due", "refreshed", "succeeded")
    assert (said["creditsAdded"], said["balanceBefore"], said["balanceAfter"], said["amount"]) == (600, 400, 1000, 1000)
    user = world.see(user_id)
    assert user["credit_balance"] == 1_000
    assert datetime.fromisoformat(said["nextRefreshAt"]) == user["next_refresh_at"]
    (row,) = world.history(user_id)
    assert (str(row["run_id"]), row["reason"]) == (said["runId"], "ticket 7")
    assert datetime.fromisoformat(said["windowStart"]) == row["window_start"]
    audit = world.audit(user_id)[-1]
    assert (audit["actor"], audit["action"], audit["credits"]) == ("api:admin-token", "refreshed", 600)
    run = world.row("SELECT source, requested_by, reason FROM credit_refresh_runs WHERE id = %s", said["runId"])
    assert run == {"source": "api", "requested_by": "api:admin-token", "reason": "ticket 7"}


def test_a_body_is_not_needed(client: httpx.Client, world: World) -> None:
    world.user("bare")
    assert client.post("/api/admin/users/bare/refresh-credits").json()["outcome"] == "refreshed"


@pytest.mark.parametrize(
    ("columns", "body", "outcome"),
    [
        ({"due_in": "3 days"}, {}, "not_due"),
        ({"due_in": None}, {}, "unscheduled"),
        ({"credit_refresh_hold": True}, {"force": True}, "held"),
        ({"active": False}, {"force": True}, "inactive"),
        ({"plan_code": None}, {"force": True}, "no_plan"),
        ({"credit_balance": 2**63 - 1}, {"force": True, "amount": 5}, None),
    ],
)
def test_who_is_not_granted_is_told_why(
    client: httpx.Client, world: World, columns: dict[str, Any], body: dict[str, Any], outcome: str | None
) -> None:
    name = f"not-{outcome}"
    user_id = world.user(name, **columns)
    answer = refresh(client, name, **body)
    if outcome is None:  # fill never lowers, and adds nothing to one who has more
        assert (answer.json()["outcome"], answer.json()["creditsAdded"]) == ("refreshed", 0)
        return
    said = problem(answer, 409, "not-granted")
    assert (said["outcome"], said["verdict"]["verdict"], said["verdict"]["userId"]) == (outcome, outcome, name)
    assert world.history(user_id) == []
    asked = about(client, name, "verdict")
    assert {**said["verdict"], "at": asked["at"]} == asked
    assert said["verdict"]["at"].endswith("Z")


def test_a_user_who_would_overflow_is_refused(client: httpx.Client, world: World) -> None:
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, grant_mode, cadence) VALUES ('adding', 'x', 1000, 'add', 'rolling')"
    )
    world.user("full", plan_code="adding", credit_balance=2**63 - 500)
    said = problem(refresh(client, "full"), 409, "not-granted")
    assert (said["outcome"], said["verdict"]["creditBalance"]) == ("overflow", str(2**63 - 500))
    assert refresh(client, "full", amount=499).json()["balanceAfter"] == str(2**63 - 1)


def test_force_and_its_window(client: httpx.Client, world: World) -> None:
    user_id = world.user("early", due_in="3 days")
    before = world.see(user_id)["next_refresh_at"]
    said = refresh(client, "early", force=True, keepWindow=True, amount=700, reason="goodwill").json()
    assert (said["outcome"], said["creditsAdded"], said["amount"]) == ("refreshed", 300, 700)
    assert datetime.fromisoformat(said["nextRefreshAt"]) == before
    said = refresh(client, "early", force=True).json()
    assert datetime.fromisoformat(said["nextRefreshAt"]) > before + timedelta(days=20)


def test_a_dry_run_changes_nothing_and_can_be_applied(client: httpx.Client, world: World, worker: object) -> None:  # noqa: ARG001
    user_id = world.user("dry")
    said = refresh(client, "dry", dryRun=True).json()
    assert (said["outcome"], said["dryRun"], said["creditsAdded"], said["balanceAfter"]) == ("planned", True, 600, 1000)
    assert world.see(user_id)["credit_balance"] == 400
    assert [row["status"] for row in world.history(user_id)] == ["planned"]
    applied = client.post(f"/api/admin/runs/{said['runId']}/apply", headers=fresh_key())
    assert applied.status_code == 202
    world.until(lambda: world.see(user_id)["credit_balance"] == 1_000, "the plan was applied")


def test_while_the_host_has_the_user_locked_the_run_stays_open(client: httpx.Client, world: World) -> None:
    user_id = world.user("busy")
    with world.host() as host:
        host.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (user_id,))
        answer = refresh(client, "busy")
        assert answer.status_code == 200
        said = answer.json()
        assert (said["outcome"], said["status"], said["creditsAdded"]) == (None, "running", 0)
        assert "locked" in said["error"]
        host.rollback()
    unfinished = problem(refresh(client, "busy"), 409, "not-granted")
    assert unfinished["outcome"] == "unfinished"
    assert unfinished["verdict"]["unfinishedRun"]["runId"] == said["runId"]
    # Upkeep rings for it; here the test does.
    world.work([world.value("SELECT id FROM credit_refresh_batches WHERE run_id = %s", said["runId"])])
    assert [row["status"] for row in world.history(user_id)] == ["refreshed"]


def test_a_users_id_is_any_text(client: httpx.Client, world: World) -> None:
    for name, path in [
        ("org/7/ada", "org%2F7%2Fada"), ("auth0|ada", "auth0%7Cada"), ("ada@example.com", "ada@example.com"),
        ("Ünal Ö", "%C3%9Cnal%20%C3%96"), ("50%", "50%25"), ("a?b#c", "a%3Fb%23c"),
    ]:  # fmt: skip
        world.user(name)
        assert about(client, path, "verdict")["userId"] == name
        assert refresh(client, path).json()["userId"] == name
        assert about(client, path, "history")["entries"][0]["creditsAdded"] == 600
    for path in ("nobody", "%00", "x" * 501, "org"):
        answer = client.get(f"/api/admin/users/{path}/refresh-verdict")
        assert answer.status_code == (404 if path in {"nobody", "org"} else 422), path


@pytest.mark.parametrize("spelling", [{"keepWindow": True, "dryRun": True}, {"keep_window": True, "dry_run": True}])
def test_bodies_may_be_in_snake_case(client: httpx.Client, world: World, spelling: dict[str, bool]) -> None:
    name = "-".join(spelling)
    world.user(name)
    assert refresh(client, name, force=True, **spelling).json()["dryRun"] is True


# --- exact credits


@pytest.mark.parametrize("balance", LARGE)
def test_balances_are_exact_in_answers(
    client: httpx.Client, deployment: Deployment, world: World, balance: int
) -> None:
    name = f"rich-{balance}"
    world.user(name, credit_balance=balance, due_in="3 days")
    wire = balance if balance < 2**53 else str(balance)
    assert about(client, name, "verdict")["creditBalance"] == wire
    own = deployment.client(signed(name)).get("/api/user/credits/next-refresh").json()
    assert own["creditBalance"] == wire
    said = refresh(client, name, force=True, dryRun=True).json()
    assert (said["balanceBefore"], said["balanceAfter"]) == (wire, wire)
    raw = client.get(f"/api/admin/users/{name}/refresh-verdict").text
    assert f'"creditBalance":{json.dumps(wire)}' in raw


@pytest.mark.parametrize("amount", LARGE)
@pytest.mark.parametrize("form", ["{}", '"{}"'])
def test_amounts_are_exact_in_requests(client: httpx.Client, world: World, amount: int, form: str) -> None:
    name = f"given-{amount}-{len(form)}"
    user_id = world.user(name)
    url = f"/api/admin/users/{name}/refresh-credits"
    body = f'{{"amount": {form.format(amount)}}}'
    said = client.post(url, content=body, headers={"Content-Type": "application/json"}).json()
    assert int(said["balanceAfter"]) == world.see(user_id)["credit_balance"] == amount
    (entry,) = about(client, name, "history")["entries"]
    assert (int(entry["target"]), int(entry["creditsAdded"])) == (amount, amount - 400)
    assert isinstance(entry["target"], int) == (amount < 2**53)


@pytest.mark.parametrize(
    "amount", [0, -1, 2**63, 1.0, 1.5, True, "1.0", "1e3", "0x10", " 7", "1_000", "", "٣", [], None]
)
def test_what_is_no_amount_is_refused(client: httpx.Client, world: World, amount: object) -> None:
    user_id = world.user(f"odd-{amount!r}")
    body = json.dumps({"amount": amount, "force": "no" if amount is None else False})
    answer = client.post(
        f"/api/admin/users/odd-{amount!r}/refresh-credits", content=body, headers={"Content-Type": "application/json"}
    )
    said = problem(answer, 422, "invalid-request")
    assert [error["field"] for error in said["errors"]] == ["force" if amount is None else "amount"]
    assert world.history(user_id) == []


def test_a_settings_amount_is_exact(client: httpx.Client, world: World) -> None:
    user_id = world.user("custom")
    answer = client.put("/api/admin/users/custom/refresh-settings", json={"customCreditAmount": str(ALMOST)})
    assert answer.json()["customCreditAmount"] == str(ALMOST)
    assert world.see(user_id)["custom_credit_amount"] == ALMOST
    assert refresh(client, "custom").json()["balanceAfter"] == str(ALMOST)


def test_sums_beyond_64_bits_are_exact(client: httpx.Client, world: World, worker: object) -> None:  # noqa: ARG001
    for number in range(3):
        world.user(f"huge-{number}", credit_balance=0, custom_credit_amount=2**63 - 1)
    opened = client.post(
        "/api/admin/credits/bulk-refresh",
        json={
            "userIds": [f"huge-{number}" for number in range(3)],
            "dryRun": True,
            "balanceBelow": str(BEYOND),
            "maxUsersPerSecond": 9,  # a batch for each of them: a batch's own sum ends at 64 bits
        },
        headers=fresh_key(),
    ).json()
    url = f"/api/admin/runs/{opened['runId']}"
    world.until(lambda: client.get(url).json()["usersDone"] == 3, "the batch is closed")
    detail = client.get(url).json()
    assert detail["selection"]["balanceBelow"] == str(BEYOND)
    assert detail["batches"][0]["credits"] == str(3 * (2**63 - 1))


# --- verdict and history


def test_the_verdict_is_that_of_the_command(deployment: Deployment, client: httpx.Client, world: World) -> None:
    world.user("asked", credit_refresh_hold=True, hold_for="2 days")
    cli = Cli(deployment.env["DATABASE_URL"], deployment.redis.url)
    told, shown = about(client, "asked", "verdict"), cli.facts("why", "asked")
    assert told["hold"]["ended"] is False
    assert told.keys() <= shown.keys()
    for name in told.keys() - {"at"}:
        assert _same(told[name], shown[name]), name


def _same(told: Any, shown: Any) -> bool:
    """But for how the zone of an instant is written."""
    if isinstance(told, dict):
        return told.keys() == shown.keys() and all(_same(told[name], shown[name]) for name in told)
    if isinstance(told, str) and told.endswith("Z"):
        return datetime.fromisoformat(told) == datetime.fromisoformat(shown)
    return bool(told == shown)


def test_the_history_is_read_page_by_page(client: httpx.Client, deployment: Deployment, world: World) -> None:
    user_id = world.user("paged")
    for _ in range(5):
        assert refresh(client, "paged", force=True).status_code == 200
    pages: list[list[int]] = []
    before: dict[str, int] = {}
    while True:
        page = about(client, "paged", "history", limit=2, **before)
        pages.append([entry["id"] for entry in page["entries"]])
        refresh(client, "paged", force=True)  # what comes in meanwhile is newer, and on no later page
        if page["next"] is None:
            break
        before = {"before": page["next"]}
    assert [len(page) for page in pages] == [2, 2, 1]
    wanted = [row["id"] for row in world.history(user_id)][:5]
    assert [id_ for page in pages for id_ in page] == wanted[::-1]
    own = deployment.client(signed("paged")).get("/api/user/credits/refresh-history", params={"limit": 3}).json()
    assert len(own["entries"]) == 3
    assert not {"reason", "runId", "source", "error"} & own["entries"][0].keys()

    world.user("stranger")
    refresh(client, "stranger")
    theirs = about(client, "stranger", "history")["entries"][0]["id"]
    for url, token in [
        ("/api/admin/users/paged/refresh-history", None),
        ("/api/user/credits/refresh-history", "paged"),
    ]:
        asker = deployment.client(signed(token)) if token else client
        problem(asker.get(url, params={"before": str(theirs)}), 404, "not-found")


def test_a_users_own_next_refresh(deployment: Deployment, world: World) -> None:
    own = deployment.client(signed("own"))
    problem(own.get("/api/user/credits/next-refresh"), 404, "not-found")
    user_id = world.user("own", due_in="3 days", credit_refresh_hold=True)
    said = own.get("/api/user/credits/next-refresh").json()
    assert (said["onHold"], said["creditBalance"], said["amount"], said["creditsAdded"]) == (True, 400, 1000, 600)
    assert datetime.fromisoformat(said["nextRefreshAt"]) == world.see(user_id)["next_refresh_at"]
    assert said["lastRefresh"] is None
    world.sql.execute("UPDATE users SET active = false WHERE id = %s", (user_id,))
    assert own.get("/api/user/credits/next-refresh").json()["nextRefreshAt"] is None
