"""What a host calls: refresh_credits_if_due() before a spend, refresh_due() for all, both in its own transaction."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.integration.ledger import behind_the_triggers, check_ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.world import World

DAYS_30 = timedelta(days=30)
IF_DUE = "SELECT refresh_credits_if_due(%s)"
DUE = "SELECT refresh_due(%s)"


@contextmanager
def role(world: World, *rights: str) -> Iterator[str]:
    """A role of the cluster's with these rights alone."""
    name = f"host_of_{world.sql.info.dbname}"
    world.sql.execute(f"CREATE ROLE {name}")
    try:
        for right in ("USAGE ON SCHEMA credits", *rights):
            world.sql.execute(f"GRANT {right} TO {name}")
        yield name
    finally:
        world.sql.execute(f"DROP OWNED BY {name}")
        world.sql.execute(f"DROP ROLE {name}")


# --- refresh_credits_if_due ------------------------------------------------------------------------------------------


def instant(text: str) -> datetime:
    """What JSON says of an instant; PostgreSQL leaves out the zeros at the end of a fraction, Python does not."""
    return datetime.fromisoformat(text)


def test_a_due_user_is_refreshed_there_and_then(world: World) -> None:
    ada = world.user()
    due = world.see(ada)["next_refresh_at"]
    said = world.value(IF_DUE, "ada")
    user = world.see(ada)
    assert instant(said.pop("nextRefreshAt")) == user["next_refresh_at"]
    assert said == {"refreshed": True, "verdict": "due", "creditsAdded": 600, "creditBalance": 1_000}
    assert (user["credit_balance"], user["next_refresh_at"]) == (1_000, due + DAYS_30)
    (history,) = world.history(ada)
    (audit,) = world.audit(ada)
    assert (history["source"], history["run_id"], history["reason"]) == ("function", None, "function")
    assert history["created_at"] == audit["occurred_at"] == user["last_credit_refresh"] == user["updated_at"]
    assert (audit["action"], audit["credits"]) == ("refreshed", 600)
    assert world.refresh().users_selected == 0
    check_ledger(world, {ada: 400})


def test_called_again_it_says_so_and_changes_nothing(world: World) -> None:
    ada = world.user()
    world.value(IF_DUE, "ada")
    before = world.see(ada)
    said = world.value(IF_DUE, "ada")
    assert (said["refreshed"], said["verdict"], said["creditsAdded"]) == (False, "not_due", 0)
    assert (said["creditBalance"], instant(said["nextRefreshAt"])) == (1_000, before["next_refresh_at"])
    assert world.see(ada) == before
    assert len(world.history(ada)) == len(world.audit(ada)) == 1


STANDING = {
    "not_due": "next_refresh_at = now() + interval '1 minute'",
    "inactive": "active = false",
    "no_plan": "plan_code = NULL",
    "unscheduled": "next_refresh_at = NULL",
    "overflow": "credit_balance = -9223372036854775807 - 1, custom_credit_amount = 9223372036854775807",
}


@pytest.mark.parametrize("verdict", STANDING)
def test_who_is_not_due_is_not_touched(world: World, verdict: str) -> None:
    ada = world.user()
    world.sql.execute(f"UPDATE users SET {STANDING[verdict]}")  # noqa: S608
    before = world.see(ada)
    said = world.value(IF_DUE, "ada")
    assert (said["refreshed"], said["verdict"], said["creditsAdded"]) == (False, verdict, 0)
    assert said["creditBalance"] == before["credit_balance"]
    assert world.see(ada) == before
    assert world.history(ada) == world.audit(ada) == []


def test_an_external_plan_is_not_touched(world: World) -> None:
    world.sql.execute("UPDATE plans SET cadence = 'external'")
    ada = world.user()
    assert world.value(IF_DUE, "ada")["verdict"] == "external"
    assert world.history(ada) == []


def test_missed_windows_become_one_grant(world: World) -> None:
    ada = world.user(due_in="-95 days")
    due = world.see(ada)["next_refresh_at"]
    world.value(IF_DUE, "ada")
    (history,) = world.history(ada)
    assert (history["windows_passed"], history["first_missed_at"]) == (3, due)
    assert world.see(ada)["next_refresh_at"] == due + 4 * DAYS_30


def test_a_held_user_is_noted_once(world: World) -> None:
    ada = world.user(credit_refresh_hold=True)
    before = len(world.audit(ada))
    for _ in range(3):
        said = world.value(IF_DUE, "ada")
        assert (said["refreshed"], said["verdict"], said["creditBalance"]) == (False, "held", 400)
    (history,) = world.history(ada)
    assert (history["status"], history["source"], history["credits_added"]) == ("held", "function", 0)
    assert [row["action"] for row in world.audit(ada)[before:]] == ["held"]
    assert world.see(ada)["wake_at"] is None
    assert world.refresh().users_selected == 0
    world.sql.execute("UPDATE users SET credit_refresh_hold = false")
    assert world.value(IF_DUE, "ada")["refreshed"] is True
    check_ledger(world, {ada: 400})


def test_a_hold_that_the_scan_has_noted_is_not_noted_again(world: World) -> None:
    ada = world.user(credit_refresh_hold=True)
    world.refresh()
    world.sql.execute("UPDATE users SET held_window = NULL")
    assert world.value(IF_DUE, "ada")["verdict"] == "held"
    assert [row["status"] for row in world.history(ada)] == ["held"]
    assert world.see(ada)["held_window"] == world.see(ada)["next_refresh_at"]


def test_a_hold_that_has_run_out_is_ended(world: World) -> None:
    ada = world.user(credit_refresh_hold=True, hold_for="-1 minute")
    assert world.value(IF_DUE, "ada")["refreshed"] is True
    user = world.see(ada)
    assert (user["credit_refresh_hold"], user["hold_until"], user["credit_balance"]) == (False, None, 1_000)
    assert {row["action"] for row in world.audit(ada)} >= {"hold_expired", "refreshed"}


def test_an_unknown_user_is_an_error_that_names_them(world: World) -> None:
    with pytest.raises(psycopg.errors.NoDataFound, match="there is no user nobody") as raised:
        world.value(IF_DUE, "nobody")
    assert raised.value.sqlstate == "P0002"


def test_the_hosts_rollback_takes_everything_back(world: World) -> None:
    ada, bob = world.user(), world.user("bob", credit_refresh_hold=True)
    before = [world.see(id_) for id_ in (ada, bob)]
    audited = len(world.audit(bob))
    with world.host() as host:
        for name in ("ada", "bob"):
            host.execute(IF_DUE, (name,))
        host.execute("UPDATE users SET credit_balance = credit_balance - 900 WHERE id = %s", (ada,))
        host.rollback()
    assert [world.see(id_) for id_ in (ada, bob)] == before
    assert world.history(ada) == world.history(bob) == world.audit(ada) == []
    assert len(world.audit(bob)) == audited
    assert world.refresh().users_refreshed == 1


def test_grant_and_spend_are_one_transaction(world: World) -> None:
    ada = world.user()
    with world.host() as host:
        host.execute(IF_DUE, ("ada",))
        spent = host.execute(
            "UPDATE users SET credit_balance = credit_balance - 900 WHERE id = %s AND credit_balance >= 900", (ada,)
        )
        assert spent.rowcount == 1
        host.commit()
    assert world.see(ada)["credit_balance"] == 100
    check_ledger(world, {ada: 400 - 900})


def test_while_nothing_is_granted_it_says_due_and_grants_nothing(world: World) -> None:
    ada, bob = world.user(), world.user("bob", credit_refresh_hold=True)
    for switch in ("enabled = false", "enabled = true, dry_run = true"):
        world.sql.execute(f"UPDATE settings SET {switch}")  # noqa: S608
        said = world.value(IF_DUE, "ada")
        assert (said["refreshed"], said["verdict"], said["creditBalance"]) == (False, "due", 400)
        assert world.value(IF_DUE, "bob")["verdict"] == "held"
    assert world.history(ada) == world.history(bob) == []
    world.sql.execute("UPDATE settings SET dry_run = false")
    assert world.value(IF_DUE, "ada")["refreshed"] is True


# --- who may call, and what the caller's session can do to it -------------------------------------------------------


def test_a_role_needs_no_right_on_our_tables(world: World) -> None:
    ada, bob = world.user(), world.user("bob")
    rights = [f"EXECUTE ON FUNCTION credits.{f}" for f in ("refresh_credits_if_due(text)", "refresh_due(integer)")]
    with role(world, *rights) as name, world.host() as host:
        host.execute(f"SET SESSION AUTHORIZATION {name}")
        host.execute("SELECT credits.refresh_credits_if_due('ada')")
        host.execute("SELECT credits.refresh_due(10)")
        host.commit()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            host.execute("SELECT * FROM credits.users")
        host.rollback()
    assert [world.see(id_)["credit_balance"] for id_ in (ada, bob)] == [1_000, 1_000]
    assert [world.audit(id_)[0]["actor"] for id_ in (ada, bob)] == [name, name]


def test_what_the_functions_are_made_of_is_not_for_everybody(world: World) -> None:
    """They write for whomever they are told, in whatever name."""
    world.user()
    with role(world, "SELECT ON credits.users") as name, world.host() as host:
        host.execute(f"SET SESSION AUTHORIZATION {name}")
        host.commit()
        for call in ("refresh_user(1, 'function', 'me')", "grant_window(u, 'function', 'me')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                host.execute(f"SELECT credits.{call} FROM credits.users AS u")  # noqa: S608
            host.rollback()


def test_a_role_that_may_insert_and_spend_needs_nothing_else(world: World) -> None:
    rights = "INSERT, UPDATE, SELECT ON credits.users"
    with role(world, rights) as name, world.host() as host:
        host.execute(f"SET SESSION AUTHORIZATION {name}")
        host.execute("INSERT INTO credits.users (external_id, plan_code) VALUES ('ada', 'free')")
        host.execute("UPDATE credits.users SET credit_balance = credit_balance - 1, plan_code = 'pro'")
        host.execute("UPDATE credits.users SET credit_refresh_hold = true")
        host.commit()
    assert world.row("SELECT credit_balance, plan_code FROM users") == {"credit_balance": 999, "plan_code": "pro"}
    assert [row["actor"] for row in world.rows("SELECT actor FROM credit_audit_logs")] == [name, name]


def test_the_callers_search_path_and_tables_do_not_matter(world: World) -> None:
    ada = world.user()
    world.sql.execute(
        """
        CREATE SCHEMA evil;
        CREATE TABLE evil.users AS SELECT * FROM credits.users;
        CREATE TABLE evil.settings AS SELECT true AS singleton, false AS enabled, true AS dry_run;
        CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT timestamptz ''2000-01-01''';
        """
    )
    with world.host() as host:
        host.execute("SET search_path = evil, credits, pg_catalog")
        host.execute("CREATE TEMP TABLE users (LIKE credits.users)")
        host.execute("CREATE TEMP TABLE plans (LIKE credits.plans)")
        host.execute("CREATE TEMP TABLE credit_refresh_histories (LIKE credits.credit_refresh_histories)")
        host.execute("SET timezone = 'Pacific/Apia'")
        host.execute("SET datestyle = 'SQL, DMY'")
        host.execute("SET intervalstyle = 'sql_standard'")
        (said,) = host.execute("SELECT credits.refresh_credits_if_due('ada')").fetchone() or (None,)
        assert said is not None
        assert said["refreshed"] is True
        host.execute("INSERT INTO credits.users (external_id, plan_code) VALUES ('bob', 'pro')")
        host.commit()
    assert world.see(ada)["credit_balance"] == 1_000
    assert world.value("SELECT credit_balance FROM users WHERE external_id = 'bob'") == 20_000
    assert len(world.history(ada)) == 1


# --- refresh_due -----------------------------------------------------------------------------------------------------


def test_all_who_are_due_are_refreshed(world: World) -> None:
    world.users(30)
    world.user("held", credit_refresh_hold=True)
    world.user("later", due_in="1 day")
    said = world.value(DUE, 1_000)
    at = said.pop("at")
    granted = world.row(
        "SELECT count(*) AS users, sum(credits_added) AS credits FROM credit_refresh_histories"
        " WHERE status = 'refreshed' AND source = 'function'"
    )
    assert said == {
        "success": True,
        "refreshed": 30,
        "creditsGranted": int(granted["credits"]),
        "held": 1,
        "more": False,
    }
    assert granted["users"] == 30
    assert world.value("SELECT max(created_at) = %s::timestamptz FROM credit_refresh_histories", at)
    again = world.value("SELECT refresh_due()")
    assert (again["refreshed"], again["held"], again["creditsGranted"], again["more"]) == (0, 0, 0, False)
    assert world.refresh().users_selected == 0
    check_ledger(world)


def test_the_most_overdue_come_first_and_no_more_than_asked(world: World) -> None:
    late = [world.user(name, due_in=due) for name, due in (("a", "-1 hour"), ("b", "-3 hours"), ("c", "-2 hours"))]
    refreshed = []
    for more in (True, True, True, False):
        said = world.value(DUE, 1)
        assert said["more"] is more
        refreshed.append([id_ for id_ in late if world.history(id_)])
    a, b, c = late
    assert refreshed == [[b], [b, c], [a, b, c], [a, b, c]]
    assert world.value(DUE, 0)["refreshed"] == 0


def test_users_whom_somebody_else_has_locked_are_left_out(world: World) -> None:
    ada, bob = world.user(due_in="-2 hours"), world.user("bob")
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = credit_balance - 1 WHERE id = %s", (ada,))
        world.sql.execute("SET lock_timeout = '1s'")
        assert world.value(DUE, 1)["refreshed"] == 1
        assert (world.history(ada), len(world.history(bob))) == ([], 1)
        host.commit()
    assert world.value(DUE, 10)["refreshed"] == 1
    check_ledger(world, {ada: 399, bob: 400})


def test_who_can_have_nothing_is_not_looked_at(world: World) -> None:
    world.sql.execute("INSERT INTO plans (code, name, amount, cadence) VALUES ('hooked', 'Hooked', 5, 'external')")
    world.sql.execute("INSERT INTO plans (code, name, amount, active) VALUES ('old', 'Old', 5, false)")
    nobody: dict[str, dict[str, Any]] = {
        "none": {"plan_code": None},
        "external": {"plan_code": "hooked"},
        "retired": {"plan_code": "old"},
        "asleep": {"active": False},
        "unscheduled": {"due_in": None},
    }
    for name, columns in nobody.items():
        world.user(name, **columns)
    said = world.value(DUE, 1)
    assert (said["success"], said["refreshed"], said["more"]) == (True, 0, False)
    assert world.rows("SELECT * FROM credit_refresh_histories") == []


def test_whose_balance_does_not_fit_stops_nobody_and_no_loop(world: World) -> None:
    """A host calls it while there is more; those who stay due for ever must not keep it."""
    lowest, most = -(2**63), 2**63 - 1
    world.user("poor", due_in="-9 hours", credit_balance=lowest, custom_credit_amount=most)
    ada = world.user()
    said = [world.value(DUE, 2) for _ in range(2)]
    assert [(s["refreshed"], s["more"]) for s in said] == [(1, True), (0, False)]
    assert world.value(DUE, 1)["more"] is False
    assert world.see(ada)["credit_balance"] == 1_000


def test_while_paused_it_says_so(world: World) -> None:
    ada, bob = world.user(), world.user("bob", credit_refresh_hold=True)
    for switch in ("enabled = false", "enabled = true, dry_run = true"):
        world.sql.execute(f"UPDATE settings SET {switch}")  # noqa: S608
        said = world.value(DUE, 10)
        assert (said["success"], said["refreshed"], said["held"], said["more"]) == (False, 0, 0, False)
    assert world.history(ada) == world.history(bob) == []


# --- one key ---------------------------------------------------------------------------------------------------------

PATHS = ("scan", "if_due", "due")


def go(world: World, path: str) -> None:
    if path == "scan":
        world.refresh()
    elif path == "due":
        world.value(DUE, 10)
    else:
        world.value(IF_DUE, "ada")


@pytest.mark.parametrize("second", PATHS)
@pytest.mark.parametrize("first", PATHS)
def test_a_window_that_one_has_granted_the_other_does_not_grant(world: World, first: str, second: str) -> None:
    ada = world.user()
    before = world.see(ada)
    go(world, first)
    window_end = world.see(ada)["next_refresh_at"]
    go(world, second)
    assert [row["action"] for row in world.audit(ada)] == ["refreshed"]
    with behind_the_triggers(world):
        world.sql.execute("UPDATE users SET next_refresh_at = %s, credit_balance = 3", (before["next_refresh_at"],))
    go(world, second)
    user = world.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"]) == (3, window_end)
    assert user["last_credit_refresh"] == world.history(ada)[0]["created_at"]
    assert [row["action"] for row in world.audit(ada)] == ["refreshed", "already_granted"]
    moved = world.audit(ada)[-1]
    assert (moved["balance_before"], moved["credits"], moved["balance_after"]) == (3, 0, 3)
    assert len(world.history(ada)) == 1
    assert world.refresh().users_selected == 0


@pytest.mark.parametrize("path", ["if_due", "due"])
def test_refused_by_the_key_a_user_moves_to_the_end_of_what_was_granted(world: World, path: str) -> None:
    """Another plan's window may have been longer than the one that is refused now."""
    world.sql.execute("INSERT INTO plans (code, name, amount, interval_days) VALUES ('yearly', 'Yearly', 12000, 365)")
    ada = world.user(plan_code="yearly")
    before = world.see(ada)
    world.refresh()
    window_end = world.see(ada)["next_refresh_at"]
    assert window_end == before["next_refresh_at"] + timedelta(days=365)
    with behind_the_triggers(world):
        world.sql.execute("UPDATE users SET next_refresh_at = %s, plan_code = 'free'", (before["next_refresh_at"],))
    shown = world.row("SELECT credit_balance, next_refresh_at FROM user_credits_now")
    go(world, path)
    assert world.see(ada)["next_refresh_at"] == window_end == shown["next_refresh_at"]
    assert world.see(ada)["credit_balance"] == 12_000 == shown["credit_balance"]
    check_ledger(world, {ada: 400})
