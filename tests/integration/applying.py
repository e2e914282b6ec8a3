"""Dry runs and their execution, as the tests of `refresh/apply.py` do them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refresh import apply, runs

if TYPE_CHECKING:
    from uuid import UUID

    from refresh.totals import Progress
    from tests.integration.world import World

REASON = "approved"


def plan(world: World, **request: Any) -> UUID:
    """A dry run from its opening to its end."""
    done = world.refresh(dry_run=True, reason="first look", **request)
    assert done.dry_run
    return done.run_id


def begin(world: World, dry_run_id: UUID, **request: Any) -> runs.Opened | runs.NotOpened:
    asked = runs.Request(**{"source": "cli", "requested_by": "kim", "batch_size": 100, "reason": REASON, **request})
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        return apply.open_apply(connection, dry_run_id, asked)


def opened(world: World, dry_run_id: UUID, **request: Any) -> runs.Opened:
    run = begin(world, dry_run_id, **request)
    assert isinstance(run, runs.Opened), run
    return run


def drain(world: World, run: runs.Opened) -> Progress:
    """Do what is pending, and what was put off meanwhile."""
    while True:
        world.sql.execute("UPDATE credit_refresh_batches SET next_attempt_at = now() WHERE next_attempt_at > now()")
        ids = world.claim(run)
        if not ids:
            return world.progress(run)
        world.work(ids)


def applied(world: World, dry_run_id: UUID, **request: Any) -> Progress:
    """A dry run's execution from its opening to its end."""
    return drain(world, opened(world, dry_run_id, **request))


def tamper(world: World, change: str, *parameters: object) -> None:
    """Change the planned rows."""
    changed = world.sql.execute(f"UPDATE credit_refresh_histories SET {change}", parameters)  # noqa: S608
    assert changed.rowcount == 1
