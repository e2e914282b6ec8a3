"""A service with years behind it, for the tests of retention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refresh import retention, rollback, runs
from tests.integration import rollbacks
from tests.integration.books import age, spend
from tests.integration.test_verify import found

if TYPE_CHECKING:
    from uuid import UUID

    from tests.integration.world import World

_CHILDREN = """
SELECT c.relname AS name FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE c.relkind = 'r' AND c.relname ~ '^credit_' ORDER BY 1
"""
KEPT = retention.Terms(months=13, planned_days=90)


def make_partitions(world: World, years: int = 4) -> None:
    """As a service has them that has been there for so long."""
    world.sql.execute("SELECT ensure_partitions(now() - make_interval(months => %s), %s)", (12 * years, 12 * years))


def retain(world: World, terms: retention.Terms = KEPT) -> retention.Report:
    with world.database.statements() as connection:
        return retention.carry_out(connection, terms, actor="test")


def survey(world: World, terms: retention.Terms = KEPT) -> retention.Survey:
    with world.database.statements() as connection:
        return retention.survey(connection, terms)


def live_for_years(world: World) -> None:
    """Three years of everything that leaves rows, by real runs; the last one was just now."""
    make_partitions(world)
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, interval_days) VALUES"
        " ('yearly', 'Yearly', 5000, 365), ('decade', 'Decade', 9000, 3650), ('hand', 'By hand', 50, 30)"
    )
    world.sql.execute("UPDATE plans SET cadence = 'external' WHERE code = 'hand'")
    world.users(20)
    for name, plan in (("yearly", "yearly"), ("decade", "decade"), ("left", "free"), ("gone", "free")):
        world.user(name, plan_code=plan)
    world.user("by-hand", plan_code="hand", due_in=None)
    world.user("given-back", credit_balance=0)
    world.user("held", credit_refresh_hold=True)
    world.refresh()
    early = world.scan(force=True, keep_window=True, amount=2_000)
    world.work(world.claim(early))
    age(world, "31 days")
    run = world.scan()
    world.work(world.claim(run))
    rollbacks.roll_back(world, run, reopen=True, users=["user-1", "user-2", "given-back"])
    world.sql.execute("UPDATE users SET active = false WHERE external_id IN ('left', 'given-back')")
    world.sql.execute("DELETE FROM users WHERE external_id = 'gone'")
    for month in range(33):
        spend(world)
        age(world, "31 days")
        if month == 30:
            world.refresh(dry_run=True, reason="look")
        run = world.scan()
        world.work(world.claim(run))
        if month in {18, 31}:
            rollbacks.roll_back(world, run, reopen=month == 31, users=["user-3", "user-4"])


def old_rows(world: World) -> list[dict[str, Any]]:
    """What is left of the time before the books."""
    return world.rows(
        "SELECT h.*, u.external_id FROM credit_refresh_histories AS h LEFT JOIN users AS u ON u.id = h.user_id"
        " WHERE h.window_start < (SELECT books_since FROM settings) ORDER BY h.id"
    )


def two_visits(world: World, *names: str, days: int = 500) -> None:
    """Users who were refreshed long ago; those whose name is not `left` were refreshed just now, too."""
    make_partitions(world, years=2)
    for name in names:
        world.user(name)
    world.refresh()
    world.sql.execute("UPDATE users SET active = false WHERE external_id = 'left'")
    age(world, f"{days} days")
    spend(world)
    world.refresh()


def month_of(row: dict[str, Any]) -> str:
    """The partition of a row of history."""
    return f"credit_refresh_histories_y{row['window_start']:%Y}m{row['window_start']:%m}"


def months(world: World) -> list[str]:
    """The partitions of both ledgers."""
    return [row["name"].removeprefix("credit_") for row in world.rows(_CHILDREN)]


def names(world: World) -> list[str]:
    """What the auditor finds."""
    return sorted(finding.name for finding in found(world))


def roll_back_later(world: World, run_id: UUID) -> runs.Opened:
    """A rollback whose batches are still to be done."""
    asked = rollback.Asked(run_id=run_id)
    request = asked.request(runs.Request("cli", "kim", 100, reason="late"))
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        opened = rollback.open_rollback(connection, request, asked)
    assert isinstance(opened, runs.Opened)
    return opened
