"""Users whom the host app inserts: granted at once where it names no balance, and left alone where it names one."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.integration.ledger import check_ledger

if TYPE_CHECKING:
    from tests.integration.world import World

DAYS_30 = timedelta(days=30)
INSERT = "INSERT INTO users (external_id, plan_code) VALUES (%s, %s) RETURNING id"


def insert(world: World, external_id: str = "ada", **columns: object) -> int:
    """A user as a host inserts one: the id, the plan, and nothing that it was not told."""
    values = {"external_id": external_id, "plan_code": "free", **columns}
    names = ", ".join(values)
    places = ", ".join(["%s"] * len(values))
    row = world.row(f"INSERT INTO users ({names}) VALUES ({places}) RETURNING id", *values.values())  # noqa: S608
    return int(row["id"])


def plan(world: World, code: str, **columns: object) -> None:
    values = {"code": code, "name": code, "amount": 500, **columns}
    names = ", ".join(values)
    places = ", ".join(["%s"] * len(values))
    world.sql.execute(f"INSERT INTO plans ({names}) VALUES ({places})", tuple(values.values()))  # noqa: S608


def assert_untouched(world: World, user_id: int) -> None:
    assert world.history(user_id) == []
    assert [row["action"] for row in world.audit(user_id)] == []


def assert_no_mark_is_left(world: World) -> None:
    """The insert's two triggers pass a mark; nobody else ever sees it."""
    columns = ("last_credit_refresh", "next_refresh_at", "held_window", "hold_until", "created_at", "updated_at")
    strange = " OR ".join(f"{column} < '1900-01-01'" for column in columns)
    assert world.value(f"SELECT count(*) FROM users WHERE {strange}") == 0  # noqa: S608


def test_an_id_and_a_plan_are_enough(world: World) -> None:
    ada = insert(world)
    user = world.see(ada)
    (history,) = world.history(ada)
    (audit,) = world.audit(ada)
    granted_at = user["created_at"]
    assert (user["credit_balance"], user["last_credit_refresh"]) == (1_000, granted_at)
    assert user["next_refresh_at"] == user["wake_at"] == granted_at + DAYS_30
    assert (history["source"], history["run_id"], history["status"]) == ("insert", None, "refreshed")
    assert (history["window_start"], history["window_end"]) == (granted_at, granted_at + DAYS_30)
    assert (history["old_balance"], history["credits_added"], history["new_balance"]) == (0, 1_000, 1_000)
    assert (history["plan_code"], history["grant_mode"], history["target"]) == ("free", "fill", 1_000)
    assert (history["previous_next_refresh_at"], history["previous_last_refresh"]) == (granted_at, None)
    assert (history["windows_passed"], history["first_missed_at"]) == (0, None)
    assert (audit["action"], audit["run_id"], audit["actor"]) == ("refreshed", None, world.value("SELECT session_user"))
    assert (audit["balance_before"], audit["credits"], audit["balance_after"]) == (0, 1_000, 1_000)
    assert world.refresh().users_selected == 0
    check_ledger(world, {ada: 0})


def test_it_is_the_hosts_transaction(world: World) -> None:
    with world.host() as host:
        (ada,) = host.execute(INSERT, ("ada", "pro")).fetchone() or (0,)
        assert host.execute("SELECT credit_balance FROM users").fetchone() == (20_000,)
        assert world.rows("SELECT * FROM users") == []
        host.rollback()
    assert_untouched(world, ada)
    with world.host() as host:
        host.execute(INSERT, ("ada", "pro"))
        host.execute("UPDATE users SET credit_balance = credit_balance - 1 WHERE external_id = 'ada'")
        host.commit()
    assert world.value("SELECT credit_balance FROM users") == 19_999


def test_returning_everything_is_readable(world: World) -> None:
    """A driver cannot read every instant that PostgreSQL can write, and RETURNING sees the row before the grant."""
    row = world.row("INSERT INTO users (external_id, plan_code) VALUES ('ada', 'free') RETURNING *")
    assert (row["credit_balance"], row["last_credit_refresh"]) == (0, None)
    assert world.see(row["id"])["credit_balance"] == 1_000


def test_a_custom_amount_goes_before_the_plans(world: World) -> None:
    ada = insert(world, custom_credit_amount=7_777)
    assert world.see(ada)["credit_balance"] == 7_777
    assert world.history(ada)[0]["target"] == 7_777


MODES = {"fill": None, "reset": None, "add": None, "rollover": 100}


@pytest.mark.parametrize("grant_mode", MODES)
@pytest.mark.parametrize("cadence", ["rolling", "monthly", "daily"])
def test_every_cadence_and_mode(world: World, cadence: str, grant_mode: str) -> None:
    plan(
        world,
        "any",
        cadence=cadence,
        grant_mode=grant_mode,
        rollover_cap=MODES[grant_mode],
        interval_days=7,
        day_of_month=31,
        time_of_day="04:30",
        timezone="Asia/Kathmandu",
    )
    ada = insert(world, plan_code="any")
    user = world.see(ada)
    (history,) = world.history(ada)
    assert user["credit_balance"] == 500
    assert history["window_start"] == user["created_at"]
    assert history["window_end"] == user["next_refresh_at"]
    local = world.row("SELECT next_refresh_at AT TIME ZONE 'Asia/Kathmandu' AS at FROM users")["at"]
    if cadence == "rolling":
        assert user["next_refresh_at"] == user["created_at"] + timedelta(days=7)
    else:
        assert (local.hour, local.minute) == (4, 30)
        assert user["next_refresh_at"] <= user["created_at"] + timedelta(days=31 if cadence == "monthly" else 1)
    if cadence == "monthly":
        assert (local + timedelta(days=1)).day == 1
    check_ledger(world, {ada: 0})


def test_the_users_own_day_and_zone_count_from_the_first_window_on(world: World) -> None:
    ada = insert(world, credit_refresh_day=15, timezone="Pacific/Auckland")
    local = world.row("SELECT next_refresh_at AT TIME ZONE 'Pacific/Auckland' AS at FROM users")["at"]
    assert (local.day, local.hour, local.minute) == (15, 0, 0)
    assert world.history(ada)[0]["window_end"] == world.see(ada)["next_refresh_at"]


UPSERTS = {
    "DO NOTHING": "DO NOTHING",
    "of another column": "(external_id) DO UPDATE SET email = excluded.email",
    "of the plan": "(external_id) DO UPDATE SET plan_code = excluded.plan_code",
    "of the balance, if there is one": (
        "(external_id) DO UPDATE SET credit_balance = coalesce(excluded.credit_balance, users.credit_balance)"
    ),
    "of everything": (
        "(external_id) DO UPDATE SET email = excluded.email, plan_code = excluded.plan_code,"
        " credit_balance = excluded.credit_balance, held_window = excluded.held_window"
    ),
}


@pytest.mark.parametrize("upsert", UPSERTS)
def test_an_upsert_of_an_existing_user_grants_nothing(world: World, upsert: str) -> None:
    ada = insert(world)
    world.sql.execute("UPDATE users SET credit_balance = 123")
    before = world.see(ada)
    statement = (
        "INSERT INTO users (external_id, plan_code, email) VALUES ('ada', 'pro', 'ada@example.org') ON CONFLICT "
    )
    for _ in range(3):
        world.sql.execute(statement + UPSERTS[upsert])
    after = world.see(ada)
    kept = ("credit_balance", "last_credit_refresh", "next_refresh_at", "held_window", "wake_at")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert len(world.history(ada)) == len(world.audit(ada)) == 1
    assert_no_mark_is_left(world)


def test_an_upsert_of_a_new_user_grants_once(world: World) -> None:
    for _ in range(3):
        world.sql.execute(
            "INSERT INTO users (external_id, plan_code) VALUES ('ada', 'free')"
            " ON CONFLICT (external_id) DO UPDATE SET plan_code = excluded.plan_code"
        )
    ada = world.value("SELECT id FROM users")
    assert world.see(ada)["credit_balance"] == 1_000
    assert len(world.history(ada)) == 1
    check_ledger(world, {ada: 0})


def test_of_two_upserts_at_once_one_grants(world: World) -> None:
    upsert = (
        "INSERT INTO users (external_id, plan_code) VALUES ('ada', 'free')"
        " ON CONFLICT (external_id) DO UPDATE SET plan_code = excluded.plan_code"
    )
    with world.host() as first, world.host() as second, world.calls(lambda: second.execute(upsert).rowcount) as call:
        first.execute(upsert)
        call.start()
        world.until(lambda: world.waiting("host") == 1, "the second upsert waits for the first")
        first.commit()
        assert call.results() == [1]
        second.commit()
    ada = world.value("SELECT id FROM users")
    assert len(world.history(ada)) == 1
    check_ledger(world, {ada: 0})


@pytest.mark.parametrize("balance", [0, 400, -5])
def test_a_user_who_comes_with_a_balance_keeps_it(world: World, balance: int) -> None:
    ada = insert(world, credit_balance=balance)
    user = world.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"], user["last_credit_refresh"]) == (balance, None, None)
    assert_untouched(world, ada)


def test_who_can_have_nothing_yet_has_zero(world: World) -> None:
    plan(world, "hooked", cadence="external")
    plan(world, "old", active=False)
    nobody, external = insert(world, "nobody", plan_code=None), insert(world, "external", plan_code="hooked")
    asleep, retired = insert(world, "asleep", active=False), insert(world, "retired", plan_code="old")
    for user_id in (nobody, external, asleep, retired):
        assert world.see(user_id)["credit_balance"] == 0
        assert_untouched(world, user_id)
    assert [world.see(user_id)["next_refresh_at"] for user_id in (nobody, external)] == [None, None]
    assert world.refresh().users_selected == 0
    # What stood in the way goes, and the first window is granted by the scan.
    world.sql.execute("UPDATE users SET active = true")
    world.sql.execute("UPDATE plans SET active = true")
    assert world.refresh().users_refreshed == 2
    assert [world.see(user_id)["credit_balance"] for user_id in (asleep, retired)] == [1_000, 500]
    assert_no_mark_is_left(world)


def test_a_user_inserted_under_hold_is_noted_and_gets_the_first_window_on_release(world: World) -> None:
    ada = insert(world, credit_refresh_hold=True, hold_reason="sign-up check")
    (history,) = world.history(ada)
    assert (history["status"], history["source"], history["credits_added"]) == ("held", "insert", 0)
    assert [row["action"] for row in world.audit(ada)] == ["hold_set", "held"]
    user = world.see(ada)
    assert (user["credit_balance"], user["held_window"], user["wake_at"]) == (0, user["next_refresh_at"], None)
    assert world.refresh().users_selected == 0
    world.sql.execute("UPDATE users SET credit_refresh_hold = false")
    assert world.refresh().users_refreshed == 1
    assert world.history(ada)[-1]["window_start"] == user["created_at"]
    check_ledger(world, {ada: 0})


@pytest.mark.parametrize("switch", ["enabled = false", "dry_run = true"])
def test_while_nothing_is_granted_the_first_window_waits_for_the_scan(world: World, switch: str) -> None:
    world.sql.execute(f"UPDATE settings SET {switch}")  # noqa: S608
    ada = insert(world)
    user = world.see(ada)
    assert (user["credit_balance"], user["last_credit_refresh"]) == (0, None)
    assert user["next_refresh_at"] == user["created_at"]
    assert_untouched(world, ada)
    world.sql.execute("UPDATE settings SET enabled = true, dry_run = false")
    assert world.refresh().users_refreshed == 1
    assert world.refresh().users_selected == 0
    assert world.see(ada)["credit_balance"] == 1_000
    (history,) = world.history(ada)
    assert (history["source"], history["window_start"]) == ("run", user["created_at"])
    check_ledger(world, {ada: 0})


def test_a_date_that_the_host_names_is_kept(world: World) -> None:
    """One that has passed is granted for the window of now; one ahead is when the first window ends."""
    due, ahead = (world.value("SELECT now() + %s::interval", offset) for offset in ("-40 days", "3 days"))
    ada, bob = insert(world, next_refresh_at=due), insert(world, "bob", next_refresh_at=ahead)
    (history,) = world.history(ada)
    assert (history["window_start"], history["windows_passed"]) == (due + DAYS_30, 1)
    assert world.see(ada)["next_refresh_at"] == due + 2 * DAYS_30
    user = world.see(bob)
    (history,) = world.history(bob)
    granted = (user["credit_balance"], user["next_refresh_at"], user["last_credit_refresh"])
    assert granted == (1_000, ahead, user["created_at"])
    assert (history["source"], history["window_start"], history["window_end"]) == ("insert", user["created_at"], ahead)
    assert (history["previous_next_refresh_at"], history["windows_passed"]) == (ahead, 0)
    assert [row["action"] for row in world.audit(bob)] == ["refreshed"]
    assert world.refresh().users_selected == 0
    assert world.refresh(as_of=ahead, dry_run=True).users_refreshed == 1
    check_ledger(world, {ada: 0, bob: 0})


@pytest.mark.parametrize("cadence", ["rolling", "monthly", "daily"])
def test_a_date_ahead_ends_the_first_window_on_every_grid(world: World, cadence: str) -> None:
    plan(world, "any", cadence=cadence, grant_mode="add", day_of_month=15, time_of_day="04:30")
    ahead = world.value("SELECT now() + interval '100 days'")
    ada = insert(world, plan_code="any", next_refresh_at=ahead)
    (history,) = world.history(ada)
    assert (history["credits_added"], history["window_end"]) == (500, ahead)
    assert (world.see(ada)["credit_balance"], world.see(ada)["next_refresh_at"]) == (500, ahead)
    check_ledger(world, {ada: 0})


def test_an_upsert_with_a_date_ahead_grants_a_new_user_alone(world: World) -> None:
    for days in (10, 20):
        world.sql.execute(
            "INSERT INTO users (external_id, plan_code, next_refresh_at) VALUES ('ada', 'free', now() + %s)"
            " ON CONFLICT (external_id) DO UPDATE SET email = 'ada@example.org'",
            (timedelta(days=days),),
        )
    ada = world.value("SELECT id FROM users")
    (history,) = world.history(ada)
    assert history["window_end"] - history["window_start"] == timedelta(days=10)
    assert world.see(ada)["next_refresh_at"] == history["window_end"]
    assert_no_mark_is_left(world)


def test_a_date_ahead_is_kept_where_the_first_grant_cannot_be(world: World) -> None:
    plan(world, "hooked", cadence="external")
    plan(world, "old", active=False)
    ahead = world.value("SELECT now() + interval '3 days'")
    others: dict[str, dict[str, Any]] = {
        "external": {"plan_code": "hooked"},
        "retired": {"plan_code": "old"},
        "nobody": {"plan_code": None},
        "asleep": {"active": False},
        "held": {"credit_refresh_hold": True},
    }
    for name, columns in others.items():
        user = world.see(insert(world, name, next_refresh_at=ahead, **columns))
        assert (user["credit_balance"], user["next_refresh_at"], user["held_window"]) == (0, ahead, None), name
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == 0
    # Nothing has fallen due, so there is nothing that the release could catch up on.
    world.sql.execute("UPDATE users SET active = true, credit_refresh_hold = false")
    assert world.refresh().users_selected == 0
    assert_no_mark_is_left(world)


@pytest.mark.parametrize("switch", ["enabled = false", "dry_run = true"])
def test_a_date_ahead_gives_way_to_the_grant_on_resume(world: World, switch: str) -> None:
    world.sql.execute(f"UPDATE settings SET {switch}")  # noqa: S608
    ada = insert(world, next_refresh_at=world.value("SELECT now() + interval '3 days'"))
    user = world.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"]) == (0, user["created_at"])
    assert_untouched(world, ada)
    world.sql.execute("UPDATE settings SET enabled = true, dry_run = false")
    assert world.refresh().users_refreshed == 1
    assert world.see(ada)["credit_balance"] == 1_000
    assert world.see(ada)["next_refresh_at"] == user["created_at"] + DAYS_30
    check_ledger(world, {ada: 0})


def test_several_rows_at_once(world: World) -> None:
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance)"
        " VALUES ('ada', 'free', NULL), ('bob', 'pro', 5), ('cyd', 'pro', NULL), ('dan', NULL, NULL)"
    )
    balances = world.rows("SELECT external_id, credit_balance FROM users ORDER BY external_id")
    assert [row["credit_balance"] for row in balances] == [1_000, 5, 20_000, 0]
    sources = world.rows("SELECT source FROM credit_refresh_histories")
    assert [row["source"] for row in sources] == ["insert", "insert"]
    assert_no_mark_is_left(world)
    check_ledger(world)


def test_a_copy_with_empty_balances(world: World) -> None:
    with (
        world.sql.cursor() as cursor,
        cursor.copy("COPY users (external_id, plan_code, credit_balance) FROM STDIN") as c,
    ):
        for n in range(1_000):
            c.write_row((f"user-{n}", "free", None if n % 2 else 7))
    found = world.row(
        "SELECT count(*) FILTER (WHERE credit_balance = 1000) AS granted,"
        " count(*) FILTER (WHERE credit_balance = 7 AND next_refresh_at IS NULL) AS kept FROM users"
    )
    assert found == {"granted": 500, "kept": 500}
    assert world.value("SELECT count(*) FROM credit_refresh_histories WHERE source = 'insert'") == 500
    assert_no_mark_is_left(world)
    check_ledger(world)


def test_a_plain_insert_of_a_taken_id_fails_and_leaves_nothing(world: World) -> None:
    ada = insert(world)
    with pytest.raises(psycopg.errors.UniqueViolation):
        insert(world)
    assert len(world.history(ada)) == len(world.audit(ada)) == 1
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == 1


ASSIGNED: dict[str, dict[str, Any]] = {
    "rolling": {"cadence": "rolling"},
    "monthly": {"cadence": "monthly", "day_of_month": 31},
    "daily": {"cadence": "daily", "time_of_day": "12:00", "timezone": "Europe/Berlin"},
}


@pytest.mark.parametrize("cadence", ASSIGNED)
def test_a_plan_that_comes_later_begins_the_first_window(world: World, cadence: str) -> None:
    plan(world, "later", **ASSIGNED[cadence])
    ada = insert(world, plan_code=None)
    world.sql.execute("UPDATE users SET timezone = 'UTC'")  # no plan, no window: this begins none
    assert world.see(ada)["next_refresh_at"] is None
    assigned_at = world.value("UPDATE users SET plan_code = 'later' RETURNING now()")
    assert world.see(ada)["next_refresh_at"] == assigned_at
    assert world.refresh().users_refreshed == 1
    (history,) = world.history(ada)
    assert history["window_start"] == assigned_at
    assert world.see(ada)["credit_balance"] == 500
    # Taken away and given back, it begins no second one.
    for code in (None, "later", None, "later"):
        world.sql.execute("UPDATE users SET plan_code = %s", (code,))
    assert world.refresh().users_selected == 0
    check_ledger(world, {ada: 0})


def test_a_plan_that_comes_later_from_elsewhere_begins_none(world: World) -> None:
    plan(world, "hooked", cadence="external")
    ada = insert(world, plan_code=None)
    world.sql.execute("UPDATE users SET plan_code = 'hooked'")
    assert world.see(ada)["next_refresh_at"] is None
