"""`credits db triggers on|off`: the spend itself refreshes whoever is due, first the grant and then the spend."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest

from refresh.switch import turn_trigger
from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

SPEND = "UPDATE users SET credit_balance = credit_balance - 100 WHERE id = %s"


def turn(world: World, *, on: bool, wait: timedelta = timedelta(seconds=5)) -> bool:
    with world.database.transaction(lock_timeout=wait) as connection:
        return turn_trigger(connection, on=on, actor="cli:ops")


def test_on_a_spend_refreshes_who_is_due_once(world: World) -> None:
    ada, bob = world.user(), world.user("bob", due_in="1 hour")
    turn(world, on=True)
    for _ in range(2):
        world.sql.execute(SPEND, (ada,))
        world.sql.execute(SPEND, (bob,))
    assert (world.see(ada)["credit_balance"], world.see(bob)["credit_balance"]) == (800, 200)
    (history,) = world.history(ada)
    assert (history["source"], history["credits_added"], history["old_balance"]) == ("trigger", 600, 400)
    assert world.refresh().users_selected == 0


def test_on_our_own_statements_do_not_set_it_off(world: World) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'reset', amount = 100 WHERE code = 'free'")
    ada = world.user()
    turn(world, on=True)
    world.refresh()
    assert world.see(ada)["credit_balance"] == 100
    assert [row["source"] for row in world.history(ada)] == ["run"]


@pytest.mark.parametrize("keep_window", [True, False])
@pytest.mark.parametrize(("mode", "left"), [("reset", 1_000), ("rollover", 1_300)])
def test_on_a_forced_grant_that_lowers_is_no_spend(world: World, mode: str, left: int, *, keep_window: bool) -> None:
    """The date that it keeps, or comes to by itself, has passed between the run's opening and its batch."""
    due = world.value("SELECT date_trunc('minute', now(), 'UTC') - interval '30 minutes'")
    world.sql.execute(
        "UPDATE plans SET grant_mode = %s, rollover_cap = 300, cadence = 'daily', time_of_day = %s WHERE code = 'free'",
        (mode, due.time()),
    )
    ada = world.user(credit_balance=5_000)
    world.sql.execute("UPDATE users SET next_refresh_at = %s WHERE id = %s", (due, ada))
    turn(world, on=True)
    world.refresh(force=True, keep_window=keep_window, as_of=due - timedelta(minutes=10))
    user = world.see(ada)
    assert (user["credit_balance"], user["next_refresh_at"]) == (left, due)
    assert [(row["source"], row["credits_added"]) for row in world.history(ada)] == [("run", left - 5_000)]
    world.sql.execute(SPEND, (ada,))  # the window that is due by now
    assert [row["source"] for row in world.history(ada)] == ["run", "trigger"]


def test_off_a_spend_refreshes_nobody(world: World) -> None:
    ada = world.user()
    turn(world, on=True)
    turn(world, on=False)
    world.sql.execute(SPEND, (ada,))
    assert (world.see(ada)["credit_balance"], world.history(ada)) == (300, [])


def test_turning_twice_changes_nothing_more(world: World) -> None:
    assert [turn(world, on=on) for on in (False, True, True, False, False)] == [False, True, False, True, False]
    rows = world.rows("SELECT actor, action FROM credit_audit_logs ORDER BY occurred_at, id")
    assert [(row["actor"], row["action"]) for row in rows] == [
        ("cli:ops", "spend_trigger_on"),
        ("cli:ops", "spend_trigger_off"),
    ]


def test_a_busy_table_is_not_waited_for_long(world: World) -> None:
    world.user()
    with world.host() as host:
        host.execute(SPEND, (1,))
        with pytest.raises(psycopg.errors.LockNotAvailable):
            turn(world, on=True, wait=timedelta(milliseconds=50))
    assert world.value("SELECT count(*) FROM credit_audit_logs") == 0


@pytest.mark.usefixtures("world")
def test_the_command(cli: Cli) -> None:
    assert cli.says("db", "triggers", "on") == "A spend now refreshes whoever is due first.\n"
    assert cli.facts("db", "triggers", "on") == {"triggers": True, "changed": False}
    assert cli.says("db", "check")
    assert cli.facts("db", "triggers", "off") == {"triggers": False, "changed": True}
    assert cli.says("db", "check")
    refused(cli("db", "triggers", "perhaps"), 2, "'on', 'off'")
