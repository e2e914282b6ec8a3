"""The API's connections to the database: as many as it needs at once, opened once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from api.application import THREADS

if TYPE_CHECKING:
    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World

REQUESTS = 160
OPENED = "SELECT sessions FROM pg_stat_database WHERE datname = current_database()"


def test_requests_at_once_do_not_connect_anew(deployment: Deployment, world: World) -> None:
    """To connect takes longer than what most requests ask the database for."""
    world.user("busy")
    client = deployment.client()

    def ask(_number: int) -> int:
        return client.get("/api/admin/users/busy/refresh-verdict").status_code

    with ThreadPoolExecutor(THREADS) as threads:
        before = int(world.value(OPENED))
        assert set(threads.map(ask, range(REQUESTS))) == {200}
        assert int(world.value(OPENED)) - before <= THREADS
