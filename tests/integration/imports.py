"""Imports without the command, for the tests that look at what they do."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from refresh.import_file import UserFile
from refresh.imports import Report, import_users

if TYPE_CHECKING:
    from tests.integration.world import World


def load(world: World, content: str, **options: Any) -> Report:
    with world.database.transaction() as connection:
        file = UserFile(io.BytesIO(content.encode()), "users.csv")
        return import_users(connection, file, **{"actor": "test", **options})


def users(world: World) -> dict[str, dict[str, Any]]:
    return {row["external_id"]: row for row in world.rows("SELECT * FROM users ORDER BY id")}
