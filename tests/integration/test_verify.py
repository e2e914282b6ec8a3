"""`credits verify`: a busy service has no finding, and each planted corruption is reported under its own name."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

import celeryconfig
from refresh import verify
from refresh.verify_kinds import KINDS
from settings import CHECKOUT
from tests.integration.books import LEDGER, age, live, spend

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.command import Cli
    from tests.integration.world import World

HOURLY = verify.Terms(timedelta(hours=1), None)


def found(world: World, terms: verify.Terms = HOURLY) -> list[verify.Finding]:
    findings: list[verify.Finding] = []
    with world.database.transaction() as connection:
        verify.verify(connection, terms, limit=1_000, on_finding=findings.append)
    return findings


def test_a_busy_service_has_no_finding(world: World) -> None:
    live(world)
    statuses = {row["status"] for row in world.rows("SELECT DISTINCT status FROM credit_refresh_histories")}
    assert statuses == {"refreshed", "planned", "held", "skipped", "failed", "reversed"}
    sources = {row["source"] for row in world.rows("SELECT DISTINCT source FROM credit_refresh_histories")}
    assert sources == {"run", "insert", "function"}
    assert [finding.facts() for finding in found(world)] == []


def test_an_import_may_set_balances_and_dates(world: World, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> None:
    world.user("ada")
    world.refresh()
    file = tmp_path_factory.mktemp("import") / "users.csv"
    file.write_text("external_id,credit_balance,last_credit_refresh\nada,5000,2031-01-01T00:00:00Z\n")
    assert cli("users", "import", str(file)).returncode == 0
    assert found(world) == []


# A user with two grants of one run each, one with three by a function, and a run that has been taken back.
def settled(world: World) -> None:
    world.users(10)
    world.sql.execute("INSERT INTO users (external_id, plan_code) VALUES ('fay', 'free')")
    world.refresh()
    for _ in range(2):
        spend(world)
        age(world, "31 days")
        world.sql.execute("SELECT refresh_credits_if_due('fay')")
        world.refresh()
    assert found(world) == []


# Where a corruption strikes. Each may name those above it.
PLACES: dict[str, str] = {}
for name, place in (
    ("USER", "(SELECT id FROM users WHERE external_id = 'user-3')"),
    ("FAY", "(SELECT id FROM users WHERE external_id = 'fay')"),
    ("GRANT", "(SELECT max(id) FROM credit_refresh_histories WHERE user_id = {USER} AND status = 'refreshed')"),
    ("AT", "(SELECT max(created_at) FROM credit_refresh_histories WHERE user_id = {USER})"),
    ("RUN", "(SELECT run_id FROM credit_refresh_histories WHERE id = {GRANT})"),
    ("FIRST_RUN", "(SELECT id FROM credit_refresh_runs ORDER BY created_at LIMIT 1)"),
    (
        "MIDDLE",
        "(SELECT created_at FROM credit_refresh_histories WHERE user_id = {FAY} ORDER BY id OFFSET 1 LIMIT 1)",
    ),
):
    PLACES[name] = place.format_map(PLACES)

COPY_GRANT = """
INSERT INTO credit_refresh_histories (source, user_id, status, window_start, window_end, plan_code, grant_mode, target,
    old_balance, credits_added, new_balance, previous_next_refresh_at, previous_last_refresh, created_at)
SELECT 'function', user_id, status, window_start + interval '<later>', window_end, plan_code, grant_mode, target,
    old_balance, credits_added, new_balance, window_start + interval '<later>', previous_last_refresh, created_at
FROM credit_refresh_histories WHERE id = {GRANT}
"""
COPY_AUDIT = """
INSERT INTO credit_audit_logs (occurred_at, actor, action, user_id, balance_before, balance_after, credits)
SELECT occurred_at, actor, action, user_id, balance_before, balance_after, credits
FROM credit_audit_logs WHERE user_id = {USER} AND occurred_at = {AT} AND action = 'refreshed'
"""
REVERSE = """
INSERT INTO credit_refresh_histories (run_id, user_id, status, window_start, window_end, old_balance, credits_added,
    new_balance)
SELECT {FIRST_RUN}, user_id, 'reversed', window_start, window_end, new_balance, -<taken>, new_balance - <taken>
FROM credit_refresh_histories WHERE id = {GRANT};
INSERT INTO credit_audit_logs (actor, action, user_id, run_id, balance_before, balance_after, credits)
SELECT 'test', 'reversed', user_id, {FIRST_RUN}, new_balance, new_balance - <taken>, -<taken>
FROM credit_refresh_histories WHERE id = {GRANT}
"""

CORRUPTIONS = {
    "history_without_audit": "DELETE FROM credit_audit_logs WHERE user_id = {USER} AND occurred_at = {AT}",
    "audit_without_history": """
        INSERT INTO credit_audit_logs (actor, action, user_id, balance_before, balance_after, credits)
        VALUES ('mallory', 'refreshed', {USER}, 1, 2, 1)""",
    "audit_without_history (twice)": COPY_AUDIT.replace("actor, action, user_id,", "actor, action, user_id, run_id,"),
    "audit_disagrees": """
        UPDATE credit_audit_logs SET balance_after = balance_after + 1, credits = credits + 1
        WHERE user_id = {USER} AND occurred_at = {AT}""",
    "wrong_sum": """
        ALTER TABLE credit_refresh_histories DROP CONSTRAINT ck_credit_refresh_histories_balance;
        UPDATE credit_refresh_histories SET new_balance = new_balance + 5 WHERE id = {GRANT};
        UPDATE credit_audit_logs SET balance_after = balance_after + 5 WHERE user_id = {USER} AND occurred_at = {AT}""",
    "wrong_target": "UPDATE credit_refresh_histories SET target = NULL WHERE id = {GRANT}",
    "wrong_credits": "UPDATE credit_refresh_histories SET target = target + 1 WHERE id = {GRANT}",
    "granted_early": """
        UPDATE credit_refresh_histories SET previous_next_refresh_at = window_start + interval '1 day'
        WHERE id = {GRANT}""",
    "windows_not_counted": """
        UPDATE credit_refresh_histories SET previous_next_refresh_at = window_start - interval '1 day'
        WHERE id = {GRANT}""",
    "double_grant": "DROP INDEX uq_credit_refresh_histories_grant;"
    + COPY_GRANT.replace("<later>", "0") + ";" + COPY_AUDIT,
    "overlapping_grants": COPY_GRANT.replace("<later>", "1 minute") + ";" + COPY_AUDIT,
    "window_missing": """
        DELETE FROM credit_audit_logs WHERE user_id = {FAY} AND occurred_at = {MIDDLE};
        DELETE FROM credit_refresh_histories WHERE user_id = {FAY} AND created_at = {MIDDLE}""",
    "balance_rose": "UPDATE users SET credit_balance = credit_balance + 7 WHERE id = {USER}",
    "balance_rose (between grants)": """
        UPDATE credit_refresh_histories SET old_balance = old_balance + 500, new_balance = new_balance + 500,
            target = target + 500 WHERE id = {GRANT};
        UPDATE credit_audit_logs SET balance_before = balance_before + 500, balance_after = balance_after + 500
        WHERE user_id = {USER} AND occurred_at = {AT}""",
    "date_before_grant": "UPDATE users SET next_refresh_at = next_refresh_at - interval '9 days' WHERE id = {USER}",
    "last_refresh_disagrees": "UPDATE users SET last_credit_refresh = NULL WHERE id = {USER}",
    "last_refresh_disagrees (older)": """
        UPDATE users SET last_credit_refresh = last_credit_refresh - interval '3 days' WHERE id = {USER}""",
    "reversal_without_grant": REVERSE.replace("<taken>", "0"),
    "grant_reversed_without_reversal": """
        UPDATE credit_refresh_histories SET reversed_by_run_id = {FIRST_RUN} WHERE id = {GRANT}""",
    "reversal_too_large": REVERSE.replace("<taken>", "(credits_added + 5)") + """;
        UPDATE credit_refresh_histories SET reversed_by_run_id = {FIRST_RUN} WHERE id = {GRANT};
        UPDATE users SET credit_balance = 0 WHERE id = {USER}""",  # noqa: S608 - texts of this file alone
    "orphan_rows": """
        DELETE FROM credit_refresh_batches WHERE run_id = {FIRST_RUN};
        DELETE FROM credit_refresh_runs WHERE id = {FIRST_RUN}""",
    "run_totals_disagree": "UPDATE credit_refresh_runs SET credits_granted = credits_granted + 1 WHERE id = {RUN}",
    "run_totals_disagree (a batch is gone)": "DELETE FROM credit_refresh_batches WHERE run_id = {RUN}",
    "batch_counts_disagree": """
        UPDATE credit_refresh_batches SET users_refreshed = users_refreshed - 1, users_held = users_held + 1
        WHERE run_id = {RUN};
        UPDATE credit_refresh_runs SET users_refreshed = users_refreshed - 1, users_held = users_held + 1
        WHERE id = {RUN}""",
    "stuck_run": "UPDATE credit_refresh_runs SET status = 'running', finished_at = NULL WHERE id = {FIRST_RUN}",
    "overdue": """
        INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)
        VALUES ('user-late', 'free', 0, now() - interval '3 hours')""",
}  # fmt: skip


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corruption_is_reported_under_its_own_name(world: World, corruption: str) -> None:
    settled(world)
    world.sql.execute("SET session_replication_role = replica")
    with world.sql.transaction():  # at one instant, as a row and its audit row are
        for statement in CORRUPTIONS[corruption].split(";"):
            world.sql.execute(statement.format_map(PLACES))
    world.sql.execute("RESET session_replication_role")
    findings = found(world)
    name = corruption.partition(" ")[0]
    assert {finding.name for finding in findings} == {name}, findings
    about = {finding.user or finding.run_id for finding in findings}
    assert len(about) == 1, findings
    assert all(finding.text and finding.way_out for finding in findings)


def test_every_name_has_its_corruption() -> None:
    assert {name.partition(" ")[0] for name in CORRUPTIONS} == set(KINDS)


def test_a_run_that_nobody_works_on_is_stuck_and_its_users_are_not_overdue_too(world: World) -> None:
    world.users(3)
    world.scan()
    age(world, "3 hours")
    (finding,) = found(world)
    assert finding.name == "stuck_run"
    assert "1 of its batches are still to be done" in finding.text
    world.sql.execute("UPDATE settings SET enabled = false")
    assert found(world) == []


@pytest.mark.parametrize(
    ("change", "terms"),
    [
        ("UPDATE settings SET enabled = false", HOURLY),
        ("UPDATE settings SET dry_run = true", HOURLY),
        ("UPDATE plans SET active = false", HOURLY),
        ("UPDATE plans SET cadence = 'external'", HOURLY),
        ("SELECT 1", verify.Terms(timedelta(hours=1), None, enabled=False)),
        ("SELECT 1", verify.Terms(timedelta(hours=1), None, dry_run=True)),
        ("SELECT 1", verify.Terms(timedelta(hours=2), None)),
        ("UPDATE users SET next_refresh_at = now() - interval '2 hours'", HOURLY),
        ("INSERT INTO credit_audit_logs (actor, action) VALUES ('test', 'resumed')", HOURLY),
        ("UPDATE users SET credit_refresh_hold = true; UPDATE users SET credit_refresh_hold = false", HOURLY),
    ],
)  # fmt: skip
def test_who_is_not_overdue(world: World, change: str, terms: verify.Terms) -> None:
    world.user("ada", due_in="-3 hours")
    assert [finding.name for finding in found(world)] == ["overdue"]
    for statement in change.split(";"):
        world.sql.execute(statement)
    assert found(world, terms) == []


def test_overdue_by_a_cron_timetable_means_two_of_its_ticks() -> None:
    nightly = verify.Terms(timedelta(hours=1), "0 2 * * *")
    night = datetime(2026, 11, 21, 2, tzinfo=UTC)
    assert nightly.overdue_before(night + timedelta(minutes=11)) == night - timedelta(days=1)
    assert nightly.overdue_before(night + timedelta(minutes=9)) == night - timedelta(days=2)
    assert HOURLY.overdue_before(night) == night - timedelta(hours=2, minutes=10)


def test_a_host_that_sells_credits_says_so(world: World) -> None:
    settled(world)
    world.sql.execute("UPDATE users SET credit_balance = credit_balance + 500")
    assert {finding.name for finding in found(world)} == {"balance_rose"}
    assert found(world, verify.Terms(timedelta(hours=1), None, top_ups=True)) == []


def test_the_command_says_that_nothing_was_found(world: World, cli: Cli) -> None:
    settled(world)
    done = cli("verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "33 rows of history, 33 of audit, 11 users checked; nothing found.\n"
    facts = cli.facts("verify")
    assert (facts["historyRows"], facts["auditRows"], facts["users"]) == (33, 33, 11)
    assert (facts["counts"], facts["findings"]) == ({}, [])


def test_the_command_prints_each_finding_with_the_way_out(world: World, cli: Cli) -> None:
    settled(world)
    world.sql.execute("UPDATE users SET credit_balance = credit_balance + 500 WHERE external_id LIKE 'user-%'")
    world.user("late [b]", due_in="-3 hours")
    done = cli("verify", "--limit", "4")
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("balance_rose: user user-") for line in lines) == 4
    assert any(line.startswith("overdue: user late [b]: due since ") for line in lines)
    assert "    `credits why late [b]`; with many of them, see that" in done.stdout
    assert lines[-1].endswith("11 found: 10 balance_rose, 1 overdue. 6 of them are not shown: --limit shows more.")
    answer = cli("verify", "--json", "--limit", "4", "--top-ups")
    assert answer.returncode == 3
    answer = cli("verify", "--json", "--limit", "4")
    facts = json.loads(answer.stdout)
    assert facts["counts"] == {"balance_rose": 10, "overdue": 1}
    assert len(facts["findings"]) == 5
    last = facts["findings"][-1]
    assert (last["finding"], last["userId"], last["runId"]) == ("overdue", "late [b]", None)
    assert last["text"].startswith("due since ")
    assert last["wayOut"].startswith("`credits why late [b]`")


def test_the_audit_reads_one_instant_and_writes_nothing(world: World) -> None:
    world.users(3)
    with world.database.transaction() as connection:
        verify.open_books(connection)
        world.refresh()
        assert connection.execute("SELECT count(*) FROM credit_refresh_histories").fetchone() == (0,)
        assert connection.execute("SHOW transaction_read_only").fetchone() == ("on",)
        assert connection.execute("SHOW statement_timeout").fetchone() == ("6h",)
    assert world.value("SELECT count(*) FROM credit_audit_logs") == 3


def test_the_audit_is_kept_on_record(world: World) -> None:
    settled(world)
    world.user("late", due_in="-3 hours")
    with world.database.transaction() as connection:
        report = verify.verify(connection, HOURLY, limit=1, on_finding=lambda _finding: None)
    with world.database.transaction() as connection:
        verify.record(connection, report, actor="beat")
    row = world.row("SELECT actor, detail FROM credit_audit_logs WHERE action = 'verified'")
    assert row == {"actor": "beat", "detail": {"findings": {"overdue": 1}, "seconds": 0.0}}


_NIGHT = """
import logs
from tasks.verify import verify
logs.configure("INFO", "json")
verify()
"""


def test_the_nightly_task_logs_what_it_finds_and_keeps_a_record(world: World, cli: Cli, tmp_path: Path) -> None:
    settled(world)
    world.user("late", due_in="-3 hours")
    done = subprocess.run(
        [sys.executable, "-c", _NIGHT], check=True, capture_output=True, text=True, cwd=CHECKOUT,
        env={**cli.environment, "CREDITS_STATE_DIR": str(tmp_path)},
    )  # fmt: skip
    finding, summary = (json.loads(line) for line in done.stderr.splitlines())
    assert (finding["level"], finding["finding"], finding["user_id"]) == ("error", "overdue", "late")
    assert finding["event"].startswith("[CreditRefresh] Verify found overdue: due since ")
    assert (summary["level"], summary["counts"]) == ("error", {"overdue": 1})
    row = world.row("SELECT actor, detail -> 'findings' AS findings FROM credit_audit_logs WHERE action = 'verified'")
    assert row == {"actor": "beat", "findings": {"overdue": 1}}


def test_beat_verifies_every_night() -> None:
    entry = celeryconfig.beat_schedule["verify"]
    assert entry["task"] == celeryconfig.TaskNames.VERIFY
    assert (entry["schedule"].minute, entry["schedule"].hour) == ({17}, {3})
    assert celeryconfig.task_routes[entry["task"]] == {"queue": celeryconfig.QueueNames.CONTROL}


_MEASURED = """
import resource, sys
from datetime import timedelta
from db import Database
from refresh import verify
from refresh.verify_kinds import KINDS
database = Database(sys.argv[1], "credits", name="measured")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with database.transaction() as connection:
    report = verify.verify(connection, verify.Terms(timedelta(hours=1), None), limit=10, on_finding=lambda _: None)
print(report.books.history, report.findings, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _measure(url: str) -> tuple[int, int, int]:
    """An audit in a process of its own: rows, findings, and the kB by which its memory grew."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, url], check=True, capture_output=True, text=True, cwd=CHECKOUT
    )
    rows, findings, grown = (int(word) for word in done.stdout.split())
    return rows, findings, grown


def test_memory_grows_neither_with_the_ledger_nor_with_the_findings(world: World, database_url: str) -> None:
    world.sql.execute(LEDGER, {"users": 30, "windows": 10})
    assert found(world) == []
    small = _measure(database_url)
    world.sql.execute("DELETE FROM users")
    world.sql.execute("TRUNCATE credit_refresh_histories")
    world.sql.execute("SET session_replication_role = replica")
    world.sql.execute("TRUNCATE credit_audit_logs")
    world.sql.execute(LEDGER, {"users": 30_000, "windows": 10})
    world.sql.execute("DELETE FROM credit_audit_logs WHERE user_id % 10 = 0")
    world.sql.execute("RESET session_replication_role")
    large = _measure(database_url)
    assert small[:2] == (300, 0)
    assert large[:2] == (300_000, 30_000)
    assert large[2] - small[2] < 8 * 1024
