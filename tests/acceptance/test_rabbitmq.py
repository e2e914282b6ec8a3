"""The service on RabbitMQ instead of Redis, by settings alone: Debian's package, on loopback."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from kombu import Connection

import settings
from bench.rabbitmq import RabbitMQ
from celeryconfig import QueueNames, TaskNames
from refresh import runs
from tasks import broker
from tasks.app import app, use_broker
from tasks.publish import publish_queue
from tests.integration.command import CREDITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from db import Database
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import Launcher

USERS = 1_000
LATE = 150
SECONDS = 30.0


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[RabbitMQ]:
    with RabbitMQ(tmp_path / "rabbitmq") as running:
        yield running


@pytest.fixture
def env(rabbitmq: RabbitMQ, database_url: str, tmp_path: Path) -> dict[str, str]:
    """REDIS_URL is named too and not used: nobody listens there."""
    return settings.environment(
        DATABASE_URL=database_url,
        REDIS_URL="redis://127.0.0.1:1/0",
        CELERY_BROKER_URL=rabbitmq.url,
        CREDITS_STATE_DIR=str(tmp_path / "worker"),
    )


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what this process publishes to a broker that is down."""
    monkeypatch.setitem(app.conf, "broker_connection_timeout", 1)


REASONS = [
    (QueueNames.BULK, reason)
    for reason in (
        "cannot be read (ContentDisallowed)",
        "cannot be read (DecodeError)",
        "names no task",
        "names a task that is not ours",
        "has other arguments than the task takes",
        "cannot be read (ValueError)",
    )
]


def ask(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [str(CREDITS), *arguments, "--json"]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(asked: subprocess.Popen[str]) -> tuple[Any, str]:
    """The command's answer, and what it says beside it."""
    out, err = asked.communicate(timeout=SECONDS)
    return json.loads(out or "null"), err


def send(url: str, queue: str, body: object, task: str = "", **properties: Any) -> None:
    """Publish as anybody with access to the broker can."""
    headers = {"lang": "py", "task": task, "id": task} if task else {}
    with Connection(url) as connection:
        connection.Producer(routing_key=queue).publish(body, headers=headers, **properties)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not in {SECONDS:.0f} seconds: {what}")
        time.sleep(0.05)


def test_the_service_works_on_rabbitmq_refuses_what_is_not_ours_and_comes_back_with_it(
    rabbitmq: RabbitMQ, env: dict[str, str], launcher: Launcher, ledger: Ledger, database: Database
) -> None:
    worker = launcher.worker(env)
    until(lambda: ledger.value("SELECT count(*) FROM credit_refresh_runs") == 1, "the worker opened the empty slot")
    ledger.add_due_users(USERS)
    run, said = answer(ask(env, "scan", "--wait"))
    assert run is not None, said
    ledger.assert_all_granted_once(*ledger.runs_with_users())

    send(rabbitmq.url, QueueNames.BULK, [[[1]], {}, {}], TaskNames.BATCH, serializer="pickle")
    send(rabbitmq.url, QueueNames.BULK, "{", TaskNames.BATCH, content_type="application/json", content_encoding="utf-8")
    send(rabbitmq.url, QueueNames.BULK, {"anything": 1})
    send(rabbitmq.url, QueueNames.BULK, [[], {}, {}], "os.system")
    send(rabbitmq.url, QueueNames.BULK, [["all"], {}, {}], TaskNames.BATCH)
    send(rabbitmq.url, QueueNames.BULK, [[], {}, {}], TaskNames.UPKEEP, compression="gzip")
    until(lambda: worker.logs().count("Refused a message") == len(REASONS), "all of them were refused")
    assert "Traceback" not in worker.logs()
    for _ in range(2):  # looking at them leaves them where they are
        kept, _ = answer(ask(env, "dead-letters"))
        assert [(letter["queue"], letter["reason"]) for letter in kept["letters"]] == REASONS
    assert (kept["letters"][3]["body"], kept["letters"][2]["body"]) == ("[[], {}, {}]", '{"anything": 1}')

    rabbitmq.stop()
    refused_scan = ask(env, "scan")
    late = open_late(database, ledger)
    use_broker(rabbitmq.url)
    assert publish_queue(database, QueueNames.BULK, max_attempts=5, run_id=late.run_id) == 0
    with pytest.raises(OSError, match="refused"):
        broker.ping()
    run, said = answer(refused_scan)
    assert run is None
    assert said.splitlines()[-1].endswith("(see CELERY_BROKER_URL)")
    assert "Traceback" not in said

    rabbitmq.start()
    send(rabbitmq.url, QueueNames.CONTROL, [[], {}, {}], TaskNames.UPKEEP)
    until(lambda: ledger.run_status(late.run_id) == "succeeded", "upkeep published what the broker had not taken")
    assert worker.exit_code is None
    granted = "SELECT count(*), count(DISTINCT user_id) FROM credit_refresh_histories WHERE status = 'refreshed'"
    assert ledger.rows(granted) == [(USERS + LATE, USERS + LATE)]
    assert ledger.value("SELECT sum(attempts) FROM credit_refresh_batches") == 0

    examined, _ = answer(ask(env, "doctor"))
    texts = {check["name"]: check["text"] for check in examined["checks"]}
    assert texts["broker"] == "RabbitMQ answers"
    assert texts["queues"].startswith("0 in control, 0 in batches, 0 in bulk")
    assert texts["dead letters"].startswith(f"{len(REASONS)} messages refused")
    assert texts["workers"].startswith("1 worker answering")
    broker.ping()
    waiting = {**dict.fromkeys(QueueNames.ALL, 0), QueueNames.DEAD: len(REASONS)}
    assert broker.read_queues() == broker.Queues(waiting, unacked=None)
    dropped, _ = answer(ask(env, "dead-letters", "--drop", "--yes"))
    assert dropped["dropped"] == len(REASONS)
    left, _ = answer(ask(env, "dead-letters"))
    assert left == {"letters": [], "dropped": 0}


def open_late(database: Database, ledger: Ledger) -> runs.Opened:
    """A run over further users, which nobody has published yet."""
    ledger.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)"
        " SELECT 'late-' || n, 'free', 0, now() - interval '1 hour' FROM generate_series(1, %s) AS n",
        LATE,
    )
    with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        opened = runs.open_run(connection, runs.Request("cli", "test", 100))
    assert isinstance(opened, runs.Opened)
    return opened
