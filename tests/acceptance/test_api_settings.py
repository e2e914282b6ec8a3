"""What is particular to a user: the hold, the day, the amount and the time zone, changed under a version."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.http_service import problem

if TYPE_CHECKING:
    import httpx

    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client()


@pytest.fixture(scope="module")
def support(deployment: Deployment) -> httpx.Client:
    return deployment.client(deployment.key("support"))


def url(user: str) -> str:
    return f"/api/admin/users/{user}/refresh-settings"


def put(client: httpx.Client, user: str, *, if_match: str | None = None, **settings: Any) -> httpx.Response:
    return client.put(url(user), json=settings, headers={"If-Match": if_match} if if_match else {})


def test_settings_are_read_and_changed(client: httpx.Client, world: World) -> None:
    user_id = world.user("set", due_in="3 days")
    read = client.get(url("set"))
    assert read.json() == {
        "userId": "set", "creditRefreshHold": False, "holdReason": None, "holdUntil": None, "creditRefreshDay": None,
        "customCreditAmount": None, "timezone": None, "nextRefreshAt": read.json()["nextRefreshAt"],
    }  # fmt: skip
    changed = put(client, "set", creditRefreshDay=31, customCreditAmount=5_000, timezone="Europe/Berlin")
    assert changed.status_code == 200
    user = world.see(user_id)
    assert (user["credit_refresh_day"], user["custom_credit_amount"], user["timezone"]) == (31, 5_000, "Europe/Berlin")
    assert changed.json()["creditRefreshDay"] == 31
    assert changed.headers["etag"] != read.headers["etag"]
    assert client.get(url("set")).headers["etag"] == changed.headers["etag"]
    audit = world.audit(user_id)[-1]
    assert (audit["actor"], audit["action"]) == ("api:admin-token", "settings_changed")
    assert audit["detail"]["customCreditAmount"] == [None, 5_000]
    assert audit["correlation_id"] == changed.headers["x-correlation-id"]
    # Null takes the plan's again; what is not named stays.
    assert put(client, "set", custom_credit_amount=None).json()["creditRefreshDay"] == 31
    assert world.see(user_id)["custom_credit_amount"] is None


def test_nothing_is_changed_under_another_version(client: httpx.Client, world: World) -> None:
    user_id = world.user("versioned")
    read = client.get(url("versioned")).headers["etag"]
    assert put(client, "versioned", if_match=read, creditRefreshDay=5).status_code == 200
    stale = put(client, "versioned", if_match=read, creditRefreshDay=6)
    problem(stale, 412, "precondition-failed")
    assert world.see(user_id)["credit_refresh_day"] == 5
    assert put(client, "versioned", if_match="*", creditRefreshDay=7).status_code == 200
    weak = f"W/{client.get(url('versioned')).headers['etag']}"  # as a proxy that compresses makes it
    assert put(client, "versioned", if_match=weak, creditRefreshDay=7).status_code == 200
    # A grant moves the date and the balance, which nobody sets here: the version stays.
    read = client.get(url("versioned")).headers["etag"]
    client.post("/api/admin/users/versioned/refresh-credits", json={"force": True})
    assert put(client, "versioned", if_match=read, creditRefreshDay=8).status_code == 200


def test_of_many_who_read_the_same_version_one_changes_it(client: httpx.Client, world: World) -> None:
    user_id = world.user("contended")
    read = client.get(url("contended")).headers["etag"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda day: put(client, "contended", if_match=read, creditRefreshDay=day), range(1, 25))
        )
    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 23
    (won,) = [answer for answer in answers if answer.status_code == 200]
    assert world.see(user_id)["credit_refresh_day"] == won.json()["creditRefreshDay"]


def test_support_holds_and_releases(support: httpx.Client, world: World) -> None:
    user_id = world.user("held")
    until = datetime.now(UTC) + timedelta(days=3)
    said = put(support, "held", creditRefreshHold=True, holdReason="chargeback", holdUntil=until.isoformat()).json()
    assert (said["creditRefreshHold"], said["holdReason"]) == (True, "chargeback")
    assert datetime.fromisoformat(said["holdUntil"]) == until
    audit = world.audit(user_id)[-1]
    assert (audit["action"], audit["actor"][:12]) == ("hold_set", "api:key:crs_")
    verdict = support.get("/api/admin/users/held/refresh-verdict").json()
    assert (verdict["verdict"], verdict["hold"]["reason"], verdict["hold"]["by"]) == (
        "held",
        "chargeback",
        audit["actor"],
    )
    # The end alone is changed; the reason stays.
    assert put(support, "held", holdUntil=None).json()["holdReason"] == "chargeback"
    released = put(support, "held", creditRefreshHold=False).json()
    assert (released["creditRefreshHold"], released["holdReason"]) == (False, None)
    assert world.audit(user_id)[-1]["action"] == "hold_released"


@pytest.mark.parametrize("setting", [{"creditRefreshDay": 3}, {"customCreditAmount": 7}, {"timezone": "UTC"}])
def test_the_other_settings_are_not_for_support(support: httpx.Client, world: World, setting: dict[str, Any]) -> None:
    name = f"not-for-support-{next(iter(setting))}"
    user_id = world.user(name)
    said = problem(put(support, name, creditRefreshHold=True, holdReason="x", **setting), 403, "forbidden")
    assert "admin" in said["detail"]
    assert (world.see(user_id)["credit_refresh_hold"], world.audit(user_id)[-1:]) == (False, [])


@pytest.mark.parametrize(
    ("settings", "status", "says"),
    [
        ({"creditRefreshHold": True}, 409, "reason"),
        ({"creditRefreshHold": True, "holdReason": "x", "holdUntil": "2020-01-01T00:00:00Z"}, 409, "passed"),
        ({"timezone": "Europe/Atlantis"}, 409, "Europe/Atlantis"),
        ({"holdReason": "x"}, 409, "would not be held"),
        ({"holdUntil": "2999-01-01T00:00:00Z"}, 409, "would not be held"),
        ({"creditRefreshHold": False, "holdReason": "x"}, 409, "would not be held"),
        ({"creditRefreshHold": None}, 422, "creditRefreshHold"),
        ({"creditRefreshHold": "false"}, 422, "creditRefreshHold"),
        ({"creditRefreshDay": 32}, 422, "creditRefreshDay"),
        ({"creditRefreshDay": "5"}, 422, "creditRefreshDay"),
        ({"customCreditAmount": 0}, 422, "customCreditAmount"),
        ({"holdReason": "\0", "creditRefreshHold": True}, 422, "holdReason"),
        ({"holdUntil": "2026-12-01T00:00:00", "creditRefreshHold": True, "holdReason": "x"}, 422, "holdUntil"),
        ({"holdUntil": 1_800_000_000, "creditRefreshHold": True, "holdReason": "x"}, 422, "holdUntil"),
        ({"holdUntil": "9999-12-31T23:59:59-12:00", "creditRefreshHold": True, "holdReason": "x"}, 422, "holdUntil"),
        ({"creditBalance": 5}, 422, "creditBalance"),
        ({"nextRefreshAt": "2030-01-01T00:00:00Z"}, 422, "nextRefreshAt"),
    ],
)
def test_what_is_refused_changes_nothing(
    client: httpx.Client, world: World, settings: dict[str, Any], status: int, says: str
) -> None:
    name = f"refused-{abs(hash(str(settings)))}"
    user_id = world.user(name)
    before = world.see(user_id)
    said = problem(put(client, name, **settings), status, "refused" if status == 409 else "invalid-request")
    assert says in said["detail"]
    if status == 422:
        assert says in {error["field"] for error in said["errors"]}
    assert world.see(user_id) == before


def test_a_user_whom_nobody_knows(client: httpx.Client, world: World) -> None:  # noqa: ARG001
    problem(client.get(url("nobody")), 404, "not-found")
    problem(put(client, "nobody", creditRefreshDay=1), 404, "not-found")


def test_while_the_host_has_the_user_locked(client: httpx.Client, world: World) -> None:
    """It waits as long as it may without becoming the cause of a deadlock; then whoever asks may ask again."""
    user_id = world.user("locked")
    with world.host() as host:
        host.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (user_id,))
        answer = put(client, "locked", creditRefreshDay=9)
        problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"]
        host.rollback()
    assert put(client, "locked", creditRefreshDay=9).status_code == 200
