"""bench/leanest.sql, the benchmark's least statement: right as it is, and wrong without any of its clauses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest

from bench.bare import LEANEST

if TYPE_CHECKING:
    from tests.integration.world import World

RUN = UUID(int=1)
CLAUSES = {
    "whose ids": "WHERE id = ANY (%(user_ids)s) AND next_refresh_at <= now()|WHERE next_refresh_at <= now()",
    "due": " AND next_refresh_at <= now()|",
    "active": " AND active|",
    "not held": " AND NOT credit_refresh_hold|",
    "lock": "    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED\n|",
    "skip locked": " SKIP LOCKED|",
    "never lower": "greatest(p.amount - l.credit_balance, 0), greatest(p.amount, l.credit_balance)"
    "|p.amount - l.credit_balance, p.amount",
    "the grid": "date_bin(p.step, now(), l.next_refresh_at),|l.next_refresh_at,",
    "the grid's end": "date_bin(p.step, now(), l.next_refresh_at) + p.step|now() + p.step",
    "active plans": " WHERE active) AS p|) AS p",
    "the key": "    ON CONFLICT DO NOTHING\n|",
    "balance": "credit_balance = u.credit_balance + h.credits_added, |",
    "last refresh": "last_credit_refresh = now(),|",
    "date": "next_refresh_at = h.window_end, |",
    "whose balance": "WHERE u.id = h.user_id|",
}


def settle(world: World, statement: str) -> object:
    """What the statement makes of users of every sort; a name instead, where it raises or waits."""
    world.sql.execute("INSERT INTO plans (code, name, amount, active) VALUES ('old', 'Old', 9, false)")
    ids = [
        world.user("due"),
        world.user("long due", due_in="-100 days"),
        world.user("rich", credit_balance=5_000),
        world.user("later", due_in="1 day"),
        world.user("inactive", active=False),
        world.user("held", credit_refresh_hold=True),
        world.user("old", plan_code="old"),
    ]
    granted, locked = world.user("granted"), world.user("locked")
    world.user("not asked for")
    world.sql.execute(
        """
        INSERT INTO credit_refresh_histories
            (source, user_id, status, window_start, window_end, old_balance, credits_added, new_balance)
        SELECT 'function', id, 'refreshed', next_refresh_at, next_refresh_at + interval '30 days', 0, 400, 400
        FROM users WHERE id = %s
        """,
        (granted,),
    )
    with world.host() as host:
        host.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (locked,))
        world.sql.execute("SET lock_timeout = '200ms'")
        try:
            world.sql.execute(statement, {"user_ids": [*ids, granted, locked], "run_id": RUN})
        except psycopg.Error as error:
            return type(error).__name__
    return _books(world)


def _books(world: World) -> list[dict[str, Any]]:
    return world.rows(
        """
        SELECT u.external_id, u.credit_balance, u.next_refresh_at - u.created_at AS next_in,
            u.last_credit_refresh IS NOT NULL AS refreshed, h.old_balance, h.credits_added, h.new_balance,
            h.window_start - u.created_at AS started, h.window_end - u.created_at AS ended, a.credits, a.balance_after
        FROM users AS u
        LEFT JOIN credit_refresh_histories AS h ON h.user_id = u.id AND h.run_id = %s
        LEFT JOIN credit_audit_logs AS a ON a.user_id = u.id AND a.run_id = %s
        ORDER BY u.id
        """,
        RUN,
        RUN,
    )


def test_it_refreshes_whoever_is_due_and_nobody_else(world: World) -> None:
    books = settle(world, LEANEST)
    assert isinstance(books, list)
    balances = {row["external_id"]: (row["credit_balance"], row["credits_added"], row["credits"]) for row in books}
    assert balances == {
        "due": (1_000, 600, 600),
        "long due": (1_000, 600, 600),
        "rich": (5_000, 0, 0),
        **dict.fromkeys(("later", "inactive", "held", "old", "granted", "locked", "not asked for"), (400, None, None)),
    }


@pytest.mark.parametrize("clause", CLAUSES)
def test_without_any_clause_it_is_wrong(world: World, clause: str) -> None:
    whole, _, rest = CLAUSES[clause].partition("|")
    assert LEANEST.count(whole) == 1
    books = settle(world, LEANEST.replace(whole, rest))
    assert isinstance(books, str) or _wrong(books)


def _wrong(books: object) -> bool:
    """Whether somebody's row is not what it has to be."""
    assert isinstance(books, list)
    for row in books:
        name, refreshed = row["external_id"], row["external_id"] in {"due", "long due", "rich"}
        if refreshed != (row["credits_added"] is not None) or refreshed != row["refreshed"]:
            return True
        if row["credit_balance"] != {"due": 1_000, "long due": 1_000, "rich": 5_000}.get(name, 400):
            return True
        if refreshed and (row["ended"] != row["next_in"] or row["balance_after"] != row["credit_balance"]):
            return True
        # Windows of 30 days that hold the present, on the user's own grid.
        days = (row["ended"] - row["started"]).days if refreshed else 30
        if days != 30 or (refreshed and (row["started"].total_seconds() + 3_600) % 86_400 > 1):
            return True
    return False
