"""`credits doctor`: each question's answers, and that none that fails keeps the others from theirs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

import settings
from refresh import doctor
from refresh.schedule import slot_at
from settings import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from refresh.doctor import Finding
    from tests.cluster import Cluster
    from tests.integration.command import Cli
    from tests.integration.world import World

NAMES = [
    "settings", "servers", "database", "clock", "connections", "lock waits", "migration", "partitions",
    "default partitions", "switch", "spend trigger", "scheduled run", "pace", "stuck runs", "overdue users",
    "webhooks", "broker", "queues", "dead letters", "workers", "beat",
]  # fmt: skip


def checks(cli: Cli, *, code: int, **variables: str) -> dict[str, Any]:
    """The answer in JSON, by name: all questions, in their order, whatever is broken."""
    done = cli("doctor", "--json", **variables)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    answered = json.loads(done.stdout)
    assert [check["name"] for check in answered["checks"]] == NAMES
    assert answered["ok"] is (code == 0)
    return {check["name"]: check for check in answered["checks"]}


def states(answered: dict[str, Any], state: str) -> set[str]:
    return {name for name, check in answered.items() if check["state"] == state}


def asked(world: World, question: Callable[..., Finding], **values: Any) -> Finding:
    """One question in process."""
    given = (settings.Settings(**values),) if question.__code__.co_argcount > 1 else ()
    with world.database.statements() as connection:
        return question(connection, *given)


@contextmanager
def process(cli: Cli, state: Path, *arguments: str) -> Iterator[None]:
    """A worker or beat of the service."""
    environment = {**cli.environment, "CREDITS_STATE_DIR": str(state)}
    with (state / f"{arguments[0]}.log").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tasks", *arguments], cwd=CHECKOUT, env=environment, stdout=log,
            stderr=log,
        )  # fmt: skip
    try:
        yield
    finally:
        running.terminate()
        running.wait(20)


def test_a_service_that_works_is_ok(world: World, cli: Cli, tmp_path: Path) -> None:
    state = {"CREDITS_STATE_DIR": str(tmp_path)}
    worker = ("worker", "--hostname", "doctor@%h", "--without-gossip", "--without-mingle")
    with process(cli, tmp_path, *worker), process(cli, tmp_path, "beat"):
        world.until(
            lambda: (
                world.value("SELECT count(*) FROM credit_refresh_runs WHERE source = 'beat'") == 1
                and (tmp_path / "worker.heartbeat").exists()
            ),
            "beat's first scan and the worker's first heartbeat",
        )
        answered = checks(cli, code=0, **state)
        said = cli("doctor", **state)
    assert states(answered, "wrong") == set()
    assert states(answered, "info") == {"spend trigger"}
    assert "doctor@" in answered["workers"]["text"]
    assert "was alive" in answered["beat"]["text"]
    assert "embedded" not in answered["servers"]["text"]
    assert said.returncode == 0
    lines = said.stdout.splitlines()
    assert len(lines) == len(NAMES)
    assert all(line.startswith(("ok ", "info ")) for line in lines)


def test_without_workers_and_beat_it_says_what_to_start(world: World, cli: Cli, tmp_path: Path) -> None:
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0
    answered = checks(cli, code=1, CREDITS_STATE_DIR=str(tmp_path))
    assert states(answered, "wrong") == {"workers", "beat", "scheduled run"}
    assert "credits up" in answered["workers"]["todo"]
    assert "celery -A tasks beat" in answered["beat"]["todo"]
    assert "there was none yet" in answered["scheduled run"]["text"]
    done = cli("doctor", CREDITS_STATE_DIR=str(tmp_path))
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if " workers " in line]
    assert line.startswith("wrong ")
    assert line.endswith("start one: `credits up`, or `celery -A tasks worker`")


def test_heartbeats_speak_for_those_who_do_not_answer(world: World, cli: Cli, tmp_path: Path) -> None:
    world.scheduled()
    # As `credits up` leaves them: in its own folder.
    (tmp_path / "up").mkdir()
    for name in ("worker", "beat"):
        (tmp_path / "up" / f"{name}.heartbeat").touch()
    answered = checks(cli, code=0, CREDITS_STATE_DIR=str(tmp_path))
    assert "but one was alive" in answered["workers"]["text"]
    assert answered["beat"]["state"] == "ok"
    long_ago = time.time() - 600
    for name in ("worker", "beat"):
        os.utime(tmp_path / "up" / f"{name}.heartbeat", (long_ago, long_ago))
    answered = checks(cli, code=1, CREDITS_STATE_DIR=str(tmp_path))
    assert states(answered, "wrong") == {"workers"}
    # Beat may run on another machine: the slot has its run.
    assert answered["beat"]["state"] == "info"
    assert re.search("was last alive here 6.. s ago", answered["beat"]["text"])


def test_a_database_that_does_not_answer(cli: Cli) -> None:
    answered = checks(cli, code=1, DATABASE_URL="postgresql://app:hunter2@127.0.0.1:1/app")
    assert "cannot be reached" in answered["database"]["text"]
    assert "hunter2" not in json.dumps(answered)
    assert {"clock", "migration", "partitions", "switch", "overdue users"} <= states(answered, "unasked")
    assert answered["migration"]["text"] == "not asked before database is mended"
    assert {"settings", "servers", "broker", "queues"} <= states(answered, "ok")


def test_a_database_that_is_not_migrated(cluster: Cluster, cli: Cli) -> None:
    name = cluster.create("template1")
    answered = checks(cli, code=1, DATABASE_URL=cluster.url(name))
    assert "credits db upgrade" in answered["migration"]["text"]
    assert {"partitions", "switch", "scheduled run", "overdue users"} <= states(answered, "unasked")
    assert {"database", "clock", "connections", "lock waits", "broker"} <= states(answered, "ok")
    cluster.drop(name)


def test_another_releases_migration(world: World, cli: Cli) -> None:
    world.sql.execute("UPDATE alembic_version SET version_num = '0001'")
    assert "is at migration 0001" in checks(cli, code=1)["migration"]["text"]


def test_a_broker_that_does_not_answer(world: World, cli: Cli) -> None:
    world.users(1)
    answered = checks(cli, code=1, REDIS_URL="redis://:hunter2@127.0.0.1:1/0")
    assert "The broker cannot be reached" in answered["broker"]["text"]
    assert "hunter2" not in json.dumps(answered)
    assert states(answered, "unasked") == {"queues", "dead letters", "workers"}
    assert answered["partitions"]["state"] == "ok"


def test_a_setting_that_is_not_valid(cli: Cli) -> None:
    answered = checks(cli, code=1, CREDIT_REFRESH_BATCH_SIZE="many")
    assert "CREDIT_REFRESH_BATCH_SIZE='many'" in answered["settings"]["text"]
    assert states(answered, "wrong") == {"settings"}
    assert states(answered, "unasked") == set(NAMES) - {"settings"}


def test_a_question_that_fails_fails_alone(world: World, cli: Cli) -> None:
    world.sql.execute("ALTER TABLE credit_refresh_batches RENAME TO gone")
    answered = checks(cli, code=1)
    assert answered["stuck runs"]["state"] == "wrong"
    assert "no answer (UndefinedTable)" in answered["stuck runs"]["text"]
    assert answered["partitions"]["state"] == answered["overdue users"]["state"] == "ok"


def test_the_switch(world: World) -> None:
    assert asked(world, doctor.switch).state == "ok"
    assert asked(world, doctor.switch, credit_refresh_enabled=False).text == "CREDIT_REFRESH_ENABLED is false here"
    assert "CREDIT_REFRESH_DRY_RUN" in asked(world, doctor.switch, credit_refresh_dry_run=True).text
    world.sql.execute("UPDATE settings SET dry_run = true")
    assert asked(world, doctor.switch).text == "all runs are dry, nothing is granted"
    world.sql.execute("UPDATE settings SET enabled = false")
    assert asked(world, doctor.switch).sentence == "the service is paused, nothing is granted: `credits resume`"


def test_partitions_that_are_missing(world: World) -> None:
    assert asked(world, doctor.partitions).state == "ok"
    later = world.value("SELECT to_char(now() AT TIME ZONE 'UTC' + interval '3 months', '\"_y\"YYYY\"m\"MM') AS name")
    world.sql.execute(f"DROP TABLE credit_refresh_histories{later}")
    found = asked(world, doctor.partitions)
    assert found.text == f"partitions are missing (credit_refresh_histories{later})"
    assert "are beat and a worker running" in str(found.todo)
    row = (
        "INSERT INTO credit_refresh_histories (run_id, user_id, status, window_start, old_balance, credits_added,"
        " new_balance) VALUES (gen_random_uuid(), 1, 'refreshed', now() + %s::interval, 0, 0, 0)"
    )
    world.sql.execute(row, ("3 months",))
    assert "lie in the default partition" in str(asked(world, doctor.partitions).todo)


def test_rows_in_the_default_partitions(world: World) -> None:
    assert asked(world, doctor.default_partitions).state == "ok"
    world.user("late", due_in="-400 days")
    world.sql.execute("UPDATE plans SET interval_days = 390")
    world.refresh()
    world.sql.execute(
        "INSERT INTO credit_refresh_histories (run_id, user_id, status, window_start, old_balance, credits_added,"
        " new_balance) VALUES (gen_random_uuid(), 9, 'refreshed', now() - interval '2 years', 0, 0, 0)"
    )
    found = asked(world, doctor.default_partitions)
    assert (found.state, found.text[:14]) == ("info", "1 history rows")
    world.sql.execute(
        "INSERT INTO credit_audit_logs (occurred_at, actor, action) VALUES (now() + interval '2 years', 'x', 'y')"
    )
    assert asked(world, doctor.default_partitions).text == "1 audit rows lie in the default partition"


@pytest.mark.parametrize("cron", [None, "0 2 * * *"])
def test_the_scheduled_run(world: World, cron: str | None) -> None:
    found = asked(world, doctor.scheduled_run, credit_refresh_cron=cron)
    assert found.state == "wrong"
    assert "there was none yet" in found.text
    world.scheduled(cron=cron)
    assert asked(world, doctor.scheduled_run, credit_refresh_cron=cron).state == "ok"
    world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 week'")
    found = asked(world, doctor.scheduled_run, credit_refresh_cron=cron)
    assert found.state == "wrong"
    assert "are beat and a worker running" in found.sentence
    world.sql.execute("UPDATE settings SET enabled = false")
    assert asked(world, doctor.scheduled_run, credit_refresh_cron=cron).state == "info"


def test_a_slot_that_has_just_begun_is_given_its_time(world: World) -> None:
    now = datetime.now(UTC)
    slot = slot_at(now, timedelta(seconds=3_600))
    world.scheduled(interval=timedelta(seconds=3_600))
    world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 hour'")
    found = asked(world, doctor.scheduled_run)
    early = now - slot < timedelta(seconds=doctor.SLOT_GRACE_SECONDS)
    assert found.state == ("ok" if early else "wrong")
    # A slot of 3 minutes is always young.
    world.sql.execute(
        "UPDATE credit_refresh_runs SET slot = date_bin('3 minutes', now(), 'epoch') - interval '3 minutes'"
    )
    found = asked(world, doctor.scheduled_run, credit_refresh_interval_seconds=180)
    assert (found.state, "has just begun" in found.text) == ("ok", True)


def test_users_whom_the_scans_leave_out(world: World) -> None:
    world.user("fresh", due_in="-10 minutes")
    world.user("future", due_in="5 days")
    world.user("gone", due_in="-5 days", active=False)
    assert asked(world, doctor.overdue_users).state == "ok"
    world.user("late", due_in="-4 hours")
    found = asked(world, doctor.overdue_users)
    assert (found.state, found.text[:10]) == ("wrong", "1 user is ")
    assert "credits why late" in found.sentence
    # A day's timetable has not come round to them twice.
    assert asked(world, doctor.overdue_users, credit_refresh_interval_hours=24).state == "ok"
    world.sql.execute("UPDATE plans SET cadence = 'external' WHERE code = 'free'")
    assert asked(world, doctor.overdue_users).state == "ok"


def test_more_users_than_anybody_counts(world: World) -> None:
    world.users(doctor.COUNTED_MAX + 5, due_in="-9 days")
    assert asked(world, doctor.overdue_users).text.startswith("more than 10,000 users are due")


def test_stuck_runs(world: World) -> None:
    world.users(250)
    run = world.scan()
    first, second, _ = world.claim(run)
    assert asked(world, doctor.stuck_runs).state == "ok"
    world.sql.execute("UPDATE credit_refresh_runs SET created_at = now() - interval '2 hours'")
    found = asked(world, doctor.stuck_runs)
    assert (found.state, str(run.run_id) in found.sentence) == ("wrong", True)
    world.work([first])
    assert asked(world, doctor.stuck_runs).state == "ok"
    world.sql.execute("UPDATE credit_refresh_batches SET finished_at = now() - interval '1 hour' WHERE status = 'done'")
    assert asked(world, doctor.stuck_runs).state == "wrong"
    world.sql.execute(
        "UPDATE credit_refresh_batches SET next_attempt_at = now() + interval '1 hour' WHERE id = %s", (second,)
    )
    assert asked(world, doctor.stuck_runs).state == "ok"
    world.sql.execute("UPDATE credit_refresh_batches SET next_attempt_at = NULL")
    world.sql.execute("UPDATE settings SET enabled = false")
    assert asked(world, doctor.stuck_runs).state == "info"


def test_lock_waits_longer_than_the_deadlock_timeout(world: World) -> None:
    with world.database.statements() as connection:
        assert doctor.lock_waits(connection).state == "ok"
        for lock_timeout, state in (("0", "wrong"), ("30s", "wrong"), ("10ms", "wrong"), ("500ms", "ok")):
            connection.execute("SELECT set_config('lock_timeout', %s, false)", (lock_timeout,))
            assert doctor.lock_waits(connection).state == state, lock_timeout
        connection.execute("SELECT set_config('lock_timeout', '500ms', false)")


def test_room_for_connections(world: World) -> None:
    assert asked(world, doctor.connections).state == "ok"
    world.sql.execute("CREATE ROLE doctors_patient LOGIN CONNECTION LIMIT 3")
    with world.database.statements() as connection:
        connection.execute("SET ROLE doctors_patient")
        found = doctor.connections(connection)
        connection.execute("RESET ROLE")
    world.sql.execute("DROP ROLE doctors_patient")
    assert found.state == "wrong"
    assert found.text.startswith("3 connections are free")


def test_the_spend_trigger_is_told(world: World, cli: Cli) -> None:
    assert asked(world, doctor.spend_trigger).text.startswith("off")
    cli.says("db", "triggers", "on")
    assert asked(world, doctor.spend_trigger).text == "a spend refreshes whoever is due first"


def test_control_messages_that_nobody_takes(world: World, cli: Cli, tmp_path: Path) -> None:
    from cli import doctor_celery  # noqa: PLC0415 - loads the Celery app
    from tasks.app import app, use_broker  # noqa: PLC0415

    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0
    url = cli.environment["REDIS_URL"]
    use_broker(url)
    with app.connection_for_write() as broker:
        channel: Any = broker.default_channel
        channel.queue_declare("control")
        channel.queue_purge("control")
        assert "0 in control" in doctor_celery.queues().text
        for _ in range(11):
            app.send_task("tasks.upkeep", queue="control", connection=broker)
        found = doctor_celery.queues()
        channel.queue_purge("control")
    assert (found.state, "11 in control" in found.text) == ("wrong", True)
    assert doctor_celery.beat((tmp_path,), on_time=True).state == "info"
    assert doctor_celery.beat((tmp_path,), on_time=False).state == "wrong"


def test_the_help_says_what_it_answers(cli: Cli) -> None:
    text = cli.says("doctor", "--help")
    for word in ("--json", "Exit code 1", "Examples", "unasked"):
        assert word in text
