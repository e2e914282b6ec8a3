"""Retention and runs: old ones are refused, unfinished ones keep what they need, plans and batches go in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest

from refresh import apply, retention, retry, rollback, runs
from refresh.cancel import cancel_run
from refresh.errors import RefusedError
from tests.integration import applying
from tests.integration.books import age
from tests.integration.past import (
    KEPT,
    make_partitions,
    months,
    names,
    old_rows,
    retain,
    roll_back_later,
    survey,
    two_visits,
)
from tests.integration.rollbacks import roll_back

if TYPE_CHECKING:
    from tests.integration.world import World


def test_an_old_run_is_refused_in_one_line(world: World) -> None:
    two_visits(world, "ada")
    planned = applying.plan(world, force=True)
    old = UUID(str(world.value("SELECT id FROM credit_refresh_runs ORDER BY created_at LIMIT 1")))
    new = UUID(
        str(world.value("SELECT id FROM credit_refresh_runs WHERE NOT dry_run ORDER BY created_at DESC LIMIT 1"))
    )
    world.restore("UPDATE credit_refresh_runs SET created_at = created_at - interval '500 days' WHERE id = %s", planned)
    retain(world)
    with world.database.transaction() as connection:
        with pytest.raises(RefusedError, match="older than the books"):
            rollback.expect(connection, rollback.Asked(run_id=old))
        with pytest.raises(RefusedError, match="older than the books"):
            retry.read_retriable(connection, old)
        with pytest.raises(RefusedError, match="older than the books"):
            apply.require_appliable(apply.read_dry_run(connection, planned))
        assert rollback.expect(connection, rollback.Asked(run_id=new)).users == 1
    since = survey(world).books_since
    assert since is not None
    long_ago = since.replace(day=1, year=since.year - 1)
    with pytest.raises(RefusedError, match="lies before the books"):
        world.scan(as_of=long_ago)
    with pytest.raises(psycopg.errors.CheckViolation, match="lies before the books"):
        world.sql.execute(
            "INSERT INTO credit_refresh_runs (source, requested_by, as_of) VALUES ('cli', 'somebody', %s)", (long_ago,)
        )
    world.scan(dry_run=True, as_of=since)


def test_an_unfinished_run_keeps_its_months_and_those_of_what_it_is_about(world: World) -> None:
    two_visits(world, "ada", "left")
    old = world.row("SELECT * FROM credit_refresh_runs ORDER BY created_at LIMIT 1")
    waiting = roll_back_later(world, UUID(str(old["id"])))
    seen = survey(world)
    assert seen.partitions == [] or seen.partitions[-1].until <= old["created_at"]
    assert seen.horizon is not None
    assert seen.horizon.held_back_by == waiting.run_id
    retain(world)
    world.work(world.claim(waiting))
    assert world.progress(waiting).users_refreshed == 1
    assert names(world) == []
    assert retain(world).dropped is not None
    assert names(world) == []


def test_a_late_reversal_keeps_its_grant(world: World) -> None:
    two_visits(world, "ada", "bob", days=380)
    old = world.row(
        "SELECT id, (SELECT min(id) FROM users) AS ada FROM credit_refresh_runs ORDER BY created_at LIMIT 1"
    )
    world.sql.execute("UPDATE users SET active = false")
    world.restore("DELETE FROM credit_refresh_histories WHERE created_at > now() - interval '1 day'")
    world.restore("DELETE FROM credit_audit_logs WHERE occurred_at > now() - interval '1 day'")
    world.restore("DELETE FROM credit_refresh_batches WHERE finished_at > now() - interval '1 day'")
    world.restore("DELETE FROM credit_refresh_runs WHERE finished_at > now() - interval '1 day'")
    undone = roll_back_later(world, UUID(str(old["id"])))
    world.work(world.claim(undone))
    age(world, "90 days")
    world.restore("UPDATE users SET credit_balance = 0, next_refresh_at = NULL")
    before = names(world)
    assert retain(world).dropped is not None
    assert names(world) == before
    assert [row["status"] for row in old_rows(world)].count("reversed") == 2


def test_stopped_between_two_pieces_it_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refresh.retention.PIECE_ROWS", 2)
    make_partitions(world, years=2)
    world.users(5)
    planned = applying.plan(world)
    world.refresh(batch_size=1)
    age(world, "500 days")

    def stop(_rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), world.database.statements() as connection:
        retention.carry_out(connection, KEPT, actor="test", on_rows=stop)
    assert survey(world).partitions == []
    left = survey(world)
    assert (left.planned_rows, left.batch_rows) == (0, 4)
    assert recorded(world) == [2]
    assert names(world) == ["overdue"] * 5
    report = retain(world)
    assert report.batch_rows == 4
    assert recorded(world) == [2, 2, 2]
    assert retain(world).nothing
    assert world.value("SELECT count(*) FROM credit_refresh_batches") == 0
    with world.database.transaction() as connection, pytest.raises(RefusedError, match="older than the books"):
        apply.require_appliable(apply.read_dry_run(connection, planned))


def recorded(world: World) -> list[int]:
    """Batch rows that the audit log says were deleted."""
    rows = world.rows(
        "SELECT (detail ->> 'batchRows')::integer AS batch_rows FROM credit_audit_logs WHERE detail ? 'batchRows'"
        " ORDER BY id"
    )
    return [row["batch_rows"] for row in rows]


def test_planned_rows_that_go_with_the_months_are_counted_once(world: World) -> None:
    make_partitions(world, years=2)
    world.users(5)
    applying.plan(world)
    world.refresh()
    age(world, "300 days")
    applying.plan(world)
    age(world, "200 days")
    seen = survey(world)
    assert sum(part.rows for part in seen.partitions if "histories" in part.name) == 10
    assert (seen.planned_rows, seen.planned_runs) == (5, 1)
    assert retain(world).planned_rows == 5


def test_what_was_decided_as_of_before_the_books_is_refused_in_one_line(world: World) -> None:
    two_visits(world, "ada")
    world.users(2, due_in="-700 days")
    as_of = world.value("SELECT now() - interval '600 days'")
    planned = applying.plan(world, as_of=as_of)
    forced = world.scan(as_of=as_of, force=True)
    with world.database.transaction() as connection:
        cancel_run(connection, forced.run_id, actor="test", reason="test")
    retain(world)
    with pytest.raises(RefusedError, match="the instant it decided as of, is older than the books"):
        applying.opened(world, planned)
    with (
        pytest.raises(RefusedError, match="the instant it decided as of, is older than the books"),
        world.database.transaction() as connection,
    ):
        retry.open_retry(connection, forced.run_id, runs.Request("cli", "test", 100))


def test_planned_rows_go_in_time_without_any_months(world: World) -> None:
    world.users(3)
    world.scheduled(dry_run=True)
    world.work(world.claim())
    planned = applying.plan(world)
    age(world, "89 days")
    terms = retention.Terms(None, 90)
    assert survey(world, terms).nothing
    assert retain(world, terms).nothing
    age(world, "2 days")
    fresh = applying.plan(world)
    assert survey(world, terms).planned_rows == 6
    assert retain(world, terms).planned_rows == 6
    assert survey(world, terms).books_since is None
    with world.database.transaction() as connection:
        with pytest.raises(RefusedError, match="retention leaves them in time: make a new dry run"):
            apply.require_appliable(apply.read_dry_run(connection, planned))
        apply.require_appliable(apply.read_dry_run(connection, fresh))


def test_a_plan_that_is_being_applied_stays(world: World) -> None:
    world.users(3)
    planned = applying.plan(world)
    run = applying.opened(world, planned)
    world.sql.execute("UPDATE credit_refresh_runs SET created_at = created_at - interval '91 days'")
    terms = retention.Terms(None, 90)
    assert retain(world, terms).nothing
    world.work(world.claim(run))
    assert world.progress(run).users_refreshed == 3
    assert retain(world, terms).planned_rows == 3
    with world.database.transaction() as connection, pytest.raises(RefusedError, match="cannot be retried"):
        retry.read_retriable(connection, run.run_id)


def test_windows_that_have_not_ended_are_not_planned_anew_by_beat(world: World) -> None:
    world.sql.execute("UPDATE plans SET interval_days = 365")
    world.users(2)
    world.scheduled(dry_run=True)
    world.work(world.claim())
    age(world, "100 days")
    assert retain(world, retention.Terms(None, 90)).nothing


def test_a_run_that_is_opened_meanwhile_comes_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    two_visits(world, "ada", "left")
    old = UUID(str(world.value("SELECT id FROM credit_refresh_runs ORDER BY created_at LIMIT 1")))
    before, lock_door = months(world), runs.lock_door
    opened: list[runs.Opened] = []

    def open_first(connection: psycopg.Connection[Any]) -> None:
        monkeypatch.setattr(runs, "lock_door", lock_door)
        opened.append(roll_back_later(world, old))
        lock_door(connection)

    monkeypatch.setattr(runs, "lock_door", open_first)
    with pytest.raises(RefusedError, match="was opened meanwhile"):
        retain(world)
    assert months(world) == before
    world.work(world.claim(opened[0]))
    assert world.progress(opened[0]).users_refreshed == 1
    assert names(world) == []


def test_rolled_back_after_a_drop_everybody_is_where_they_were(world: World) -> None:
    two_visits(world, "ada", "bob")
    new = UUID(str(world.value("SELECT id FROM credit_refresh_runs ORDER BY created_at DESC LIMIT 1")))
    retain(world)
    undone = roll_back_later(world, new)
    world.work(world.claim(undone))
    assert world.progress(undone).users_refreshed == 2
    assert names(world) == []
    world.refresh()
    assert names(world) == []


def test_a_single_user_is_taken_back_of_a_young_run_alone(world: World) -> None:
    two_visits(world, "ada", "bob")
    retain(world)
    new = world.scan(force=True)
    world.work(world.claim(new))
    roll_back(world, new, users=["ada"])
    assert names(world) == []
