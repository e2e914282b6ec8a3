"""Plans and what the tests do to them: draft, save, and move the users as the workers do."""

from __future__ import annotations

from datetime import UTC, time
from typing import TYPE_CHECKING, Any

from refresh import plans, runs, totals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.integration.world import World

NINE = time(9)
MONTHLY: dict[str, Any] = {"cadence": "monthly", "day_of_month": 31, "time_of_day": NINE, "timezone": "Europe/Berlin"}
DAILY: dict[str, Any] = {"cadence": "daily", "time_of_day": time(0)}


def draft(world: World, code: str = "free", **changes: Any) -> plans.Draft:
    with world.database.statements() as connection:
        return plans.draft(connection, code, changes)


def save(world: World, made: plans.Draft, *, batch_size: int = 100) -> runs.Opened | None:
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        return plans.save(connection, made, actor="cli:ops", batch_size=batch_size)


def change(world: World, changes: Mapping[str, Any], code: str = "free") -> runs.Opened:
    run = save(world, draft(world, code, **changes))
    assert run is not None
    return run


def move(world: World, changes: Mapping[str, Any], code: str = "free") -> totals.Progress | None:
    """Change a plan, and do what the workers do."""
    run = save(world, draft(world, code, **changes))
    if run is None:
        return None
    world.work(world.claim(run))
    return world.progress(run)


def stored(world: World, code: str = "free") -> dict[str, Any]:
    return world.row("SELECT * FROM plans WHERE code = %s", code)


def next_of(world: World, user_id: int) -> str:
    at = world.see(user_id)["next_refresh_at"]
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}" if at else "none"


def date(world: World, user_id: int, at: str | None) -> None:
    world.sql.execute("UPDATE users SET next_refresh_at = %s WHERE id = %s", (at, user_id))
