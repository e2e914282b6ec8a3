"""Bulk refreshes without the command, for the tests that look at what they do."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from psycopg import sql

from db import transaction
from refresh import runs, totals
from refresh.preview import Preview, preview
from refresh.selection import Selection
from refresh.user_files import UserList, load_users

if TYPE_CHECKING:
    from tests.integration.world import World

ANYBODY = Selection()


def request(**asked: Any) -> runs.Request:
    return runs.Request(**{"source": "cli", "requested_by": "cli:ops", "batch_size": 100, "reason": "why", **asked})


def open_bulk(
    world: World, asked: Selection = ANYBODY, *, file: str | None = None, **content: Any
) -> runs.Opened | runs.NotOpened:
    with world.database.statements() as connection:
        if file is not None:
            listed = load_users(connection, UserList(io.BytesIO(file.encode()), "users.txt"))
            asked = Selection(**{**asked.parameters(), "listed": listed.content()})
        with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
            return runs.open_run(connection, request(**content), asked)


def opened(world: World, asked: Selection = ANYBODY, **content: Any) -> runs.Opened:
    run = open_bulk(world, asked, **content)
    assert isinstance(run, runs.Opened)
    return run


def refresh(world: World, asked: Selection = ANYBODY, **content: Any) -> totals.Progress:
    run = opened(world, asked, **content)
    world.work(world.claim(run))
    return world.progress(run)


def foresee(world: World, asked: Selection = ANYBODY, **content: Any) -> Preview:
    with world.database.transaction() as connection:
        return preview(connection, request(**content), asked)


def selected(world: World) -> set[str]:
    """The users of all batches."""
    rows = world.rows("SELECT external_id FROM users WHERE id IN (SELECT unnest(user_ids) FROM credit_refresh_batches)")
    return {row["external_id"] for row in rows}


def change_plan(world: World, code: str, **values: object) -> None:
    for name, value in values.items():
        world.sql.execute(
            sql.SQL("UPDATE plans SET {} = %s WHERE code = %s").format(sql.Identifier(name)), (value, code)
        )
