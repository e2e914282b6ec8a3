"""`credits retention`, and what other commands say once months are gone; beat's task."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import celeryconfig
from settings import CHECKOUT
from tests.integration.command import refused
from tests.integration.past import make_partitions, month_of, months, roll_back_later, two_visits

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.command import Cli
    from tests.integration.world import World


def test_it_shows_asks_and_drops(world: World, cli: Cli) -> None:
    two_visits(world, "ada", "left")
    before = months(world)
    assert "No months are set" in cli.says("retention", "--dry-run")
    shown = cli.says("retention", "--months", "13", "--dry-run")
    assert "refresh_histories_y2024m12" in shown
    assert "rows of history and audit before" in shown
    seen = cli.facts("retention", "--months", "13", "--dry-run")
    assert seen["dryRun"]
    assert sum(part["rows"] for part in seen["partitions"]) == 4
    assert seen["batchRows"] == 1
    refused(cli("retention", "--months", "13", "--json"), 2, "nothing was changed")
    assert months(world) == before
    assert world.value("SELECT books_since FROM settings") is None
    said = cli.says("retention", "--months", "13", "--yes")
    assert "were dropped, 1 are still needed and were kept; 0 planned rows and 1 batch rows were deleted." in said
    (row, rows) = world.rows("SELECT actor, detail FROM credit_audit_logs WHERE action = 'retention' ORDER BY id")
    assert row["actor"].startswith("cli")
    assert rows["detail"]["batchRows"] == 1
    assert "Nothing is too old." in cli.says("retention", "--months", "13", "--yes")
    assert cli.facts("retention", "--months", "13")["booksSince"] == seen["booksSince"]
    assert f"whole since {seen['booksSince'][:10]}; nothing found" in cli.says("verify")


def test_the_setting_says_how_many_months(world: World, cli: Cli) -> None:
    two_visits(world, "ada")
    done = cli("retention", "--yes", "--json", CREDIT_REFRESH_RETENTION_MONTHS="14")
    assert done.returncode == 0, done
    assert world.value("SELECT books_since IS NOT NULL FROM settings")
    refused(cli("retention", CREDIT_REFRESH_RETENTION_MONTHS="12"), 1, "CREDIT_REFRESH_RETENTION_MONTHS='12'")
    assert cli("retention", "--months", "12").returncode == 2


def test_somebody_who_reads_is_told_of_in_one_line(world: World, cli: Cli) -> None:
    two_visits(world, "ada")
    before = months(world)
    with world.host() as host:
        host.execute("SELECT count(*) FROM credit_refresh_histories")
        refused(cli("retention", "--months", "13", "--yes", "--json"), 1, "another session holds the lock; try again")
    assert months(world) == before


def test_an_unfinished_run_is_named(world: World, cli: Cli) -> None:
    two_visits(world, "ada")
    run_id = world.value("SELECT id FROM credit_refresh_runs ORDER BY created_at LIMIT 1")
    world.restore("UPDATE credit_refresh_runs SET status = 'running', finished_at = NULL WHERE id = %s", run_id)
    world.restore("UPDATE credit_refresh_runs SET created_at = created_at - interval '200 days' WHERE id = %s", run_id)
    assert f"Run {run_id} has not ended, and keeps older months." in cli.says(
        "retention", "--months", "13", "--dry-run"
    )
    assert cli.facts("retention", "--months", "13", "--dry-run")["heldBackBy"] == str(run_id)


def test_other_commands_say_where_the_books_begin(world: World, cli: Cli) -> None:
    two_visits(world, "ada", "left")
    run_id = str(world.value("SELECT id FROM credit_refresh_runs ORDER BY created_at LIMIT 1"))
    cli.says("retention", "--months", "13", "--yes")
    history = cli("history", "ada")
    assert "The books begin at" in history.stderr
    assert cli.facts("history", "ada")["booksSince"] is not None
    assert len(cli.facts("history", "left")["entries"]) == 1
    assert "retention has dropped rows" in cli("runs", "show", run_id).stderr
    for action in ("rollback", "retry", "apply"):
        done = cli("runs", action, run_id, "--yes", *(() if action == "retry" else ("--reason", "late")))
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr
    done = cli("scan", "--as-of", "2024-01-01T00:00:00Z")
    assert "lies before the books" in done.stderr
    assert cli("why", "ada").returncode == 0


_NIGHT = """
import logs
from tasks.retention import retention
logs.configure("INFO", "json")
retention()
"""


_MESSAGE = """
import sys
import logs
from tasks.batch import batch
logs.configure("INFO", "json")
batch([int(id_) for id_ in sys.argv[1:]])
"""


def night(cli: Cli, tmp_path: Path) -> list[dict[str, object]]:
    return python(cli, tmp_path, _NIGHT)


def python(cli: Cli, tmp_path: Path, script: str, *arguments: str) -> list[dict[str, object]]:
    """What a worker does, and logs."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True, cwd=CHECKOUT,
        env={**cli.environment, "CREDITS_STATE_DIR": str(tmp_path), "CREDIT_REFRESH_RETENTION_MONTHS": "13"},
    )  # fmt: skip
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_the_nightly_task_waits_for_whoever_reads_and_drops_in_another_night(
    world: World, cli: Cli, tmp_path: Path
) -> None:
    two_visits(world, "ada")
    before = months(world)
    with world.host() as host:
        host.execute("SELECT count(*) FROM credit_audit_logs")
        (line,) = night(cli, tmp_path)
    assert line["level"] == "warning"
    assert str(line["event"]).startswith("[CreditRefresh] Retention has to wait for the next night: ")
    assert months(world) == before
    (line,) = night(cli, tmp_path)
    assert (line["level"], line["batchRows"]) == ("info", 1)
    assert "The books begin at" in str(line["event"])
    assert night(cli, tmp_path) == []
    assert (
        world.value("SELECT min(actor) || max(actor) FROM credit_audit_logs WHERE action = 'retention'") == "beatbeat"
    )


@pytest.mark.parametrize("work", ["refresh", "rollback"])
def test_a_batch_waits_for_the_copy_of_a_month_and_it_is_nobodys_attempt(
    world: World, cli: Cli, tmp_path: Path, work: str
) -> None:
    if work == "refresh":
        make_partitions(world)
        world.sql.execute("UPDATE plans SET interval_days = 1000 WHERE code = 'pro'")
        slow = world.user("slow", plan_code="pro", due_in="-500 days")
        world.users(3)
        old = {"window_start": world.see(slow)["next_refresh_at"]}
        run = world.scan()
    else:
        two_visits(world, "ada", "bob")
        old = world.history(1)[0]
        run = roll_back_later(world, old["run_id"])
    ids = world.claim(run)
    with world.host() as retention:
        retention.execute(f"LOCK TABLE ONLY {month_of(old)} IN SHARE MODE")
        (line,) = python(cli, tmp_path, _MESSAGE, *map(str, ids))
        assert line["level"] == "warning"
        assert "A batch waits for a locked table" in str(line["event"])
        assert world.row("SELECT attempts, published_at, error FROM credit_refresh_batches WHERE id = %s", *ids) == {
            "attempts": 0, "published_at": None, "error": None,
        }  # fmt: skip
    assert world.claim() == ids
    world.work(ids)
    assert world.progress(run).status == "succeeded"


def test_beat_asks_for_it_every_night_before_the_audit() -> None:
    retention, verify = (celeryconfig.beat_schedule[name] for name in ("retention", "verify"))
    assert (retention["task"], verify["task"]) == ("tasks.retention", "tasks.verify")
    assert (retention["schedule"].hour, verify["schedule"].hour) == ({2}, {3})
    assert celeryconfig.task_routes["tasks.retention"] == {"queue": "control"}
