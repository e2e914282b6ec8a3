"""Rolling runs back, as the command does, and its workers."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from db import transaction
from refresh import rollback, runs, totals
from refresh.user_files import UserList, load_users

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    import psycopg

    from tests.integration.world import World

REASON = "wrong amount"


def ask(
    connection: psycopg.Connection[Any],
    run_id: UUID,
    *,
    users: Sequence[str] | None = None,
    reopen: bool = False,
    allow_negative: bool = False,
) -> rollback.Asked:
    """What a command line says; a file's users are in their table after it."""
    listed = None
    if users is not None:
        listed = load_users(connection, UserList(BytesIO("\n".join(users).encode()), "the file")).content()
    return rollback.Asked(run_id=run_id, reopen=reopen, allow_negative=allow_negative, listed=listed)


def open_rollback(
    world: World, run_id: UUID, *, request: dict[str, Any] | None = None, **options: Any
) -> runs.Opened | runs.NotOpened:
    values: dict[str, Any] = {"source": "cli", "requested_by": "cli:ops", "batch_size": 100, "reason": REASON}
    base = runs.Request(**{**values, **(request or {})})
    with world.database.statements() as connection:
        asked = ask(connection, run_id, **options)
        with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
            return rollback.open_rollback(connection, asked.request(base), asked)


def opened(world: World, run_id: UUID, **options: Any) -> runs.Opened:
    run = open_rollback(world, run_id, **options)
    assert isinstance(run, runs.Opened), run
    return run


def expect(world: World, run_id: UUID, **options: Any) -> rollback.Expected:
    with world.database.statements() as connection:
        return rollback.expect(connection, ask(connection, run_id, **options))


def pending(world: World, run: runs.Opened) -> list[int]:
    rows = world.rows("SELECT id FROM credit_refresh_batches WHERE run_id = %s AND status = 'pending'", run.run_id)
    return [row["id"] for row in rows]


def work_off(world: World, run: runs.Opened) -> totals.Progress:
    world.work(pending(world, run))
    return world.progress(run)


def refresh(world: World, **request: Any) -> runs.Opened:
    """A scan from its opening to its end."""
    run = world.scan(**request)
    assert work_off(world, run).status == "succeeded"
    return run


def roll_back(world: World, run: runs.Opened, **options: Any) -> totals.Progress:
    """A rollback from its opening to its end."""
    return work_off(world, opened(world, run.run_id, **options))


def spend(world: World, user_id: int, credits_: int) -> None:
    world.sql.execute("UPDATE users SET credit_balance = credit_balance - %s WHERE id = %s", (credits_, user_id))


def dates(world: World, user_id: int) -> tuple[Any, Any]:
    user = world.see(user_id)
    return user["next_refresh_at"], user["last_credit_refresh"]


def grant(world: World, user_id: int) -> dict[str, Any]:
    """The user's newest grant, taken back or not."""
    return world.row(
        "SELECT * FROM credit_refresh_histories WHERE user_id = %s AND status = 'refreshed' ORDER BY id DESC LIMIT 1",
        user_id,
    )


def last(world: World, user_id: int) -> dict[str, Any]:
    """The newest row of the user's history."""
    return world.history(user_id)[-1]


def call_function(world: World, external_id: str) -> dict[str, Any]:
    found: dict[str, Any] = world.value("SELECT refresh_credits_if_due(%s)", external_id)
    return found
