"""The commands as people run them: processes, their answers, their errors and their exit codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.cluster import Cluster
    from tests.integration.command import Cli
    from tests.integration.world import World


def test_a_scan_tells_its_run(world: World, cli: Cli) -> None:
    world.users(150)
    done = cli("scan", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["users_selected"], facts["batches_total"]) == (150, 2)
    run = world.row("SELECT * FROM credit_refresh_runs")
    assert (str(run["id"]), run["source"], run["slot"]) == (facts["run_id"], "cli", None)
    assert run["requested_by"].startswith("cli:")


def test_a_scan_while_paused_says_so_and_resume_ends_that(world: World, cli: Cli) -> None:
    world.users(3)
    assert "Paused" in cli("pause").stdout
    assert "already" in cli("pause").stdout
    assert "paused" in cli("scan").stdout
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0
    assert json.loads(cli("resume", "--json").stdout) == {"enabled": True, "changed": True}
    actions = world.rows("SELECT action FROM credit_audit_logs ORDER BY occurred_at")
    assert [row["action"] for row in actions] == ["paused", "resumed"]


def test_a_scan_while_disabled_says_so(world: World, cli: Cli) -> None:
    done = cli("scan", CREDIT_REFRESH_ENABLED="false")
    assert (done.returncode, done.stdout) == (0, "Nothing was opened: CREDIT_REFRESH_ENABLED is false.\n")
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scan", "--as-of", "tomorrow"], "not an instant such as 2026-12-01T00:00:00Z"),
        (["scan", "--as-of", "2026-12-01T00:00:00"], "names no zone"),
        (["scan", "--as-of", "2999-12-01T00:00:00Z"], "only a dry run may look ahead"),
        (["scam"], "No such command"),
        (["scan", "--dry"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(cli: Cli, arguments: list[str], says: str) -> None:
    refused(cli(*arguments), 2, says)


def test_a_bad_environment_value_is_named(cli: Cli) -> None:
    refused(cli("scan", CREDIT_REFRESH_BATCH_SIZE="many"), 1, "CREDIT_REFRESH_BATCH_SIZE='many'")
    refused(cli("db", "check", DATABASE_SCHEMA="Public"), 1, "DATABASE_SCHEMA='Public'")


def test_a_database_that_does_not_answer(cli: Cli) -> None:
    done = cli("scan", DATABASE_URL="postgresql://app:hunter2@127.0.0.1:1/app")
    refused(done, 1, "The database cannot be reached")
    assert "hunter2" not in done.stderr


def test_a_broker_that_does_not_answer_is_noticed_before_a_run_is_open(world: World, cli: Cli) -> None:
    world.users(3)
    done = cli("scan", REDIS_URL="redis://:hunter2@127.0.0.1:1/0")
    refused(done, 1, "The broker cannot be reached")
    assert "hunter2" not in done.stderr
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0


def test_a_database_that_is_not_migrated(cluster: Cluster, cli: Cli) -> None:
    name = cluster.create("template1")
    url = cluster.url(name)
    refused(cli("scan", DATABASE_URL=url), 1, "run `credits db upgrade` first")
    assert cli("db", "upgrade", DATABASE_URL=url).returncode == 0
    assert cli("db", "check", DATABASE_URL=url).returncode == 0
    assert "0 users due" in cli("scan", DATABASE_URL=url).stdout
    cluster.drop(name)


def test_tables_that_differ_from_the_release_are_reported(world: World, cli: Cli) -> None:
    world.sql.execute("ALTER TABLE plans ADD COLUMN stray text")
    refused(cli("db", "check"), 1, "stray")


def test_help_teaches(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    for word in (
        "scan", "users", "plans", "why", "hold", "release", "demo", "up", "pause", "resume", "db", "Exit codes"
    ):  # fmt: skip
        assert word in done.stdout
