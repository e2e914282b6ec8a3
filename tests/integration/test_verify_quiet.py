"""`credits verify` keeps quiet about what was done just now and was right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration.books import age
from tests.integration.rollbacks import refresh, roll_back
from tests.integration.test_retry import cancel
from tests.integration.test_verify import found

if TYPE_CHECKING:
    from tests.integration.world import World


def names(world: World) -> list[str]:
    return [finding.name for finding in found(world)]


def test_who_is_inserted_without_a_balance_and_with_a_date_ahead_was_not_granted_early(world: World) -> None:
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, next_refresh_at) VALUES ('new', 'free', now() + interval '9 days')"
    )
    row = world.row("SELECT source, previous_next_refresh_at > window_start AS ahead FROM credit_refresh_histories")
    assert row == {"source": "insert", "ahead": True}
    assert names(world) == []


def test_but_anybody_else_was(world: World) -> None:
    """The exception is the insert's alone."""
    world.user()
    world.refresh()
    assert names(world) == []
    world.sql.execute("UPDATE credit_refresh_histories SET previous_next_refresh_at = window_start + interval '1 day'")
    assert names(world) == ["granted_early"]


def test_who_was_given_back_just_now_is_not_overdue_yet(world: World) -> None:
    world.users(3, due_in="-5 hours")
    roll_back(world, refresh(world), reopen=True)
    assert world.value("SELECT count(*) FROM users WHERE wake_at < now() - interval '4 hours'") == 3
    assert names(world) == []
    age(world, "3 hours")
    assert names(world) == ["overdue"] * 3


def test_whom_a_cancelled_run_left_just_now_is_not_overdue_yet(world: World) -> None:
    world.users(30, due_in="-5 hours")
    run = world.scan(batch_size=10)
    world.work(world.claim(run)[:1])
    cancel(world, run)
    assert names(world) == []
    age(world, "3 hours")
    assert names(world) == ["overdue"] * 20


def test_a_dry_run_that_was_cancelled_excuses_nobody(world: World) -> None:
    world.user(due_in="-5 hours")
    cancel(world, world.scan(dry_run=True))
    assert names(world) == ["overdue"]
