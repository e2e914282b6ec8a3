"""Requests that come twice, at once, or after the server has died: one run, and the first answer."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest

from tests.acceptance.http_service import ADMIN_TOKEN, SECONDS, bearer, fresh_key, problem

if TYPE_CHECKING:
    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World

BULK = "/api/admin/credits/bulk-refresh"
MANUAL = "/api/reset/manual"
CALLERS = 200
WAITING = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


def single(user: str) -> str:
    return f"/api/admin/users/{user}/refresh-credits"


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client()


def runs_of(world: World, key: str) -> list[dict[str, Any]]:
    return world.rows("SELECT * FROM credit_refresh_runs WHERE idempotency_key = %s", key)


# --- at once


async def _ask_until_answered(client: httpx.AsyncClient, url: str, body: dict[str, Any], key: str) -> httpx.Response:
    """As a client should: after a 409 that says when, and after a connection that broke, again."""
    while True:
        try:
            answer = await client.post(url, json=body, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            continue
        if answer.status_code != 409:
            return answer
        problem(answer, 409, "in-progress")
        await asyncio.sleep(float(answer.headers["retry-after"]))


async def _ask_at_once(base: str, url: str, body: dict[str, Any], key: str) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=CALLERS)
    headers = bearer(ADMIN_TOKEN)
    async with httpx.AsyncClient(
        base_url=base, headers=headers, limits=limits, timeout=2 * SECONDS, trust_env=False
    ) as client:
        return await asyncio.gather(*(_ask_until_answered(client, url, body, key) for _ in range(CALLERS)))


def test_two_hundred_at_once_make_one_run_and_get_one_answer(deployment: Deployment, world: World) -> None:
    world.users(300)
    body = {"all": True, "reason": "two hundred"}
    answers = asyncio.run(_ask_at_once(deployment.api.url, BULK, body, "two-hundred"))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) <= 1
    (run,) = runs_of(world, "two-hundred")
    assert run["users_selected"] == answers[0].json()["usersSelected"] == 300
    assert world.value(
        "SELECT sum(cardinality(user_ids)) FROM credit_refresh_batches WHERE run_id = %s", run["id"]
    ) == (300)


def test_two_hundred_at_once_refresh_one_user_once(deployment: Deployment, world: World) -> None:
    user_id = world.user("popular")
    body = {"reason": "two hundred", "force": True}
    answers = asyncio.run(_ask_at_once(deployment.api.url, single("popular"), body, "popular-once"))
    assert {(answer.status_code, answer.json()["outcome"]) for answer in answers} == {(200, "refreshed")}
    assert len({answer.content for answer in answers}) == 1
    assert [(row["status"], row["credits_added"]) for row in world.history(user_id)] == [("refreshed", 600)]
    assert world.see(user_id)["credit_balance"] == 1_000


# --- the key


def test_bulk_and_run_actions_need_a_key(client: httpx.Client, world: World) -> None:
    world.user("keyless")
    run_id = world.scan().run_id
    for url, body in [
        (BULK, {"all": True}), (f"/api/admin/runs/{run_id}/apply", {}), (f"/api/admin/runs/{run_id}/rollback", {}),
        (f"/api/admin/runs/{run_id}/retry", {}),
    ]:  # fmt: skip
        said = problem(client.post(url, json=body), 400, "idempotency-key-missing")
        assert "Idempotency-Key" in said["detail"]


@pytest.mark.parametrize("key", [b"", b"a b", b"k" * 256, "schlüssel".encode()])
def test_a_key_has_to_be_one(client: httpx.Client, world: World, key: bytes) -> None:
    name = f"whoever-{key[:3].hex()}-{len(key)}"
    user_id = world.user(name)
    answer = client.post(single(quote(name)), json={}, headers={b"Idempotency-Key": key})
    said = problem(answer, 422, "invalid-request")
    assert said["errors"][0]["field"] == "header.Idempotency-Key"
    assert world.history(user_id) == []


def test_a_key_is_for_one_content(client: httpx.Client, world: World) -> None:
    world.user("first")
    world.user("second")
    first = client.post(BULK, json={"userIds": ["first"], "reason": "a"}, headers={"Idempotency-Key": "one-content"})
    assert first.status_code == 202
    others: list[tuple[str, dict[str, Any]]] = [
        (BULK, {"userIds": ["second"], "reason": "a"}),
        (BULK, {"userIds": ["first", "second"], "reason": "a"}),
        (BULK, {"userIds": ["first"], "reason": "b"}),
        (BULK, {"userIds": ["first"], "reason": "a", "dryRun": True}),
        (BULK, {"userIds": ["first"], "reason": "a", "force": True}),
        (BULK, {"userIds": ["first"], "reason": "a", "force": True, "amount": 7}),
        (single("first"), {"reason": "a"}),
        (MANUAL, {"reason": "a"}),
        (f"/api/admin/runs/{first.json()['runId']}/rollback", {"reason": "a"}),
    ]
    for url, body in others:
        said = problem(
            client.post(url, json=body, headers={"Idempotency-Key": "one-content"}), 422, "idempotency-key-reused"
        )
        assert first.json()["runId"] in said["detail"]
    # In another order, and written otherwise, it is the same content.
    body = {"user_ids": ["first"], "reason": "a", "force": False, "dry_run": False, "amount": None}
    again = client.post(BULK, json=body, headers={"Idempotency-Key": "one-content"})
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
    assert len(runs_of(world, "one-content")) == 1


def test_the_first_answer_outlives_what_changes(client: httpx.Client, deployment: Deployment, world: World) -> None:
    """The user spends, is held and is deleted, the service is paused: the answer to the request stays."""
    user_id = world.user("spender", credit_balance=400)
    body = {"reason": "goodwill"}
    first = client.post(single("spender"), json=body, headers={"Idempotency-Key": "spender-1"})
    assert (first.status_code, first.json()["balanceAfter"]) == (200, 1_000)
    assert "idempotency-replayed" not in first.headers

    def again() -> None:
        answer = client.post(single("spender"), json=body, headers={"Idempotency-Key": "spender-1"})
        assert (answer.status_code, answer.content) == (200, first.content)
        assert answer.headers["idempotency-replayed"] == "true"

    again()
    world.sql.execute("UPDATE users SET credit_balance = 3, credit_refresh_hold = true WHERE id = %s", (user_id,))
    again()
    world.sql.execute("UPDATE settings SET enabled = false")
    again()
    deployment.rest()
    again()
    world.sql.execute("DELETE FROM users WHERE id = %s", (user_id,))
    again()
    other = client.post(single("spender"), json={"reason": "other"}, headers={"Idempotency-Key": "spender-1"})
    problem(other, 422, "idempotency-key-reused")
    assert [row["credits_added"] for row in world.history(user_id)] == [600]


def test_without_a_key_each_request_is_one_of_its_own(client: httpx.Client, world: World) -> None:
    user_id = world.user("twice")
    for _ in range(2):
        assert client.post(single("twice"), json={"force": True}).json()["outcome"] == "refreshed"
    assert len(world.history(user_id)) == 2


def test_a_refusal_is_no_answer_to_keep(client: httpx.Client, world: World) -> None:
    """Nothing was done, so the same request may succeed later."""
    world.user("patient", credit_refresh_hold=True)
    for _ in range(2):
        problem(client.post(single("patient"), json={}, headers={"Idempotency-Key": "patient-1"}), 409, "not-granted")
    world.sql.execute("UPDATE users SET credit_refresh_hold = false WHERE external_id = 'patient'")
    answer = client.post(single("patient"), json={}, headers={"Idempotency-Key": "patient-1"})
    assert answer.json()["outcome"] == "refreshed"


def test_a_reset_for_nobody_keeps_its_answer(client: httpx.Client, world: World) -> None:
    first = client.post(MANUAL, json={}, headers={"Idempotency-Key": "reset-1"})
    assert (first.status_code, first.json()["resetCount"]) == (200, 0)
    user_id = world.user("late")
    again = client.post(MANUAL, json={}, headers={"Idempotency-Key": "reset-1"})
    assert again.content == first.content
    assert world.history(user_id) == []
    other = client.post(MANUAL, json={}, headers=fresh_key())
    assert other.json()["resetCount"] == 1


# --- the server dies


def test_a_bulk_answer_is_stored_with_its_run(deployment: Deployment, client: httpx.Client, world: World) -> None:
    """Killed after the run's commit and before the answer: here it waits for a broker that does not answer."""
    for number in range(150):
        world.user(f"killed-{number}")
    api = deployment.launcher.api(deployment.env)
    body, key = {"all": True, "reason": "killed"}, {"Idempotency-Key": "killed-bulk"}
    deployment.redis.kill(signal.SIGSTOP)
    try:
        failed = _ask_in_background(api.url, BULK, body, key)
        world.until(lambda: bool(runs_of(world, "killed-bulk")), "the run is committed")
        api.kill()
    finally:
        deployment.redis.kill(signal.SIGCONT)
    assert failed() is not None
    (run,) = runs_of(world, "killed-bulk")
    # One transaction wrote the answer, the run and its batches, which nobody has touched since.
    assert run["metadata"]["answer"]["runId"] == str(run["id"])
    written = (
        "SELECT r.xmin::text AS run, array_agg(DISTINCT b.xmin::text) AS batches FROM credit_refresh_runs AS r"
        " JOIN credit_refresh_batches AS b ON b.run_id = r.id WHERE r.id = %s GROUP BY r.xmin::text"
    )
    row = world.row(written, run["id"])
    assert row["batches"] == [row["run"]]

    answer = client.post(BULK, json=body, headers=key)
    assert (answer.status_code, answer.headers["idempotency-replayed"]) == (202, "true")
    assert (answer.json()["runId"], answer.json()["usersSelected"]) == (str(run["id"]), 150)
    assert len(runs_of(world, "killed-bulk")) == 1
    deployment.start_worker()  # whose first upkeep publishes what the dead server did not
    ended = deployment.ended(str(run["id"]))
    assert (ended["status"], ended["users_refreshed"]) == ("succeeded", 150)


def test_a_single_refresh_is_finished_by_whoever_asks_again(
    deployment: Deployment, client: httpx.Client, world: World
) -> None:
    """Killed after the run's commit and before the grant."""
    user_id = world.user("interrupted")
    api = deployment.launcher.api(deployment.env)
    body, key = {"reason": "killed"}, {"Idempotency-Key": "killed-single"}
    with world.host() as host:
        host.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (user_id,))
        failed = _ask_in_background(api.url, single("interrupted"), body, key)
        world.until(lambda: bool(runs_of(world, "killed-single")), "the run is committed")
        api.kill()
        assert failed() is not None
        # Its statement does not see that the client is gone, and would go on with the lock.
        world.until(lambda: world.value(WAITING) == 0, "its statement has given up")
    assert world.history(user_id) == []
    answer = _ask_again(client, single("interrupted"), body, key)
    assert (answer.status_code, answer.json()["outcome"], answer.json()["creditsAdded"]) == (200, "refreshed", 600)
    assert client.post(single("interrupted"), json=body, headers=key).content == answer.content
    assert [row["credits_added"] for row in world.history(user_id)] == [600]
    assert [run["status"] for run in runs_of(world, "killed-single")] == ["succeeded"]


def test_a_single_refresh_that_was_granted_is_not_granted_again(
    deployment: Deployment, client: httpx.Client, world: World
) -> None:
    """Killed after the grant and before the answer was kept: somebody has the run's row locked."""
    user_id = world.user("granted")
    api = deployment.launcher.api(deployment.env)
    body, key = {"reason": "killed"}, {"Idempotency-Key": "killed-granted"}
    with world.host() as host, world.host() as other:
        host.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (user_id,))
        failed = _ask_in_background(api.url, single("granted"), body, key)
        world.until(lambda: bool(runs_of(world, "killed-granted")), "the run is committed")
        other.execute("SELECT FROM credit_refresh_runs WHERE idempotency_key = 'killed-granted' FOR UPDATE")
        host.rollback()
        world.until(lambda: bool(world.history(user_id)), "the user is granted")
        api.kill()
        assert failed() is not None
    (run,) = runs_of(world, "killed-granted")
    assert "answer" not in run["metadata"]
    answer = _ask_again(client, single("granted"), body, key)
    assert (answer.status_code, answer.json()["outcome"], answer.json()["creditsAdded"]) == (200, "refreshed", 600)
    assert [row["credits_added"] for row in world.history(user_id)] == [600]


def test_while_the_first_request_is_open_the_second_is_told_so(
    deployment: Deployment, client: httpx.Client, world: World
) -> None:
    user_id = world.user("locked-first")
    body, key = {"reason": "both"}, {"Idempotency-Key": "both-1"}
    with world.host() as host:
        host.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (user_id,))
        first = _ask_in_background(deployment.api.url, single("locked-first"), body, key)
        world.until(lambda: bool(runs_of(world, "both-1")), "the run is committed")
        answer = client.post(single("locked-first"), json=body, headers=key)
        said = problem(answer, 409, "in-progress")
        assert "both-1" in said["detail"]
        assert int(answer.headers["retry-after"]) >= 1
        host.rollback()
    assert first() is None
    answer = client.post(single("locked-first"), json=body, headers=key)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "refreshed")
    assert len(world.history(user_id)) == 1


def _ask_again(client: httpx.Client, url: str, body: dict[str, Any], key: dict[str, str]) -> httpx.Response:
    """Until there is an answer: the dead server's session ends when PostgreSQL notices."""
    answer = client.post(url, json=body, headers=key)
    while answer.status_code == 409:
        problem(answer, 409, "in-progress")
        time.sleep(float(answer.headers["retry-after"]) / 5)
        answer = client.post(url, json=body, headers=key)
    return answer


def _ask_in_background(base: str, url: str, body: dict[str, Any], key: dict[str, str]) -> Any:
    """Ask in a thread; what is returned waits for it, and returns the error that the client got, if any."""
    errors: list[Exception] = []

    def ask() -> None:
        try:
            httpx.post(
                f"{base}{url}", json=body, headers={**bearer(ADMIN_TOKEN), **key}, timeout=SECONDS, trust_env=False
            )
        except httpx.HTTPError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()

    def error() -> Exception | None:
        thread.join(SECONDS)
        return errors[0] if errors else None

    return error
