"""Books for the auditor: a service with a past, and a ledger of any size."""

from __future__ import annotations

from datetime import time
from typing import TYPE_CHECKING

from psycopg import sql

from refresh import plans
from tests.integration import applying, rollbacks

if TYPE_CHECKING:
    from tests.integration.world import World

_INSTANTS = {
    "users": ("next_refresh_at", "last_credit_refresh", "hold_until", "held_window", "created_at", "updated_at"),
    "credit_refresh_runs": ("created_at", "started_at", "finished_at", "slot", "as_of"),
    "credit_refresh_batches": ("next_attempt_at", "published_at", "finished_at"),
    "credit_refresh_histories": (
        "window_start", "window_end", "first_missed_at", "previous_next_refresh_at", "previous_last_refresh",
        "created_at",
    ),
    "credit_audit_logs": ("occurred_at",),
}  # fmt: skip


def age(world: World, by: str) -> None:
    """Let time pass: everything happened that much earlier."""
    world.sql.execute("SET session_replication_role = replica")
    for table, columns in _INSTANTS.items():
        moved = [sql.SQL("{0} = {0} - {1}::interval").format(sql.Identifier(column), by) for column in columns]
        world.sql.execute(sql.SQL("UPDATE {} SET {}").format(sql.Identifier(table), sql.SQL(", ").join(moved)))
    world.sql.execute("RESET session_replication_role")


def spend(world: World, credits_spent: int = 100) -> None:
    """What hosts do."""
    world.sql.execute("UPDATE users SET credit_balance = credit_balance - %s", (credits_spent,))


def regrid(world: World, code: str, **changes: object) -> None:
    """Change a plan and move its users."""
    with world.database.transaction() as connection:
        run = plans.save(connection, plans.draft(connection, code, changes), actor="test", batch_size=100)
    world.work(world.claim(run))


def live(world: World) -> None:
    """Half a year of a service in which everything happens that is anybody's right."""
    world.users(120)
    world.user("held", credit_refresh_hold=True)
    world.user("briefly-held", credit_refresh_hold=True, hold_for="1 hour")
    world.user("inactive", active=False)
    world.user("unscheduled", due_in=None)
    world.sql.execute("INSERT INTO plans (code, name, amount, grant_mode) VALUES ('add', 'Add', 50, 'add')")
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, grant_mode, rollover_cap) VALUES ('roll', 'Roll', 50, 'rollover', 20)"
    )
    world.sql.execute("INSERT INTO plans (code, name, amount, grant_mode) VALUES ('reset', 'Reset', 500, 'reset')")
    for code in ("add", "roll", "reset"):
        world.user(f"on-{code}", plan_code=code, credit_balance=900)
    world.user("too-rich", plan_code="add", credit_balance=2**63 - 1)
    world.sql.execute("INSERT INTO users (external_id, plan_code) VALUES ('new', 'free'), ('planless', NULL)")
    planned = applying.plan(world)
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = credit_balance - 1 WHERE external_id IN ('user-7', 'user-8')")
        run = world.scan()
        world.work(world.claim(run))
    rollbacks.roll_back(world, run, reopen=True, users=[f"user-{number}" for number in range(9, 30)])
    applied = applying.opened(world, planned)  # at once: a plan's digest is of its instants, which age() moves
    world.work(world.claim(applied))
    _later(world)
    spend(world)
    world.sql.execute("UPDATE users SET credit_balance = 0 WHERE external_id = 'too-rich'")
    age(world, "31 days")
    world.sql.execute("SELECT refresh_credits_if_due('user-3')")
    _next_month(world)
    age(world, "70 days")
    world.sql.execute("UPDATE users SET credit_refresh_hold = false WHERE external_id = 'held'")
    run = world.scan()
    world.work(world.claim(run))
    spend(world)
    rollbacks.roll_back(world, run, allow_negative=True, users=["user-11", "user-12", "on-reset"])
    world.sql.execute(
        "UPDATE users SET next_refresh_at = next_refresh_at + interval '9 days' WHERE external_id = 'new'"
    )
    age(world, "15 days")
    world.refresh(force=True, keep_window=True, amount=1_500)
    regrid(world, "free", cadence="daily", time_of_day=time(4))
    spend(world)
    age(world, "35 days")
    world.refresh()
    world.user("just-due", due_in="-1 minute")
    world.scan()


def _next_month(world: World) -> None:
    world.refresh()
    world.sql.execute("UPDATE users SET plan_code = 'add' WHERE external_id IN ('user-1', 'user-2', 'planless')")
    world.sql.execute("UPDATE users SET credit_refresh_day = 31 WHERE external_id IN ('user-1', 'user-4')")
    forced = world.scan(force=True)
    world.work(world.claim(forced))
    rollbacks.roll_back(world, forced, users=["user-20", "user-21", "on-add"])
    regrid(world, "free", cadence="monthly", day_of_month=15)
    world.sql.execute("DELETE FROM users WHERE external_id = 'user-5'")
    spend(world)


def _later(world: World) -> None:
    """Whom the host had locked is tried again."""
    age(world, "10 minutes")
    world.sql.execute("UPDATE credit_refresh_batches SET next_attempt_at = now() WHERE status = 'pending'")
    world.work(world.claim())


LEDGER = """
WITH made AS (
    INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at, last_credit_refresh)
    SELECT
        'many-' || n, 'free', 0, date_trunc('hour', now()) + interval '20 days',
        date_trunc('hour', now()) - interval '10 days'
    FROM generate_series(1, %(users)s) AS n
    RETURNING id, next_refresh_at
),
history AS (
    INSERT INTO credit_refresh_histories (
        source, user_id, status, window_start, window_end, plan_code, grant_mode, target, old_balance, credits_added,
        new_balance, previous_next_refresh_at, previous_last_refresh, reason, created_at
    )
    SELECT
        'function', id, 'refreshed', w.ends - interval '720 hours', w.ends, 'free', 'fill', 1000, 0, 1000, 1000,
        w.ends - interval '720 hours', CASE WHEN n < %(windows)s THEN w.ends - interval '1440 hours' END, 'function',
        w.ends - interval '720 hours'
    FROM generate_series(%(windows)s, 1, -1) AS n
    CROSS JOIN made
    CROSS JOIN LATERAL (SELECT next_refresh_at - interval '720 hours' * (n - 1) AS ends) AS w
    RETURNING user_id, created_at
)
INSERT INTO credit_audit_logs (occurred_at, actor, action, user_id, balance_before, balance_after, credits)
SELECT created_at, 'host', 'refreshed', user_id, 0, 1000, 1000 FROM history
"""
"""Users with so many grants each, by a function of the host's; all of it in order."""
