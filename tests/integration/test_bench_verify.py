"""What the benchmarks take for a right repetition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.worlds import verify

if TYPE_CHECKING:
    from tests.integration.world import World

USERS = 30
SPOILT = {
    "a balance": "UPDATE users SET credit_balance = credit_balance - 1 WHERE external_id = 'user-7'",
    "a date": "UPDATE users SET next_refresh_at = next_refresh_at + interval '1 s' WHERE external_id = 'user-7'",
    "a lost row": "DELETE FROM credit_refresh_histories WHERE id = (SELECT min(id) FROM credit_refresh_histories)",
    "a second audit row": """
        INSERT INTO credit_audit_logs (actor, action, user_id, run_id, balance_before, balance_after, credits)
        SELECT actor, action, user_id, run_id, balance_before, balance_after, credits FROM credit_audit_logs
        WHERE action = 'refreshed' LIMIT 1
    """,
    "another user": "INSERT INTO users (external_id, plan_code) VALUES ('late', 'free')",
}


def refresh(world: World) -> None:
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)"
        " SELECT 'user-' || n, 'free', 0, now() - interval '1 hour' FROM generate_series(1, %s) AS n",
        (USERS,),
    )
    world.sql.execute("UPDATE users SET credit_balance = id %% 1000", ())
    world.work(world.claim(world.scan()))


def test_everybody_once_is_right(world: World, database_url: str) -> None:
    refresh(world)
    verify(database_url, USERS)
    with pytest.raises(SystemExit, match="exactly once"):
        verify(database_url, USERS + 1)


@pytest.mark.parametrize("what", SPOILT)
def test_anything_else_is_not(world: World, database_url: str, what: str) -> None:
    refresh(world)
    world.sql.execute(SPOILT[what])
    with pytest.raises(SystemExit, match="exactly once"):
        verify(database_url, USERS)


def test_everybody_alone_is_another_thing(world: World, database_url: str) -> None:
    world.sql.execute("INSERT INTO users (external_id, plan_code, credit_balance) VALUES ('user-1', 'free', 1)")
    world.sql.execute("UPDATE users SET next_refresh_at = now() - interval '1 hour'")
    world.refresh()
    verify(database_url, 1)
    verify(database_url, 1, alone=True)
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)"
        " VALUES ('user-2', 'free', 2, now() - interval '1 hour')"
    )
    world.refresh()
    verify(database_url, 2, alone=True)
    with pytest.raises(SystemExit, match="exactly once"):
        verify(database_url, 2)
