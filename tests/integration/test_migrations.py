"""Migrations up, down and against the models; partitions; the append-only audit log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import OperationalError, ProgrammingError

from cli.database import alembic, migrate
from db import ALEMBIC_INI, REVISION, Database, DatabaseError
from refresh.partitions import ensure_partitions
from tests.integration import applying, rollbacks
from tests.integration.test_host_functions import role
from tests.integration.test_isolation import TRIGGER, poison
from tests.integration.test_retry import MEND, retry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster
    from tests.integration.world import World


@pytest.fixture
def empty(cluster: Cluster) -> Iterator[Database]:
    name = cluster.create("template1")
    opened = Database(cluster.url(name), "credits")
    yield opened
    opened.close()
    cluster.drop(name)


def check(database: Database) -> None:
    with alembic(database) as configuration:
        command.check(configuration)


def downgrade(database: Database, to: str = "base") -> None:
    with alembic(database) as configuration:
        command.downgrade(configuration, to)


def objects(database: Database) -> set[str]:
    with database.statements() as connection:
        rows = connection.execute(
            """
            SELECT 'table ' || relname FROM pg_class
            WHERE relnamespace = 'credits'::regnamespace AND relkind IN ('r', 'p')
            UNION ALL
            SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'credits'::regnamespace
            """
        )
        return {name for (name,) in rows}


def test_up_and_down_and_up_again(empty: Database) -> None:
    migrate(empty)
    first = objects(empty)
    downgrade(empty)
    assert objects(empty) == {"table alembic_version"}
    migrate(empty)
    assert objects(empty) == first
    empty.require_migrated()


def test_runs_that_0002_did_not_know_survive_the_way_down_and_up_again(world: World) -> None:
    world.users(6)
    run = rollbacks.refresh(world)
    for name in ("user-1", "user-2"):
        rollbacks.roll_back(world, run, users=[name], reopen=True)
    poison(world, "user-3")
    undone = rollbacks.roll_back(world, run, reopen=True)
    failed = rollbacks.work_off(world, retry(world, undone.run_id))
    world.sql.execute(MEND)
    assert rollbacks.work_off(world, retry(world, failed.run_id)).status == "succeeded"
    planned = applying.plan(world)
    world.sql.execute(TRIGGER)
    applied = applying.applied(world, planned)
    assert (applied.users_refreshed, applied.users_failed) == (5, 1)
    again = retry(world, applied.run_id)
    with pytest.raises(ProgrammingError, match="runs that apply or roll back are still running"):
        downgrade(world.database, "0002")
    migrate(world.database)  # the later migrations' ways down had been gone already
    assert rollbacks.work_off(world, again).status == "failed"

    def runs() -> list[dict[str, object]]:
        return world.rows("SELECT id, kind, work, parent_run_id, subject_run_id FROM credit_refresh_runs ORDER BY id")

    before = runs()
    assert [sum(row["work"] == work for row in before) for work in ("refresh", "rollback", "apply")] == [2, 5, 2]
    for _ in range(2):
        downgrade(world.database, "0002")
        migrate(world.database)
    assert runs() == before
    check(world.database)


def test_the_hosts_right_to_its_view_survives_the_upgrade(world: World) -> None:
    downgrade(world.database, "0002")
    with role(world, "SELECT ON user_credits_now") as host:
        migrate(world.database)
        world.user(credit_balance=0)
        with world.sql.transaction():
            world.sql.execute(f"SET LOCAL ROLE {host}")
            seen = world.row("SELECT credit_balance FROM user_credits_now")
    assert seen == {"credit_balance": 1_000}


def test_the_models_describe_what_the_migrations_make(empty: Database) -> None:
    migrate(empty)
    check(empty)
    with empty.statements() as connection:
        connection.execute("ALTER TABLE users ADD COLUMN stray text")
    with pytest.raises(CommandError, match="stray"):
        check(empty)


def test_migrating_twice_changes_nothing(empty: Database) -> None:
    migrate(empty)
    migrate(empty)
    with empty.statements() as connection:
        assert connection.execute("SELECT count(*) FROM plans").fetchone() == (2,)


def test_the_tiers_of_the_environment_become_plans_once(empty: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDITS_FREE_TIER", "1234")
    migrate(empty)
    with empty.statements() as connection:
        rows = connection.execute("SELECT code, amount, cadence, interval_days, grant_mode FROM plans ORDER BY 1")
        assert rows.fetchall() == [("free", 1_234, "rolling", 30, "fill"), ("pro", 20_000, "rolling", 30, "fill")]


def test_a_schema_of_another_name(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_SCHEMA", "grants")
    name = cluster.create("template1")
    database = Database(cluster.url(name), "grants")
    migrate(database)
    check(database)
    with database.statements() as connection:
        found = connection.execute("SELECT to_regclass('grants.users')::text, to_regclass('credits.users')")
        assert found.fetchone() == ("users", None)
    database.close()
    cluster.drop(name)


def test_a_migration_that_meets_a_lock_gives_up_instead_of_blocking_everybody(world: World) -> None:
    with world.host() as host:
        host.execute("LOCK TABLE users")
        with pytest.raises(OperationalError, match="lock timeout") as caught:
            downgrade(world.database)
    assert isinstance(caught.value.orig, psycopg.errors.LockNotAvailable)


def test_a_database_that_is_not_migrated_is_refused_in_one_line(empty: Database) -> None:
    with pytest.raises(DatabaseError, match=r"run `credits db upgrade` first"):
        empty.require_migrated()


def test_the_code_names_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(Config(ALEMBIC_INI)).get_current_head() == REVISION


def test_a_database_of_another_release_is_refused_in_one_line(world: World) -> None:
    world.sql.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseError, match="at migration 9999, this release needs"):
        world.database.require_migrated()


AUDITED = "INSERT INTO credit_audit_logs (actor, action, occurred_at) VALUES ('test', 'tried', %s)"


@pytest.mark.parametrize("when", ["2026-01-15", "now"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET actor = 'nobody'", "DELETE FROM {}", "TRUNCATE {}"])
@pytest.mark.parametrize("on", ["parent", "partition"])
def test_the_audit_log_is_append_only(world: World, when: str, statement: str, on: str) -> None:
    world.sql.execute(AUDITED, (when,))
    partition = world.value("SELECT tableoid::regclass::text FROM credit_audit_logs")
    assert (partition == "credit_audit_logs_default") == (when != "now")
    table = "credit_audit_logs" if on == "parent" else partition
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        world.sql.execute(statement.format(table))
    assert world.value("SELECT count(*) FROM credit_audit_logs WHERE actor = 'test'") == 1


def test_upkeep_makes_the_partitions_of_the_coming_months_and_protects_them(world: World) -> None:
    with world.database.transaction() as connection:
        assert ensure_partitions(connection) == []  # the migration made them
    gone = world.value("SELECT to_char(now() + interval '3 months', '\"credit_audit_logs_y\"YYYY\"m\"MM')")
    world.sql.execute(f"DROP TABLE {gone}")
    with world.database.transaction() as connection:
        assert ensure_partitions(connection) == [gone]
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        world.sql.execute(f"TRUNCATE {gone}")


@pytest.mark.parametrize("parent", ["credit_refresh_histories", "credit_audit_logs"])
def test_upkeep_notices_whichever_partition_is_missing_and_keeps_out_of_another_upkeeps_way(
    world: World, parent: str
) -> None:
    gone = world.value("SELECT %s || to_char(now() + interval '2 months', '\"_y\"YYYY\"m\"MM')", parent)
    world.sql.execute(f"DROP TABLE {gone}")
    with world.database.transaction() as first, world.host() as other:
        assert ensure_partitions(first) == [gone]
        assert other.execute("SELECT ensure_partitions(now(), 3)").fetchall() == []


def test_a_month_that_has_rows_in_the_default_partition_stays_there(world: World) -> None:
    month = world.value("SELECT to_char(now() + interval '3 months', '\"y\"YYYY\"m\"MM')")
    world.sql.execute(f"DROP TABLE credit_audit_logs_{month}")
    world.sql.execute(AUDITED, (world.value("SELECT now() + interval '3 months'"),))
    with world.database.transaction() as connection:
        assert ensure_partitions(connection) == []


def test_a_window_outside_all_months_is_caught(world: World) -> None:
    ada = world.user()
    world.sql.execute("UPDATE users SET next_refresh_at = '2020-05-05' WHERE id = %s", (ada,))
    as_of = world.value("SELECT '2020-05-06'::timestamptz")
    world.refresh(as_of=as_of)
    assert world.value("SELECT tableoid::regclass::text FROM credit_refresh_histories") == (
        "credit_refresh_histories_default"
    )
