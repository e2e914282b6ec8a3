"""`credits runs apply` as people run it."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from cli.apply import _age
from tests.integration.applying import applied, opened, plan, tamper
from tests.integration.command import CREDITS, refused
from tests.integration.ledger import behind_the_triggers

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

APPLY = ("runs", "apply", "--reason", "approved by Kim", "--yes")
PUBLISHED = """
SELECT b.id FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE r.kind = 'apply' AND b.status = 'pending' AND b.published_at IS NOT NULL
"""


def waits(world: World, cli: Cli, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that stays to the end, while a worker does what it publishes."""

    def serve() -> None:
        world.until(lambda: bool(world.rows(PUBLISHED)), "the command publishes")
        world.work([row["id"] for row in world.rows(PUBLISHED)])

    with world.calls(lambda: cli(*arguments), serve) as both:
        both.start()
        done, _ = both.results()
    assert isinstance(done, subprocess.CompletedProcess)
    return done


def test_it_publishes_and_tells_its_run(world: World, cli: Cli) -> None:
    world.users(150)
    dry = plan(world)
    credits_ = world.value("SELECT sum(credits_added) FROM credit_refresh_histories")
    facts = cli.facts(*APPLY, str(dry)[:8])
    assert (facts["kind"], facts["status"], facts["dryRunId"], facts["existing"]) == (
        "apply",
        "running",
        str(dry),
        False,
    )
    assert (facts["usersPlanned"], facts["creditsPlanned"]) == (150, credits_)
    assert (facts["usersApplied"], facts["creditsApplied"], facts["usersDrifted"]) == (0, 0, 0)
    run = world.row("SELECT * FROM credit_refresh_runs WHERE kind = 'apply'")
    assert (str(run["id"]), run["parent_run_id"], run["reason"]) == (facts["runId"], dry, "approved by Kim")
    assert run["requested_by"].startswith("cli:")
    assert world.value("SELECT count(*) FROM credit_refresh_batches WHERE published_at IS NOT NULL AND run_id = %s",
        run["id"]) == 2  # fmt: skip


def test_waiting_ends_with_both_totals(world: World, cli: Cli) -> None:
    ada, _bob, _cyd = world.user("ada"), world.user("bob"), world.user("cyd")
    dry = plan(world)
    world.sql.execute("UPDATE users SET credit_balance = 0 WHERE external_id = 'bob'")
    world.sql.execute("UPDATE users SET active = false WHERE id = %s", (ada,))
    done = waits(world, cli, *APPLY, str(dry), "--wait")
    assert done.returncode == 0, done.stderr
    assert "succeeded in" in done.stdout
    assert "Planned: 3 users, 1,800 credits. Applied: 2 users, 1,600 credits; 1 had drifted.\n" in done.stdout


def test_rows_tampered_with_end_it_with_code_3(world: World, cli: Cli) -> None:
    world.user("ada")
    world.user("bob")
    dry = plan(world)
    tamper(world, "target = 9000 WHERE user_id = (SELECT min(id) FROM users)")
    done = waits(world, cli, *APPLY, str(dry), "--wait", "--json")
    assert done.returncode == 3, done
    facts = json.loads(done.stdout)
    assert (facts["status"], facts["usersTampered"], facts["usersFailed"], facts["usersApplied"]) == (
        "partial",
        1,
        1,
        1,
    )


def test_it_asks_and_without_a_terminal_refuses(world: World, cli: Cli) -> None:
    world.user()
    dry = plan(world)
    world.sql.execute("UPDATE credit_refresh_runs SET created_at = created_at - interval '3 hours 20 minutes'")
    done = cli("runs", "apply", str(dry), "--reason", "r")
    refused(done, 2, "say so with --yes; nothing was changed")
    assert "(3 h 20 min ago) planned 600 credits for 1 user. Apply it?" in done.stderr
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


@pytest.mark.parametrize(("answer", "runs", "code"), [("y\n", 2, 0), ("n\n", 1, 2)])
def test_on_a_terminal_it_asks(world: World, cli: Cli, answer: str, runs: int, code: int) -> None:
    world.user()
    dry = plan(world)
    ours, theirs = os.openpty()
    os.write(ours, answer.encode())
    done = subprocess.run(
        [CREDITS, "runs", "apply", str(dry), "--reason", "r"],
        stdin=theirs, capture_output=True, text=True, check=False, timeout=60, env=cli.environment,
    )  # fmt: skip
    os.close(ours)
    os.close(theirs)
    assert done.returncode == code, done
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == runs


def test_what_cannot_be_applied_is_said_in_a_line(world: World, cli: Cli) -> None:
    world.user()
    dry = plan(world)
    refused(cli(*APPLY, str(uuid4())), 2, "there is no run")
    refused(cli(*APPLY, "nonsense"), 2, "is not the id of a run")
    refused(cli("runs", "apply", str(dry), "--yes"), 2, "--reason")
    first = opened(world, dry)
    refused(cli(*APPLY, str(dry)), 2, f"was applied already, by run {first.run_id} (running)")
    refused(cli(*APPLY, str(first.run_id)), 2, "is no dry run")


def test_verify_finds_nothing_wrong_with_what_an_apply_leaves(world: World, cli: Cli) -> None:
    names = ("ada", "bob", "cyd", "dan", "eve")
    tampered, _, refreshed, restored, _ = (world.user(name) for name in names)
    dry, due = plan(world), world.see(restored)["next_refresh_at"]
    tamper(world, "target = 9000 WHERE user_id = %s", tampered)
    world.sql.execute("UPDATE users SET active = false WHERE external_id = 'bob'")
    world.sql.execute(
        "SELECT refresh_user(id, 'function', 'host') FROM users WHERE id IN (%s, %s)", (refreshed, restored)
    )
    with behind_the_triggers(world):
        world.sql.execute("UPDATE users SET next_refresh_at = %s WHERE id = %s", (due, restored))
    run = applied(world, dry)
    assert (run.users_refreshed, run.users_skipped, run.users_failed) == (1, 3, 1)
    world.refresh()
    assert "nothing found" in cli.says("verify")


def test_with_its_key_it_can_be_repeated(world: World, cli: Cli) -> None:
    world.user()
    dry = plan(world)
    first = cli.facts(*APPLY, str(dry), "--idempotency-key", "k")
    again = cli.facts(*APPLY, str(dry), "--idempotency-key", "k")
    assert (again["runId"], again["existing"]) == (first["runId"], True)
    assert "was opened with this key before" in cli.says(*APPLY, str(dry), "--idempotency-key", "k")
    refused(cli(*APPLY, str(dry), "--idempotency-key", "other"), 2, "was applied already")


def test_while_paused_or_disabled_nothing_is_opened(world: World, cli: Cli) -> None:
    world.user()
    dry = plan(world)
    world.sql.execute("UPDATE settings SET enabled = false")
    refused(cli(*APPLY, str(dry)), 2, "the service is paused")
    refused(cli(*APPLY, str(dry), CREDIT_REFRESH_ENABLED="false"), 2, "CREDIT_REFRESH_ENABLED is false")
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


@pytest.mark.parametrize(
    ("seconds", "age"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3_600, "1 h 0 min"), (90_000, "1 day 1 h"), (200_000, "2 days 7 h")],
)
def test_ages(seconds: float, age: str) -> None:
    assert _age(seconds) == age
