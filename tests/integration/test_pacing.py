"""Pacing: turns that nobody gets early, and runs cut into small batches. Losses: test_losses.py."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

import settings
from celeryconfig import QueueNames
from refresh import delivery, doctor, pacing, runs
from refresh import retry as retrying
from refresh.apply import open_apply
from refresh.cancel import cancel_run
from refresh.errors import RefusedError
from refresh.pacing import take_turn
from refresh.switch import turn
from refresh.work import pending_batches
from tasks.app import app, use_broker
from tasks.publish import messages_waiting, publish_queue
from tests.integration.command import refused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    import embedded
    from tests.integration.command import Cli
    from tests.integration.world import World


@pytest.fixture
def broker(servers: embedded.Servers) -> Iterator[None]:
    use_broker(servers.redis_url)
    app.control.purge()
    yield
    app.control.purge()


def paced(world: World, users: int, pace: int, **request: Any) -> tuple[runs.Opened, list[int]]:
    """A paced run, published."""
    world.users(users)
    run = world.scan(max_users_per_second=pace, **request)
    return run, world.claim(run)


def waits(world: World, *batch_ids: int) -> list[float | None]:
    with world.database.statements() as connection:
        return [take_turn(connection, batch_id) for batch_id in batch_ids]


def attempts(world: World) -> list[int]:
    return [row["attempts"] for row in world.rows("SELECT attempts FROM credit_refresh_batches ORDER BY id")]


def pace_of(world: World, run_id: UUID) -> int | None:
    pace: int | None = world.value("SELECT max_users_per_second FROM credit_refresh_runs WHERE id = %s", run_id)
    return pace


@pytest.mark.parametrize(
    ("batch_size", "pace", "users"),
    [(100, None, 100), (100, 5_000, 100), (100, 1_000, 100), (100, 999, 99), (100, 10, 1), (100, 1, 1), (7, 1_000, 7)],
)
def test_a_slow_run_is_cut_small(batch_size: int, pace: int | None, users: int) -> None:
    assert pacing.batch_users(batch_size, pace) == users


def test_what_is_cut_adds_up(world: World) -> None:
    run, _ = paced(world, 105, 200)
    assert (run.users_selected, run.batches_total) == (105, 6)
    sizes = world.rows("SELECT cardinality(user_ids) AS users FROM credit_refresh_batches ORDER BY seq")
    assert [row["users"] for row in sizes] == [20] * 5 + [5]


def test_turns_follow_one_another_at_the_pace_of_their_users(world: World) -> None:
    _, ids = paced(world, 50, 100)
    first, *others = waits(world, *ids)
    assert first == 0
    # No turn is early, however long the statements before it took.
    end = world.value("SELECT extract(epoch FROM paced_until - clock_timestamp())::float FROM credit_refresh_runs")
    assert end <= 0.5
    assert all(wait is not None and wait <= 0.1 * number for number, wait in enumerate(others, start=1))


def test_a_turn_begins_where_the_one_before_it_ends(world: World) -> None:
    _, ids = paced(world, 3, 1)
    ends = []
    for batch_id in ids:
        waits(world, batch_id)
        ends.append(world.value("SELECT paced_until FROM credit_refresh_runs"))
    assert [(after - before).total_seconds() for before, after in pairwise(ends)] == [1, 1]


def test_nobody_catches_up_after_a_stall(world: World) -> None:
    _, ids = paced(world, 3, 1)
    waits(world, ids[0])
    world.sql.execute("UPDATE credit_refresh_runs SET paced_until = now() - interval '1 hour'")
    now = world.value("SELECT clock_timestamp()")
    second, third = waits(world, *ids[1:])
    assert second == 0
    assert third is not None
    assert third > 0
    ahead = world.value("SELECT paced_until - %s FROM credit_refresh_runs", now)
    assert ahead.total_seconds() >= 2


def test_turns_at_the_same_time_are_still_one_after_the_other(world: World) -> None:
    _, ids = paced(world, 40, 10)
    began = world.value("SELECT clock_timestamp()")
    with world.calls(*(lambda part=part: waits(world, *ids[part::4]) for part in range(4))) as workers:
        workers.start()
        given = [wait for result in workers.results() for wait in result]
    assert None not in given
    taken = world.value("SELECT paced_until - %s FROM credit_refresh_runs", began)
    assert taken.total_seconds() >= 40 / 10


def test_a_turn_leaves_the_session_as_it_was(world: World) -> None:
    _, ids = paced(world, 1, 1)
    with world.database.statements() as connection:
        connection.execute("SET synchronous_commit = 'local'")
        for _ in range(2):
            assert take_turn(connection, ids[0]) is not None
            assert connection.execute("SHOW synchronous_commit").fetchone() == ("local",)


def test_only_batches_of_paced_runs_are(world: World) -> None:
    world.users(1)
    ids = world.claim(world.scan())
    with world.database.statements() as connection:
        assert [pending.paced for pending in pending_batches(connection, ids)] == [False]
        assert take_turn(connection, ids[0]) is None
    world.user("other")
    ids = world.claim(world.scan(max_users_per_second=1))
    with world.database.statements() as connection:
        assert [pending.paced for pending in pending_batches(connection, ids)] == [True]


def test_no_turn_is_taken_for_what_is_not_to_be_done(world: World) -> None:
    run, ids = paced(world, 3, 10)
    world.work(ids[:1])
    assert waits(world, ids[0], 10**15) == [None, None]
    with world.database.transaction() as connection:
        turn(connection, enabled=False, actor="test")
    assert waits(world, ids[1]) == [None]
    with world.database.transaction() as connection:
        turn(connection, enabled=True, actor="test")
        cancel_run(connection, run.run_id, actor="test", reason="test")
    assert waits(world, ids[1]) == [None]
    assert world.value("SELECT paced_until FROM credit_refresh_runs") is None


def test_what_is_all_or_none_waits_for_no_more_than_a_few_seconds(world: World) -> None:
    """An atomic plan in a paced run: one batch, whatever the pace."""
    world.users(120)
    world.sql.execute("UPDATE plans SET atomic = true WHERE code = 'free'")
    run = world.scan(max_users_per_second=1)
    assert run.batches_total == 1
    assert waits(world, *world.claim(run)) == [0]
    ahead = world.value("SELECT extract(epoch FROM paced_until - clock_timestamp())::float FROM credit_refresh_runs")
    assert ahead <= pacing.TURN_SECONDS_MAX


def test_all_or_none_is_not_asked_for_with_a_pace(world: World, cli: Cli) -> None:
    world.users(1)
    with pytest.raises(RefusedError, match="cannot be paced"):
        world.scan(atomic=True, max_users_per_second=1)
    asked = ("bulk-refresh", "--all", "--atomic", "--max-users-per-second", "10", "--yes", "--reason", "x")
    refused(cli(*asked), 2, "cannot be paced")
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0


def test_a_locked_run_is_nobodys_attempt(world: World) -> None:
    run, ids = paced(world, 1, 1)
    with world.host() as somebody:
        somebody.execute("SELECT FROM credit_refresh_runs WHERE id = %s FOR NO KEY UPDATE", (run.run_id,))
        with world.database.statements() as connection:
            with pytest.raises(psycopg.errors.LockNotAvailable):
                take_turn(connection, ids[0])
            delivery.unclaim_batches(connection, ids)
    assert world.claim() == ids
    assert attempts(world) == [0]


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("broker")
def test_a_paced_batch_has_a_message_of_its_own(world: World) -> None:
    world.users(200)
    world.scan(max_users_per_second=10)
    assert publish_queue(world.database, QueueNames.BULK, max_attempts=5) == 200
    assert messages_waiting(QueueNames.BULK) == 200


@pytest.mark.usefixtures("broker")
def test_a_queue_has_room_for_so_many_messages_whoever_publishes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "QUEUE_DEEP_MESSAGES", 5)
    world.users(20)
    world.scan(max_users_per_second=10)
    world.user("quick")
    world.scan()
    # The quick ones first.
    assert publish_queue(world.database, QueueNames.BULK, max_attempts=5) == 5
    assert messages_waiting(QueueNames.BULK) == 5
    quick = "SELECT published_at IS NOT NULL AS it FROM credit_refresh_batches WHERE user_ids = ARRAY[21::bigint]"
    assert world.value(quick)


# --- who asks, and what is inherited ----------------------------------------------------------------------------------


def test_scheduled_runs_have_the_settings_pace(world: World) -> None:
    world.users(1)
    run = world.scheduled(max_users_per_second=settings.Settings().scheduled_max_users_per_second)
    assert isinstance(run, runs.Opened)
    assert pace_of(world, run.run_id) == settings.Settings().credit_refresh_max_users_per_second
    assert settings.Settings(credit_refresh_max_users_per_second=0).scheduled_max_users_per_second is None


def test_a_retry_and_an_apply_go_at_their_runs_pace_unless_told_otherwise(world: World) -> None:
    dry = runs.Request("cli", "test", 100, dry_run=True, max_users_per_second=30)
    world.users(2)
    with world.database.transaction() as connection:
        planned = runs.open_run(connection, dry)
    assert isinstance(planned, runs.Opened)
    world.work(world.claim(planned))
    with world.database.transaction() as connection:
        applied = open_apply(connection, planned.run_id, runs.Request("cli", "test", 100))
        assert isinstance(applied, runs.Opened)
        cancel_run(connection, applied.run_id, actor="test", reason="test")
        again = retrying.open_retry(connection, applied.run_id, runs.Request("cli", "test", 100))
        cancel_run(connection, again.run_id, actor="test", reason="test")
        asked = runs.Request("cli", "test", 100, max_users_per_second=7)
        slower = retrying.open_retry(connection, again.run_id, asked)
    assert [pace_of(world, run.run_id) for run in (applied, again, slower)] == [30, 30, 7]


def test_the_same_request_at_another_pace_is_the_same_request(world: World) -> None:
    world.users(1)
    run = world.scan(idempotency_key="k", max_users_per_second=30)
    again = world.scan(idempotency_key="k")
    assert (again.run_id, again.existing) == (run.run_id, True)


def test_the_command_line(world: World, cli: Cli) -> None:
    world.users(30)
    scanned = cli.facts("scan", "--dry-run", "--max-users-per-second", "100")
    assert scanned["batches_total"] == 3
    bulk = cli.facts("bulk-refresh", "--all", "--max-users-per-second", "150", "--yes", "--reason", "x")
    assert bulk["maxUsersPerSecond"] == 150
    shown = cli.facts("runs", "show", bulk["runId"])
    assert shown["maxUsersPerSecond"] == 150
    assert "150 users/s" in cli.says("runs", "show", bulk["runId"])
    cli.says("runs", "cancel", bulk["runId"], "--yes", "--reason", "x")
    retried = cli.facts("runs", "retry", bulk["runId"], "--yes")
    assert retried["maxUsersPerSecond"] == 150
    world.work(world.claim() + [row["id"] for row in world.rows("SELECT id FROM credit_refresh_batches")])
    back = ("runs", "rollback", retried["runId"], "--yes", "--reason", "x")
    assert cli.facts(*back, "--dry-run")["maxUsersPerSecond"] is None
    assert cli.facts(*back, "--max-users-per-second", "20")["maxUsersPerSecond"] == 20
    listed = json.loads(cli.says("runs", "list", "--json"))["runs"]
    assert sorted({run["maxUsersPerSecond"] or 0 for run in listed}) == [0, 20, 100, 150]
    done = cli("scan", "--max-users-per-second", "0")
    assert done.returncode == 2


def test_doctor_says_when_the_pace_cannot_keep_up(world: World) -> None:
    def asked(**values: Any) -> doctor.Finding:
        with world.database.statements() as connection:
            return doctor.pace(connection, settings.Settings(**values))

    world.users(70, due_in="30 seconds")
    assert asked().state == "ok"
    assert asked(credit_refresh_max_users_per_second=0).state == "ok"
    minute = {"credit_refresh_interval_seconds": 60}
    assert asked(credit_refresh_max_users_per_second=2, **minute).state == "ok"
    found = asked(credit_refresh_max_users_per_second=1, **minute)
    assert found.state == "wrong"
    assert found.sentence == (
        "scheduled runs refresh 1 users per second at most, 60 in 0:01:00, and more than that are due by then: "
        "raise CREDIT_REFRESH_MAX_USERS_PER_SECOND"
    )
