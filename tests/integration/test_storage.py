"""Storage parameters of the tables that every refresh writes: of the partitions to come, too, and a host's own stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli.database import migrate
from tests.integration.test_migrations import downgrade

if TYPE_CHECKING:
    from tests.integration.world import World

_ENSURE = "SELECT ensure_partitions AS name FROM ensure_partitions(now() + interval '20 months', 0)"


def parameters(world: World) -> dict[str, list[str]]:
    rows = world.rows(
        "SELECT relname, reloptions FROM pg_class WHERE relnamespace = 'credits'::regnamespace AND relkind = 'r'"
        " AND reloptions IS NOT NULL"
    )
    return {row["relname"]: sorted(row["reloptions"]) for row in rows}


def test_a_partition_that_upkeep_makes_is_frozen_as_early_as_those_of_the_migration(world: World) -> None:
    made = [row["name"] for row in world.rows(_ENSURE)]
    assert len(made) == 2
    after = parameters(world)
    for name in made:
        assert "autovacuum_freeze_min_age=0" in after[name]
        assert after[name] == after["credit_refresh_histories_default"] == after["credit_audit_logs_default"]


def test_down_and_up_again_leaves_the_same_parameters(world: World) -> None:
    before = parameters(world)
    assert "fillfactor=90" in before["users"]
    downgrade(world.database, "0003")
    assert parameters(world) == {"credit_refresh_batches": ["fillfactor=50"]}
    made = [row["name"] for row in world.rows(_ENSURE)]
    assert not parameters(world).keys() & set(made)
    migrate(world.database)
    assert {name: parameters(world)[name] for name in before} == before


def test_what_a_host_sets_stays(world: World) -> None:
    world.sql.execute("ALTER TABLE users SET (autovacuum_vacuum_scale_factor = 0.5)")
    migrate(world.database)
    world.rows(_ENSURE)
    assert "autovacuum_vacuum_scale_factor=0.5" in parameters(world)["users"]
