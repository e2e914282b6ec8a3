"""Commands that only look, on a database that takes no writes, as a standby is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

LOOKING = (
    "stats", "history ada", "why ada", "runs list", "forecast --days 3", "verify", "users show ada", "plans list",
    "retention --months 13 --dry-run", "keys list",
)  # fmt: skip


@pytest.fixture
def standby(world: World) -> None:
    world.user("ada")
    world.work(world.claim(world.scan()))
    name = world.row("SELECT current_database() AS name")["name"]
    world.sql.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')


@pytest.mark.usefixtures("standby")
def test_what_looks_needs_no_writes(cli: Cli) -> None:
    for command in LOOKING:
        done = cli(*command.split())
        assert (done.returncode, done.stderr) == (0, ""), command
