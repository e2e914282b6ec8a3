"""Notices that no grant sets off: what the audit found, and silence. And what is cleared away."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from refresh import verify, webhook_deliveries
from refresh.webhook_deliveries import DEAD_DAYS, DELIVERED_DAYS, EXPIRE_DAYS
from refresh.webhook_events import EXAMPLES_MAX, Found, tell_silence
from settings import CHECKOUT
from tests.integration.hooks import endpoint, now_is_later, outbox, told, write

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.command import Cli
    from tests.integration.world import World

HOURLY = verify.Terms(timedelta(hours=1), None)

_NIGHT = """
import logs
from tasks.verify import verify
logs.configure("INFO", "json")
verify()
"""


def test_the_nightly_audit_tells_what_it_finds_with_its_record(world: World, cli: Cli, tmp_path: Path) -> None:
    endpoint(world, "verify.finding")
    endpoint(world, "run.finished")
    world.user("late", due_in="-3 hours")
    done = subprocess.run(
        [sys.executable, "-c", _NIGHT], check=True, capture_output=True, text=True, cwd=CHECKOUT,
        env={**cli.environment, "CREDITS_STATE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert "overdue" in done.stderr
    (row,) = outbox(world)
    assert (row["type"], row["payload"]["finding"], row["payload"]["count"]) == ("verify.finding", "overdue", 1)
    (example,) = row["payload"]["examples"]
    assert example["userId"] == "late"
    assert json.loads(json.dumps(example)).keys() == {"finding", "userId", "runId", "text", "wayOut"}
    same = "SELECT xmin FROM webhook_deliveries UNION SELECT xmin FROM credit_audit_logs WHERE action = 'verified'"
    assert len(world.rows(same)) == 1


def test_of_many_findings_the_first_are_told_and_all_are_counted(world: World) -> None:
    endpoint(world, "verify.finding")
    world.users(30, due_in="-3 hours")
    found = Found()
    with world.database.transaction() as connection:
        report = verify.verify(connection, HOURLY, limit=100, on_finding=found.note)
    with world.database.transaction() as connection:
        found.tell(connection, report.counts)
    (payload,) = told(world, "verify.finding")
    assert (payload["count"], len(payload["examples"])) == (30, EXAMPLES_MAX)


def test_a_night_without_findings_tells_nothing(world: World) -> None:
    endpoint(world, "verify.finding")
    found = Found()
    with world.database.transaction() as connection:
        report = verify.verify(connection, HOURLY, limit=100, on_finding=found.note)
        found.tell(connection, report.counts)
    assert outbox(world) == []


# --- silence ---------------------------------------------------------------------------------------------------------


def silence(world: World) -> int:
    with world.database.statements() as connection:
        return tell_silence(connection)


def days_pass(world: World, days: int) -> None:
    """The log's rows and the endpoints grow older, past the trigger that keeps the log as it was."""
    world.sql.execute("SET session_replication_role = replica")
    world.sql.execute("UPDATE credit_audit_logs SET occurred_at = occurred_at - make_interval(days => %s)", (days,))
    world.sql.execute("RESET session_replication_role")
    world.sql.execute(
        "UPDATE webhook_endpoints SET created_at = created_at - make_interval(days => %s),"
        " silence_noticed_at = silence_noticed_at - make_interval(days => %s)",
        (days, days),
    )
    now_is_later(world, f"{days} days")


def grant_somebody(world: World, name: str) -> None:
    world.user(name)
    assert world.refresh().users_refreshed == 1


def test_each_silence_is_told_once_to_those_who_asked_for_so_many_days(world: World) -> None:
    three, _ = endpoint(world, no_grants_days=3)
    seven, _ = endpoint(world, "run.finished", no_grants_days=7)
    endpoint(world, "run.finished")
    grant_somebody(world, "ada")
    assert silence(world) == 0
    days_pass(world, 2)
    assert silence(world) == 0
    days_pass(world, 2)
    assert silence(world) == 1
    (row,) = outbox(world, "notice.no_grants")
    last = world.value("SELECT utc_text(max(occurred_at)) FROM credit_audit_logs WHERE action = 'refreshed'")
    assert row["endpoint_id"] == three.id
    assert row["payload"] == {"days": 3, "lastGrantAt": last, "paused": False}
    for _ in range(2):
        days_pass(world, 1)
        assert silence(world) == 0
    days_pass(world, 2)
    assert silence(world) == 1
    assert [row["endpoint_id"] for row in outbox(world, "notice.no_grants")] == [three.id, seven.id]

    grant_somebody(world, "bob")
    days_pass(world, 1)
    assert silence(world) == 0
    days_pass(world, 3)
    assert silence(world) == 1
    assert len(outbox(world, "notice.no_grants")) == 3


def test_silence_is_looked_at_once_an_hour(world: World) -> None:
    endpoint(world, no_grants_days=1)
    assert silence(world) == 0
    world.sql.execute("UPDATE webhook_endpoints SET created_at = created_at - interval '2 days'")
    assert silence(world) == 0
    now_is_later(world, "61 minutes")
    assert silence(world) == 1


def test_a_service_in_which_nobody_was_ever_refreshed_is_silent_since_the_endpoint_was_added(world: World) -> None:
    endpoint(world, no_grants_days=3)
    days_pass(world, 2)
    assert silence(world) == 0
    world.sql.execute("UPDATE settings SET enabled = false")
    days_pass(world, 2)
    assert silence(world) == 1
    (payload,) = told(world, "notice.no_grants")
    assert payload == {"days": 3, "lastGrantAt": None, "paused": True}
    days_pass(world, 5)
    assert silence(world) == 0


def test_a_grant_on_any_path_ends_a_silence_and_a_dry_run_does_not(world: World) -> None:
    endpoint(world, no_grants_days=1)
    world.user("ada")
    days_pass(world, 3)
    assert world.refresh(dry_run=True).users_refreshed == 1
    assert silence(world) == 1
    world.sql.execute("SELECT refresh_credits_if_due('ada')")
    now_is_later(world, "2 hours")
    assert silence(world) == 0
    days_pass(world, 3)
    assert silence(world) == 1


def test_of_two_upkeeps_at_once_one_tells(world: World) -> None:
    endpoint(world, no_grants_days=1)
    days_pass(world, 3)
    with world.calls(*[lambda: silence(world)] * 6) as calls:
        calls.start()
        assert sorted(calls.results()) == [0] * 5 + [1]


# --- what is old -----------------------------------------------------------------------------------------------------


def tidy(world: World) -> tuple[int, int]:
    with world.database.statements() as connection:
        return webhook_deliveries.tidy(connection)


def test_a_message_that_waits_in_vain_is_dead_after_three_days(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    write(world, added, 5)
    world.sql.execute("UPDATE webhook_endpoints SET active = false")
    now_is_later(world, f"{EXPIRE_DAYS - 1} days")
    assert tidy(world) == (0, 0)
    now_is_later(world, "1 day")
    assert tidy(world) == (5, 0)
    assert {(row["status"], row["attempts"]) for row in outbox(world)} == {("dead", 0)}
    assert "its endpoint failed, or was inactive" in outbox(world)[0]["last_error"]


@pytest.mark.parametrize(("status", "days"), [("delivered", DELIVERED_DAYS), ("dead", DEAD_DAYS)])
def test_old_messages_are_deleted(world: World, status: str, days: int) -> None:
    added, _ = endpoint(world, "run.finished")
    write(world, added, 25)
    world.sql.execute(
        "UPDATE webhook_deliveries SET status = %s, next_attempt_at = NULL, finished_at = now()", (status,)
    )
    now_is_later(world, f"{days} days - 1 hour")
    assert tidy(world) == (0, 0)
    now_is_later(world, "2 hours")
    assert tidy(world) == (0, 25)
    assert outbox(world) == []


def test_it_goes_by_pieces_and_takes_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_deliveries, "PIECE_ROWS", 10)
    added, _ = endpoint(world, "run.finished")
    write(world, added, 35)
    now_is_later(world, "4 days")
    assert tidy(world) == (35, 0)
    now_is_later(world, "40 days")
    assert tidy(world) == (0, 35)


def test_what_is_left_of_a_removed_endpoint_goes_in_the_night(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    other, _ = endpoint(world, "run.finished")
    write(world, added, 5)
    write(world, other, 5)
    world.sql.execute("DELETE FROM webhook_endpoints WHERE id = %s", (added.id,))
    assert tidy(world) == (0, 5)
    assert {row["endpoint_id"] for row in outbox(world)} == {other.id}


_RETENTION = """
import logs
from tasks.retention import retention
logs.configure("INFO", "json")
retention()
"""


def test_the_nightly_retention_tidies_the_outbox(world: World, cli: Cli, tmp_path: Path) -> None:
    added, _ = endpoint(world, "run.finished")
    write(world, added, 5)
    now_is_later(world, "4 days")
    environment: dict[str, Any] = {**cli.environment, "CREDITS_STATE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _RETENTION], check=True, capture_output=True, text=True, cwd=CHECKOUT, env=environment
    )
    assert '"expired": 5' in done.stderr
    assert {row["status"] for row in outbox(world)} == {"dead"}
