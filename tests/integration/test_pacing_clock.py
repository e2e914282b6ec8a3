"""Pacing where the database's clock is set back: the instants that it has written lie far ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refresh import delivery
from refresh.pacing import AHEAD_SECONDS_MAX
from tests.integration.test_pacing import paced, waits

if TYPE_CHECKING:
    from tests.integration.world import World

_SET_BACK = (
    "UPDATE credit_refresh_runs SET paced_until = now() + interval '1 hour' WHERE max_users_per_second IS NOT NULL"
)


def test_nobody_sleeps_as_long_as_the_clock_was_set_back(world: World) -> None:
    _, ids = paced(world, 3, 1)
    world.sql.execute(_SET_BACK)
    first, second = waits(world, *ids[:2])
    assert first is not None
    assert second is not None
    assert AHEAD_SECONDS_MAX - 1 < first <= AHEAD_SECONDS_MAX
    assert AHEAD_SECONDS_MAX - 1 < second <= AHEAD_SECONDS_MAX
    ahead = world.value("SELECT extract(epoch FROM paced_until - clock_timestamp())::float FROM credit_refresh_runs")
    assert ahead <= AHEAD_SECONDS_MAX + 1


def test_what_is_lost_is_found_within_minutes_all_the_same(world: World) -> None:
    world.users(1)
    ids = world.claim(world.scan())
    world.user("slow")
    world.scan(max_users_per_second=1)
    world.sql.execute(_SET_BACK)
    published = "UPDATE credit_refresh_batches SET published_at = now() - %s::interval WHERE id = ANY (%s)"
    for ago, losses in (("5 minutes", 0), ("6 minutes", 1)):
        world.sql.execute(published, (ago, ids))
        with world.database.statements() as connection:
            assert delivery.record_losses(connection, scheduled=False) == losses
