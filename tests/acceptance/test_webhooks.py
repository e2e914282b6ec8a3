"""Webhooks by real workers: told when a run ends, again when a sender dies, and in nobody's way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from celeryconfig import QueueNames, TaskNames
from refresh import webhook_endpoints as endpoints
from refresh.webhook_outbox import LEASE_SECONDS
from refresh.webhook_targets import read_target
from tests import roles
from tests.acceptance.nodes import LocalWorker
from tests.receiver import Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from db import Database
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import Launcher
    from tests.acceptance.service import Service

USERS = 250
PENDING = "SELECT count(*) FROM webhook_deliveries WHERE status = 'pending'"


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str], database: Database) -> Iterator[dict[str, str]]:
    """A worker with a worker's rights, which may reach this machine."""
    with database.statements() as connection, roles.made(connection, "worker") as role:
        url = roles.url(default_worker_env["DATABASE_URL"], role)
        yield default_worker_env | {"DATABASE_URL": url, "WEBHOOKS_ALLOW_PRIVATE": "true", "LOG_LEVEL": "DEBUG"}


@pytest.fixture
def default_worker_command() -> list[str]:
    """As docker-compose.yml starts it: webhooks have a worker of their own."""
    return LocalWorker.command(f"--queues={','.join(QueueNames.REFRESH)}")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def add(database: Database, url: str, *events: str, **options: Any) -> tuple[endpoints.Endpoint, str | None]:
    wanted = endpoints.Wanted(target=read_target(url, allow_private=True), events=events, **options)
    with database.transaction() as connection:
        return endpoints.add_endpoint(connection, wanted, actor="test")


def webhooks_worker(launcher: Launcher, service: Service) -> LocalWorker:
    return launcher.worker(service.env, LocalWorker.command(f"--queues={QueueNames.WEBHOOKS}"))


def test_when_a_run_ends_its_users_and_its_end_are_told(
    service: Service, ledger: Ledger, database: Database, launcher: Launcher, receiver: Receiver
) -> None:
    sender = webhooks_worker(launcher, service)
    _, secret = add(database, receiver.url("/c4nary"), "run.finished", "user.refreshed")
    add(database, receiver.url("/chat-c4nary"), "run.finished", format="slack")
    ledger.add_due_users(USERS)
    run_id = service.scan()
    service.until_finished(run_id)
    service.until(lambda: ledger.value(PENDING) == 0, "all is delivered")
    ledger.assert_all_granted_once(run_id)

    signed = [request for request in receiver.requests if request.path == "/c4nary"]
    told = [request.verified(str(secret)) for request in signed]
    assert len({request.headers["webhook-id"] for request in signed}) == len(signed) == USERS + 1
    assert {one["data"]["userId"] for one in told if one["type"] == "user.refreshed"} == {
        f"user-{n}" for n in range(1, USERS + 1)
    }
    (finished,) = [one["data"] for one in told if one["type"] == "run.finished"]
    assert (finished["runId"], finished["status"], finished["usersRefreshed"]) == (str(run_id), "succeeded", USERS)
    (said,) = [json.loads(request.body)["text"] for request in receiver.requests if request.path == "/chat-c4nary"]
    assert f"{USERS} of {USERS} users refreshed" in said

    assert ledger.value("SELECT max(attempts) FROM webhook_deliveries") == 1
    logs = sender.logs() + service.worker.logs()
    assert "Webhooks sent" in logs
    assert "c4nary" not in logs
    assert str(secret) not in logs
    assert "Traceback" not in logs
    assert "permission denied" not in logs


def test_what_a_killed_sender_had_on_its_way_is_sent_again_under_the_same_id(
    service: Service, ledger: Ledger, database: Database, launcher: Launcher, receiver: Receiver
) -> None:
    sender = webhooks_worker(launcher, service)
    add(database, receiver.url(), "run.finished")
    receiver.hold.clear()
    ledger.add_due_users(10)
    service.until_finished(service.scan())
    service.until(lambda: len(receiver.requests) == 1, "the message is on its way")
    sender.kill()
    receiver.hold.set()
    assert ledger.rows("SELECT status, attempts FROM webhook_deliveries") == [("pending", 1)]

    webhooks_worker(launcher, service)
    service.send(TaskNames.UPKEEP)
    # Each of the three workers has sent one at its start.
    service.until(lambda: service.taken(TaskNames.UPKEEP, service.worker) == 4, "upkeep looked")
    assert len(receiver.requests) == 1  # the lease is on
    ledger.execute(
        "UPDATE webhook_deliveries SET next_attempt_at = next_attempt_at - make_interval(secs => %s)", LEASE_SECONDS
    )
    service.send(TaskNames.UPKEEP)
    service.until(lambda: ledger.value(PENDING) == 0, "it is delivered")
    assert len(receiver.ids) == 2
    assert len(set(receiver.ids)) == 1
    assert ledger.rows("SELECT status, attempts FROM webhook_deliveries") == [("delivered", 2)]


def test_an_endpoint_that_hangs_keeps_no_batch_and_no_upkeep_waiting(
    service: Service, ledger: Ledger, database: Database, launcher: Launcher, receiver: Receiver
) -> None:
    webhooks_worker(launcher, service)
    add(database, receiver.url(), "run.finished", "user.refreshed")
    receiver.hold.clear()
    ledger.add_due_users(USERS)
    service.until_finished(service.scan())
    service.until(lambda: len(receiver.requests) > 0, "messages are on their way")
    ledger.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)"
        " SELECT 'later-' || n, 'free', 0, now() - interval '1 hour' FROM generate_series(1, 300) AS n"
    )
    service.until_finished(service.scan())
    before = service.taken(TaskNames.UPKEEP, service.worker)
    service.send(TaskNames.UPKEEP)
    service.until(lambda: service.taken(TaskNames.UPKEEP, service.worker) > before, "upkeep is done")
    assert ledger.value("SELECT count(*) FROM webhook_deliveries WHERE status = 'delivered'") == 0
    assert ledger.value(PENDING) == USERS + 300 + 2
    receiver.hold.set()


def test_nobody_takes_webhooks_and_no_more_than_one_message_waits(
    service: Service, ledger: Ledger, database: Database, receiver: Receiver, launcher: Launcher
) -> None:
    add(database, receiver.url(), "run.finished")
    ledger.add_due_users(10)
    service.until_finished(service.scan())
    for number in range(2, 5):
        service.send(TaskNames.UPKEEP)
        service.until(lambda: service.taken(TaskNames.UPKEEP, service.worker) == number, "upkeep rang")  # noqa: B023 - called at once
    assert service.redis.llen(QueueNames.WEBHOOKS) == 1
    webhooks_worker(launcher, service)
    service.until(lambda: ledger.value(PENDING) == 0, "it is delivered")
    assert len(receiver.requests) == 1


def test_upkeep_rings_for_what_the_broker_has_lost(
    service: Service, ledger: Ledger, database: Database, receiver: Receiver, launcher: Launcher
) -> None:
    add(database, receiver.url(), "run.finished")
    ledger.add_due_users(10)
    service.until_finished(service.scan())
    service.until(lambda: service.redis.llen(QueueNames.WEBHOOKS) == 1, "it was rung for")
    service.redis.delete(QueueNames.WEBHOOKS)
    webhooks_worker(launcher, service)
    service.send(TaskNames.UPKEEP)
    service.until(lambda: ledger.value(PENDING) == 0, "it is delivered")


def test_a_worker_over_all_queues_sends_too(
    service: Service, ledger: Ledger, database: Database, receiver: Receiver
) -> None:
    """As `celery -A tasks worker` starts one: one process does everything."""
    service.start_worker()
    add(database, receiver.url(), "notice.run_failed", format="discord")
    ledger.add_due_users(10)
    ledger.execute(
        "UPDATE users SET credit_balance = -9223372036854775808, custom_credit_amount = 9223372036854775807"
        " WHERE external_id = 'user-7'"
    )
    service.until_finished(service.scan())
    service.until(lambda: ledger.value(PENDING) == 0 and len(receiver.requests) == 1, "it is delivered")
    sent = receiver.requests[0].json
    assert "ended partial: 9 of 10 users refreshed, 1 failed" in sent["content"]
    assert sent["allowed_mentions"] == {"parse": []}
