"""`credits refresh USER` as people run it: no broker, no worker."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from refresh import runs
from refresh.at_once import do_at_once
from refresh.selection import Selection
from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

NO_BROKER = "redis://127.0.0.1:1/0"
ASK = ("--reason", "ticket 1234")


@pytest.fixture
def alone(cli: Cli) -> Cli:
    """The command, without a broker that answers."""
    cli.environment["REDIS_URL"] = NO_BROKER
    return cli


def no_run(world: World) -> None:
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0


def test_who_is_due_is_refreshed_there_and_then(world: World, alone: Cli) -> None:
    ada = world.user()
    done = alone("refresh", "ada", *ASK)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.startswith("ada is refreshed with 600 credits (balance 400 before, 1,000 after) for the window")
    run = world.row("SELECT * FROM credit_refresh_runs")
    assert done.stdout.endswith(f" Run {run['id']}.\n")
    assert (run["status"], run["reason"], run["users_refreshed"]) == ("succeeded", "ticket 1234", 1)
    assert run["selection"] == {"due": True, "user": "ada"}
    (history,), (audit,) = world.history(ada), world.audit(ada)
    assert (history["reason"], audit["detail"]) == ("ticket 1234", {"reason": "ticket 1234"})
    assert audit["actor"] == run["requested_by"] != "beat"


def test_json(world: World, alone: Cli) -> None:
    ada = world.user(due_in="3 days")
    facts = alone.facts("refresh", "ada", "--force", "--amount", "500", *ASK)
    run = world.row("SELECT * FROM credit_refresh_runs")
    user = world.see(ada)
    assert user["credit_balance"] == 500
    assert user["next_refresh_at"] == run["as_of"] + timedelta(days=30)
    text = facts.pop("text")
    assert text.startswith("ada is refreshed with 100 credits")
    assert facts == {
        "userId": "ada",
        "runId": str(run["id"]),
        "existing": False,
        "status": "succeeded",
        "dryRun": False,
        "force": True,
        "outcome": "refreshed",
        "creditsAdded": 100,
        "balanceBefore": 400,
        "balanceAfter": 500,
        "amount": 500,
        "windowStart": run["as_of"].isoformat(),
        "windowEnd": user["next_refresh_at"].isoformat(),
        "nextRefreshAt": user["next_refresh_at"].isoformat(),
        "reversed": False,
        "error": None,
    }


@pytest.mark.parametrize(
    ("columns", "arguments", "says"),
    [
        ({"due_in": "3 days"}, [], "ada is not due before .*Nothing was granted: --force refreshes them all the same"),
        ({"due_in": None}, [], "ada has no next_refresh_at.*--force refreshes them all the same"),
        ({"credit_refresh_hold": True}, [], "ada is held.*`credits release ada` ends the hold"),
        ({"credit_refresh_hold": True}, ["--force"], "ada is held.*`credits release ada` ends the hold"),
        ({"active": False}, ["--force"], "ada is inactive.*not even --force"),
        ({"plan_code": None}, ["--force"], "ada has no plan.*give them a plan first"),
        ({"credit_balance": -(2**63)}, [], "do not fit 64 bits.*a smaller --amount may fit"),
    ],
    ids=str,
)
def test_who_cannot_be_refreshed_is_told_why(
    world: World, alone: Cli, columns: dict[str, Any], arguments: list[str], says: str
) -> None:
    ada = world.user(**columns)
    before = world.see(ada)
    done = alone("refresh", "ada", *ASK, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert re.search(says, line), line
    assert world.see(ada) == before
    no_run(world)


def test_a_window_that_was_granted_already_is_refused(world: World, alone: Cli) -> None:
    ada = world.user()
    alone.says("refresh", "ada", *ASK)
    (history,) = world.history(ada)
    world.restore("UPDATE users SET next_refresh_at = %s WHERE id = %s", history["window_start"], ada)
    refused(alone("refresh", "ada", *ASK), 2, "once a scan has moved them on, --force grants a window of its own")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bob", *ASK], "there is no user 'bob'"),
        (["ada"], "Missing option '--reason'"),
        (["ada", "--reason", ""], "must not be blank"),
        (["ada", *ASK, "--keep-window"], "--keep-window is for --force"),
        (["ada", *ASK, "--amount", "0"], "--amount"),
        (["ada", *ASK, "--amount", "1.5"], "--amount"),
        (["ada", *ASK, "--amount", "9223372036854775808"], "--amount"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(world: World, alone: Cli, arguments: list[str], says: str) -> None:
    world.user()
    refused(alone("refresh", *arguments), 2, says)
    no_run(world)


def test_while_paused_or_disabled_it_is_refused(world: World, alone: Cli) -> None:
    world.user()
    refused(alone("refresh", "ada", *ASK, CREDIT_REFRESH_ENABLED="false"), 2, "CREDIT_REFRESH_ENABLED is false")
    world.sql.execute("UPDATE settings SET enabled = false")
    refused(alone("refresh", "ada", *ASK), 2, "nothing was opened: the service is paused")
    no_run(world)


def test_a_dry_run_says_what_it_would_do(world: World, alone: Cli) -> None:
    ada = world.user(due_in="3 days")
    before = world.see(ada)
    facts = alone.facts("refresh", "ada", "--force", "--keep-window", "--dry-run", *ASK)
    assert (facts["outcome"], facts["dryRun"], facts["creditsAdded"], facts["status"]) == (
        "planned", True, 600, "succeeded"
    )  # fmt: skip
    assert facts["text"].startswith("ada would be refreshed with 600 credits")
    assert f"`credits runs apply {facts['runId']}` does it" in facts["text"]
    assert world.see(ada) == before


def test_where_all_runs_are_dry_so_is_this_one(world: World, alone: Cli) -> None:
    ada = world.user()
    world.sql.execute("UPDATE settings SET dry_run = true")
    ask = ("refresh", "ada", *ASK, "--idempotency-key", "k")
    assert "ada would be refreshed" in alone.says(*ask)
    assert "is there already" in alone.says(*ask)
    assert world.see(ada)["credit_balance"] == 400


def test_one_key_is_one_grant(world: World, alone: Cli) -> None:
    ada = world.user(due_in="3 days")
    world.sql.execute("UPDATE plans SET grant_mode = 'add' WHERE code = 'free'")
    ask = ("refresh", "ada", "--force", "--keep-window", *ASK, "--idempotency-key", "k")
    first, again = alone.facts(*ask), alone.facts(*ask)
    assert (first["existing"], again["existing"]) == (False, True)
    assert again["text"].startswith(f"Run {first['runId']} is there already")
    assert again["creditsAdded"] == 1_000
    assert world.see(ada)["credit_balance"] == 1_400
    refused(alone(*ask, "--amount", "5"), 2, f"belongs to run {first['runId']}")
    assert world.see(ada)["credit_balance"] == 1_400


def test_a_user_of_an_unfinished_run_is_refused_with_its_name(world: World, alone: Cli) -> None:
    world.user()
    run = world.scan()
    refused(alone("refresh", "ada", "--force", *ASK), 2, f"wait for run {run.run_id}, or cancel it")


def test_a_host_that_holds_the_user_for_a_moment_is_waited_for(world: World) -> None:
    ada = world.user()
    request = runs.Request("cli", "test", 100, reason="x")
    with world.database.statements() as connection, world.host() as host:
        connection.execute("SET lock_timeout = '100ms'")
        with world.database.transaction() as opening:
            run = runs.open_run(opening, request, Selection(user="ada"))
        assert isinstance(run, runs.Opened)
        host.execute("UPDATE users SET credit_balance = credit_balance - 1 WHERE id = %s", (ada,))
        with world.calls(lambda: do_at_once(connection, run.run_id)) as call:
            call.start()
            world.until(lambda: world.waiting("test") == 1, "it waits")
            host.commit()
            assert call.results() == [None]
    assert world.history(ada)[0]["credits_added"] == 601


def test_a_user_who_stays_locked_is_left_to_the_workers(world: World, alone: Cli) -> None:
    ada = world.user()
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = credit_balance - 1 WHERE id = %s", (ada,))
        facts = alone.facts("refresh", "ada", *ASK)
        host.rollback()
    assert (facts["status"], facts["outcome"], facts["creditsAdded"]) == ("running", None, 0)
    assert "another session has the user locked" in facts["text"]
    assert "is open, and a worker goes on with it" in facts["text"]
    ids = world.claim()
    assert len(ids) == 1
    world.work(ids)
    assert world.see(ada)["credit_balance"] == 1_000
    assert world.value("SELECT status FROM credit_refresh_runs") == "succeeded"


def test_what_the_process_left_is_upkeeps(world: World) -> None:
    """The process died between opening the run and its batch."""
    ada = world.user(due_in="3 days")
    with world.database.transaction() as connection:
        request = runs.Request("cli", "test", 100, reason="x", force=True)
        runs.open_run(connection, request, Selection(user="ada"))
    world.work(world.claim())
    assert world.see(ada)["credit_balance"] == 1_000


def test_a_host_that_refuses_is_exit_code_3(world: World, alone: Cli) -> None:
    ada = world.user()
    world.sql.execute("ALTER TABLE users ADD CONSTRAINT poison CHECK (credit_balance < 500)")
    done = alone("refresh", "ada", *ASK)
    assert done.returncode == 3, done
    assert done.stdout.startswith("ada is not refreshed: ")
    assert "poison" in done.stdout
    assert world.see(ada)["credit_balance"] == 400
    run = world.row("SELECT status, users_failed FROM credit_refresh_runs")
    assert (run["status"], run["users_failed"]) == ("failed", 1)


def test_a_user_of_a_plan_that_is_all_or_nothing(world: World, alone: Cli) -> None:
    ada = world.user()
    world.sql.execute("UPDATE plans SET atomic = true WHERE code = 'free'")
    assert alone.facts("refresh", "ada", *ASK)["outcome"] == "refreshed"
    assert world.see(ada)["credit_balance"] == 1_000


def test_nobody_else_is_touched(world: World, alone: Cli) -> None:
    world.users(5)
    world.user()
    alone.says("refresh", "ada", *ASK)
    assert world.value("SELECT count(*) FROM users WHERE last_credit_refresh IS NOT NULL") == 1


def test_a_connection_that_is_lost_is_an_error(world: World) -> None:
    ada = world.user()
    with world.database.transaction() as connection:
        run = runs.open_run(connection, runs.Request("cli", "test", 100, reason="x"), Selection(user="ada"))
    assert isinstance(run, runs.Opened)
    with psycopg.connect(world.sql.info.dsn, autocommit=True, options="-c search_path=credits") as lost:
        world.sql.execute("SELECT pg_terminate_backend(%s)", (lost.info.backend_pid,))
        with pytest.raises(psycopg.OperationalError):
            do_at_once(lost, run.run_id)
    assert world.see(ada)["credit_balance"] == 400
