"""`credits db grants`: what each role can do with the SQL that is printed, connected as it, and what it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.rows import dict_row

from tests import roles
from tests.integration.command import refused
from tests.integration.ledger import check_ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refresh.grants import Kind
    from tests.integration.command import Cli
    from tests.integration.world import World

LEDGERS = ["credit_refresh_histories", "credit_audit_logs"]
OTHERS = [
    "credit_refresh_runs", "credit_refresh_batches", "settings", "plans", "timezones", "alembic_version", "api_keys",
]  # fmt: skip
EVERYBODYS_DDL = [
    "CREATE TABLE credits.mine ()", "CREATE FUNCTION credits.mine() RETURNS integer LANGUAGE sql RETURN 1",
    "ALTER TABLE credits.users ADD COLUMN mine text", "ALTER TABLE credits.users DISABLE TRIGGER ALL",
    "ALTER TABLE credits.credit_audit_logs DISABLE TRIGGER ALL", "DROP TABLE credits.credit_audit_logs",
    "DROP TRIGGER audit_hold ON credits.users", "DROP SCHEMA credits CASCADE", "CREATE SCHEMA mine",
    "ALTER FUNCTION credits.ensure_partitions(timestamptz, integer) SECURITY INVOKER",
    "CREATE OR REPLACE FUNCTION credits.audit_hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
    "SET session_replication_role = replica",
]  # fmt: skip
WRITES = [
    "INSERT INTO {table} DEFAULT VALUES", "UPDATE {table} SET {column} = {column}",
    "DELETE FROM {table}", "TRUNCATE {table}", "LOCK TABLE {table} IN EXCLUSIVE MODE",
]  # fmt: skip
COLUMNS = {
    "credit_refresh_histories": "credits_added", "credit_audit_logs": "credits", "credit_refresh_runs": "reason",
    "credit_refresh_batches": "error", "settings": "enabled", "plans": "amount", "timezones": "name",
    "alembic_version": "version_num", "api_keys": "name",
}  # fmt: skip
ENSURE = "SELECT credits.ensure_partitions(now(), 12)"

Connection = psycopg.Connection[dict[str, Any]]


def connected(world: World, role: str) -> Connection:
    return psycopg.connect(
        world.sql.info.dsn, user=role, autocommit=True, row_factory=dict_row, options="-c search_path=credits"
    )


@pytest.fixture
def host(world: World) -> Iterator[Connection]:
    with roles.made(world.sql, "host") as role, connected(world, role) as connection:
        yield connection


def denied(connection: Connection, statement: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
        connection.execute(statement.encode())


def writes(tables: list[str]) -> list[str]:
    return [text.format(table=f"credits.{table}", column=COLUMNS[table]) for table in tables for text in WRITES]


# --- the host --------------------------------------------------------------------------------------------------------


def test_a_host_reads_spends_inserts_and_holds(world: World, host: Connection) -> None:
    ada = world.user()
    host.execute(
        "UPDATE users SET credit_balance = credit_balance - 7 WHERE external_id = 'ada' AND credit_balance >= 7"
    )
    said = host.execute("SELECT refresh_credits_if_due('ada') AS said").fetchone()
    assert said is not None
    assert (said["said"]["refreshed"], said["said"]["creditBalance"]) == (True, 1_000)
    host.execute("UPDATE users SET credit_refresh_hold = true, hold_reason = 'chargeback' WHERE external_id = 'ada'")
    host.execute("UPDATE users SET credit_refresh_hold = false WHERE external_id = 'ada'")

    host.execute("INSERT INTO users (external_id, plan_code) VALUES ('bob', 'pro')")
    host.execute(
        "INSERT INTO users (external_id, plan_code, email) VALUES ('bob', 'pro', 'bob@example.com')"
        " ON CONFLICT (external_id) DO UPDATE SET email = excluded.email"
    )
    host.execute(
        "UPDATE users SET plan_code = 'free', timezone = 'Europe/Berlin', credit_refresh_day = 31,"
        " custom_credit_amount = 5000, active = true, updated_at = now() WHERE external_id = 'bob'"
    )
    host.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at, credit_refresh_hold, hold_reason)"
        " VALUES ('eve', 'free', 5, now() + interval '3 days', true, 'new')"
    )
    assert host.execute("SELECT refresh_due(10) AS said").fetchone() is not None
    shown = host.execute("SELECT external_id, credit_balance FROM user_credits_now ORDER BY external_id").fetchall()
    assert [tuple(row.values()) for row in shown] == [("ada", 1_000), ("bob", 20_000), ("eve", 5)]
    assert len(host.execute("SELECT FROM credit_refresh_histories").fetchall()) == 2
    assert host.execute("SELECT FROM credit_refresh_runs").fetchall() == []

    audit = world.rows("SELECT actor, action FROM credit_audit_logs WHERE user_id IS NOT NULL ORDER BY occurred_at, id")
    assert {row["actor"] for row in audit} == {host.info.user}
    assert [row["action"] for row in audit] == ["refreshed", "hold_set", "hold_released", "refreshed", "hold_set"]
    users = {row["external_id"]: row["id"] for row in world.rows("SELECT external_id, id FROM users")}
    assert users["ada"] == ada
    check_ledger(world, {ada: 393, users["bob"]: 0, users["eve"]: 5})


def test_a_spend_that_refreshes_first_works_for_a_host(world: World, cli: Cli, host: Connection) -> None:
    ada = world.user()
    cli.says("db", "triggers", "on")
    host.execute("UPDATE users SET credit_balance = credit_balance - 100 WHERE external_id = 'ada'")
    assert world.see(ada)["credit_balance"] == 900
    assert [row["source"] for row in world.history(ada)] == ["trigger"]


@pytest.mark.parametrize("statement", [*writes([*LEDGERS, *OTHERS]), *EVERYBODYS_DDL])
def test_a_host_can_do_nothing_else(host: Connection, statement: str) -> None:
    denied(host, statement)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT FROM credit_audit_logs", "SELECT FROM credit_refresh_batches", "SELECT FROM settings",
        "SELECT FROM api_keys", "SELECT FROM credit_audit_logs_default",
        "INSERT INTO credit_refresh_histories_default SELECT",
        "UPDATE users SET next_refresh_at = now() - interval '1 year'", "UPDATE users SET held_window = NULL",
        "UPDATE users SET refresh_shortfall = 0", "UPDATE users SET external_id = 'eve'", "UPDATE users SET id = 7",
        "INSERT INTO users (external_id, credit_balance, held_window) VALUES ('x', 0, '1000-01-01 00:00+00')",
        "DELETE FROM users", "TRUNCATE users", "LOCK TABLE users IN ACCESS EXCLUSIVE MODE", ENSURE,
        "SELECT refresh_user(1, 'run', 'root')", "SELECT grant_window(u, 'run', 'root') FROM users AS u",
    ],
)  # fmt: skip
def test_a_host_reads_and_writes_no_more_than_it_needs(host: Connection, statement: str) -> None:
    denied(host, statement)


def test_nothing_that_a_host_makes_of_its_own_misleads_our_functions(world: World, host: Connection) -> None:
    """Their search_path is fixed: tables of the caller's own, found first in the session's path, are not asked."""
    ada = world.user(due_in="-1 hour")
    host.execute("SET search_path = pg_temp, credits")
    host.execute("CREATE TEMPORARY TABLE plans AS SELECT * FROM credits.plans")
    host.execute("UPDATE pg_temp.plans SET amount = 1000000")
    host.execute("CREATE TEMPORARY TABLE settings AS SELECT true AS enabled, false AS dry_run")
    host.execute("CREATE TEMPORARY TABLE credit_audit_logs (actor text, action text)")
    host.execute("CREATE FUNCTION pg_temp.now() RETURNS timestamptz LANGUAGE sql RETURN '2099-01-01'::timestamptz")
    host.execute("SELECT credits.refresh_credits_if_due('ada')")
    assert world.see(ada)["credit_balance"] == 1_000
    assert [row["action"] for row in world.audit(ada)] == ["refreshed"]


# --- the workers -----------------------------------------------------------------------------------------------------

WORKER_MAY = {
    *(f"{verb} credits.credit_refresh_{table}" for table in ("runs", "batches") for verb in ("INSERT INTO", "UPDATE")),
    "LOCK TABLE credits.credit_refresh_runs", "LOCK TABLE credits.credit_refresh_batches",
    "LOCK TABLE credits.credit_refresh_histories", "DELETE FROM credits.credit_refresh_batches",
    "INSERT INTO credits.credit_refresh_histories", "DELETE FROM credits.credit_refresh_histories",
    "INSERT INTO credits.credit_audit_logs",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["worker", "api", "read"])
def test_workers_the_api_and_readers_can_do_no_more_than_they_need(world: World, kind: Kind) -> None:
    may = WORKER_MAY if kind != "read" else set()
    with roles.made(world.sql, kind) as role, connected(world, role) as connection:
        for statement in [*writes([*LEDGERS, *OTHERS]), *EVERYBODYS_DDL]:
            if not any(statement.startswith(right) for right in may):
                denied(connection, statement)
        denied(connection, "UPDATE users SET external_id = 'eve'")
        denied(connection, "INSERT INTO users (external_id, credit_balance) VALUES ('eve', 0)")
        denied(connection, "DELETE FROM users")
        if kind != "api":
            denied(connection, "SELECT secret_hash FROM api_keys" if kind == "read" else "SELECT FROM api_keys")
        denied(connection, "SELECT refresh_due(1)")
        denied(connection, "SELECT refresh_credits_if_due('ada')")
        if kind == "read":
            denied(connection, ENSURE)
            denied(connection, "UPDATE users SET credit_balance = 0")
            denied(connection, "SELECT FROM users FOR UPDATE")


def test_a_reader_answers_peoples_questions(world: World, cli: Cli) -> None:
    world.users(3)
    world.refresh()
    run_id = str(world.value("SELECT id FROM credit_refresh_runs"))
    with roles.made(world.sql, "read") as role:
        reader = {"DATABASE_URL": roles.url(cli.environment["DATABASE_URL"], role)}
        for command in (
            ("why", "user-1"), ("history", "user-1"), ("stats",), ("forecast",), ("runs", "list"), ("plans", "list"),
            ("runs", "show", run_id), ("users", "show", "user-1"), ("keys", "list"),
        ):  # fmt: skip
            done = cli(*command, **reader)
            assert done.returncode == 0, done
        refused(cli("hold", "user-1", "--reason", "x", **reader), 1, "permission denied for table users")


# --- the command -----------------------------------------------------------------------------------------------------


def test_what_it_prints_can_be_run_again_and_takes_away_what_was_too_much(world: World, cli: Cli) -> None:
    with roles.made(world.sql, "host") as role:
        world.sql.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA credits TO {role}")
        done = cli("db", "grants", "--host", role, DATABASE_URL="postgresql://nobody@127.0.0.1:1/nothing")
        assert done.returncode == 0, done
        for _ in range(2):
            world.sql.execute(done.stdout.encode())
        with connected(world, role) as host:
            denied(host, "UPDATE settings SET enabled = false")
            host.execute("SELECT FROM users")


def test_in_json_it_says_whose_each_statement_is(cli: Cli) -> None:
    statements = cli.facts("db", "grants", "--host", 'we"ird; DROP TABLE users', "--worker", "w", "--worker", "w")[
        "statements"
    ]
    assert {(part["kind"], part["role"]) for part in statements} == {
        (None, None), (None, 'we"ird; DROP TABLE users'), (None, "w"), ("host", 'we"ird; DROP TABLE users'),
        ("worker", "w"),
    }  # fmt: skip
    assert all('"we""ird; DROP TABLE users"' in part["sql"] for part in statements if part["kind"] == "host")
    assert len({part["sql"] for part in statements}) == len(statements)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a role"), (["--host", ""], "cannot be a role's name"),
        (["--read", "public"], "cannot be a role's name"), (["--worker", "x" * 64], "cannot be a role's name"),
    ],
)  # fmt: skip
def test_without_a_role_it_says_so(cli: Cli, arguments: list[str], says: str) -> None:
    done = cli("db", "grants", *arguments)
    refused(done, 2, says)
