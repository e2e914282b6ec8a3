"""`credits runs rollback` as people run it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from tests.integration.command import CREDITS, refused
from tests.integration.rollbacks import opened, pending, refresh, spend, work_off

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.command import Cli
    from tests.integration.world import World

ROLLBACK = ("runs", "rollback", "--reason", "wrong amount")
PUBLISHED = """
SELECT b.id FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE r.kind = 'rollback' AND b.status = 'pending' AND b.published_at IS NOT NULL
"""


def rollbacks(world: World) -> int:
    return int(world.value("SELECT count(*) FROM credit_refresh_runs WHERE kind = 'rollback'"))


def waits(world: World, cli: Cli, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that stays to the end, while a worker does what it publishes."""

    def serve() -> None:
        world.until(lambda: bool(world.rows(PUBLISHED)), "the command publishes")
        world.work([row["id"] for row in world.rows(PUBLISHED)])

    with world.calls(lambda: cli(*arguments, "--wait", "--yes"), serve) as both:
        both.start()
        done, _ = both.results()
    assert isinstance(done, subprocess.CompletedProcess)
    return done


def on_a_terminal(cli: Cli, answer: bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    try:
        return subprocess.run(
            [CREDITS, *arguments],
            stdin=theirs, capture_output=True, text=True, check=False, timeout=60, env=cli.environment,
        )  # fmt: skip
    finally:
        os.close(theirs)
        os.close(ours)


def test_it_shows_asks_and_opens(world: World, cli: Cli) -> None:
    ada, bob = world.user(), world.user("bob")
    run = refresh(world)
    spend(world, ada, 900)
    world.restore("UPDATE users SET next_refresh_at = now() - interval '1 minute' WHERE id = %s", bob)
    world.value("SELECT refresh_credits_if_due('bob')")
    command = (*ROLLBACK, str(run.run_id)[:8])
    done = on_a_terminal(cli, b"n\n", *command)
    assert (done.returncode, rollbacks(world)) == (2, 0), done
    assert "Take 100 credits back from 1 user? [y/N]" in done.stderr
    shown = [" ".join(line.split()) for line in done.stderr.splitlines()]
    for line in (
        f"of run {run.run_id}",
        "users to take back 1",
        "credits to take back 100",
        "spent already (shortfall) 500",
        "refreshed since, left alone 1",
    ):
        assert line in shown
    done = on_a_terminal(cli, b"y\n", *command)
    assert (done.returncode, rollbacks(world)) == (0, 1), done
    assert f"rolls back run {run.run_id}: 2 users." in done.stdout


def test_without_a_terminal_it_wants_yes(world: World, cli: Cli) -> None:
    world.user()
    run = refresh(world)
    refused(cli(*ROLLBACK, str(run.run_id)), 2, "Without a terminal to answer on, say so with --yes")
    assert rollbacks(world) == 0
    facts = cli.facts(*ROLLBACK, str(run.run_id), "--yes", "--reopen")
    assert (facts["kind"], facts["status"], facts["rolledBackRunId"]) == ("rollback", "running", str(run.run_id))
    assert (facts["reopen"], facts["allowNegative"], facts["existing"]) == (True, False, False)
    assert facts["preview"] == {
        "users": 1, "creditsTaken": 600, "shortfall": 0, "refreshedSince": 0, "deleted": 0, "failing": 0,
        "running": False,
    }  # fmt: skip
    row = world.row("SELECT * FROM credit_refresh_runs WHERE kind = 'rollback'")
    assert (row["reason"], row["source"], row["selection"]["reopen"]) == ("wrong amount", "cli", True)
    assert row["requested_by"].startswith("cli:")
    assert world.value("SELECT count(*) FROM credit_refresh_batches WHERE published_at IS NOT NULL") == 1


def test_it_waits_and_tells_what_came_of_it(world: World, cli: Cli) -> None:
    ada, bob = world.user(), world.user("bob")
    run = refresh(world)
    spend(world, ada, 900)
    world.sql.execute("DELETE FROM users WHERE id = %s", (bob,))
    done = waits(world, cli, *ROLLBACK, str(run.run_id))
    assert done.returncode == 0, done
    assert "succeeded" in done.stdout
    assert "100 credits taken back from 1 user, shortfall 500; 1 skipped." in done.stdout


def test_failed_users_are_an_exit_code(world: World, cli: Cli) -> None:
    ada = world.user()
    run = refresh(world)
    spend(world, ada, 900)
    world.sql.execute("ALTER TABLE users ADD CONSTRAINT host CHECK (credit_balance >= 0)")
    done = waits(world, cli, *ROLLBACK, str(run.run_id), "--allow-negative", "--json")
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["status"], facts["usersFailed"]) == (3, "failed", 1)
    assert world.see(ada)["credit_balance"] == 100


def test_a_dry_run_does_not_ask(world: World, cli: Cli) -> None:
    ada = world.user()
    run = refresh(world)
    facts = cli.facts(*ROLLBACK, str(run.run_id), "--dry-run")
    assert (facts["dryRun"], facts["preview"]["users"]) == (True, 1)
    (row,) = world.rows(PUBLISHED)
    world.work([row["id"]])
    assert world.see(ada)["credit_balance"] == 1_000
    shown = cli.facts("runs", "show", facts["runId"])["rollback"]
    assert shown == {"usersReversed": 1, "creditsTakenBack": 600, "shortfall": 0, "usersRefreshedSince": None}


def test_single_users_of_a_file(world: World, cli: Cli, tmp_path: Path) -> None:
    ada, bob = world.user(), world.user("bob")
    run = refresh(world)
    (tmp_path / "ids").write_text("ada\nnobody\n")
    facts = cli.facts(*ROLLBACK, str(run.run_id), "--users", str(tmp_path / "ids"), "--yes")
    assert (facts["usersSelected"], facts["users"]["unknown"]) == (1, 1)
    world.work([row["id"] for row in world.rows(PUBLISHED)])
    assert [world.see(id_)["credit_balance"] for id_ in (ada, bob)] == [400, 1_000]
    assert cli.facts(*ROLLBACK, str(run.run_id), "--yes")["usersSelected"] == 1


def test_one_key_is_one_rollback_and_is_not_asked_twice(world: World, cli: Cli) -> None:
    world.user()
    run = refresh(world)
    command = (*ROLLBACK, str(run.run_id), "--idempotency-key", "k1")
    first = cli.facts(*command, "--yes")
    again = cli.facts(*command)
    assert (again["runId"], again["existing"], again["preview"]) == (first["runId"], True, None)
    refused(cli(*command, "--reopen", "--yes"), 2, "take a new key")
    assert rollbacks(world) == 1


def test_a_running_run_is_cancelled_first(world: World, cli: Cli) -> None:
    for name in ("ada", "bob"):
        world.user(name)
    run = world.scan(batch_size=1)
    world.work(pending(world, run)[:1])
    done = cli(*ROLLBACK, str(run.run_id))
    refused(done, 2, "Cancel the run, and take 600 credits back from 1 user?")
    assert "is still running, and is cancelled first" in done.stderr
    assert world.progress(run).status == "running"
    assert cli.facts(*ROLLBACK, str(run.run_id), "--yes")["preview"]["running"] is True
    assert world.progress(run).status == "cancelled"


def test_what_cannot_be_rolled_back_is_one_line(world: World, cli: Cli, tmp_path: Path) -> None:
    world.user()
    dry = refresh(world, dry_run=True)
    run = refresh(world)
    undone = opened(world, run.run_id, users=["ada"])
    work_off(world, undone)
    (tmp_path / "ids").write_text("ada\n")
    (tmp_path / "strangers").write_text("eve\nmallory\n")
    before = world.rows("SELECT * FROM credit_refresh_runs ORDER BY id")
    nobody = str(uuid4())
    for arguments, says in (
        ([nobody], f"there is no run {nobody}"),
        (["zz"], "is not the id of a run"),
        ([str(undone.run_id)], "a rollback cannot be rolled back"),
        ([str(dry.run_id)], "was a dry run"),
        ([str(run.run_id)], "it has no grant of it that could be taken back"),
        ([str(run.run_id), "--users", str(tmp_path / "ids")], "the users in the file have no grant of it"),
        ([str(run.run_id), "--users", str(tmp_path / "strangers")], "none of the 2 ids"),
        ([str(run.run_id), "--users", str(tmp_path / "none")], "cannot be read"),
    ):
        refused(cli(*ROLLBACK, *arguments, "--yes"), 2, says)
    refused(cli("runs", "rollback", str(run.run_id), "--yes"), 2, "Missing option '--reason'")
    refused(cli("runs", "rollback", str(run.run_id), "--yes", "--reason", " "), 2, "must not be blank")
    refused(cli(*ROLLBACK, str(run.run_id), "--unknown", "x", "--yes"), 2, "--unknown is for --users")
    assert world.rows("SELECT * FROM credit_refresh_runs ORDER BY id") == before


@pytest.mark.parametrize(
    ("variables", "code", "says"),
    [
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, 1, "The broker cannot be reached"),
        ({"CREDIT_REFRESH_ENABLED": "false"}, 2, "CREDIT_REFRESH_ENABLED is false"),
    ],
)
def test_where_it_could_not_be_carried_out_nothing_is_opened(
    world: World, cli: Cli, variables: dict[str, str], code: int, says: str
) -> None:
    world.user()
    run = refresh(world)
    refused(cli(*ROLLBACK, str(run.run_id), "--yes", **variables), code, says)
    assert rollbacks(world) == 0


def test_while_paused_it_says_so(world: World, cli: Cli) -> None:
    world.user()
    run = refresh(world)
    assert cli("pause").returncode == 0
    refused(cli(*ROLLBACK, str(run.run_id), "--yes"), 2, "the service is paused")
    assert rollbacks(world) == 0


def test_its_help_teaches(cli: Cli) -> None:
    told = cli.says("runs", "rollback", "--help")
    for word in ("--reopen", "--allow-negative", "--users", "shortfall", "Examples:", "creditsTakenBack"):
        assert word in told
