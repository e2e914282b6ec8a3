"""Every two of scan, force, function, spend trigger, hold, plan change and spend meet over one user, in both orders.

The first has the user's row and has not ended; the second is seen waiting for it in pg_stat_activity; then the first
commits, or rolls back. What the two leave behind is what they would have left one after the other: a small model of
them says what that is, to the credit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import pytest

from refresh.switch import turn_trigger
from refresh.work import do_batch, pending_batches
from tests.integration.ledger import check_ledger

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    import psycopg

    from refresh import runs
    from tests.integration.world import World

    Act = Callable[[World, psycopg.Connection[Any], int], None]

OPENING = 400
SPENT = 30
AMOUNTS = {"free": 1_000, "pro": 20_000}
SPEND = "UPDATE users SET credit_balance = credit_balance - %s WHERE id = %s"


@dataclass
class Model:
    """One user, who is due, and what each of the seven does to them."""

    trigger: bool
    balance: int = OPENING
    spent: int = 0
    plan: str = "free"
    held: bool = False
    noted: bool = False
    sources: list[str] = field(default_factory=list)

    def _refresh(self, source: str, *, force: bool = False) -> None:
        if self.sources and (not force or self.held):
            return  # the next window is a month away
        if self.held:
            self.noted = True
        else:
            self.balance = max(self.balance, AMOUNTS[self.plan])
            self.sources.append(source)

    def scan(self) -> None:
        self._refresh("run")

    def force(self) -> None:
        self._refresh("run", force=True)

    def function(self) -> None:
        self._refresh("function")

    def spend(self) -> None:
        if self.trigger:
            self._refresh("trigger")
        self.balance -= SPENT
        self.spent += SPENT

    def spend_trigger(self) -> None:
        self.spend()

    def hold(self) -> None:
        self.held = True

    def plan_change(self) -> None:
        self.plan = "pro"


# Of two batches with this user, which two runs would have to have opened, each of two workers has one.
_FREE_BATCH = """
SELECT b.id FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE b.user_ids = ARRAY[%s]::bigint[] AND b.status = 'pending' AND r.force = %s
ORDER BY b.id LIMIT 1 FOR NO KEY UPDATE OF b SKIP LOCKED
"""


def work(connection: psycopg.Connection[Any], user_id: int, *, force: bool) -> None:
    """A worker with a batch of this user alone, inside a transaction that it would not have: the test ends it."""
    found = connection.execute(_FREE_BATCH, (user_id, force)).fetchone()
    assert found is not None
    for pending in pending_batches(connection, list(found)):
        assert do_batch(connection, pending) is not None


def scan(_world: World, connection: psycopg.Connection[Any], user_id: int) -> None:
    work(connection, user_id, force=False)


def force(_world: World, connection: psycopg.Connection[Any], user_id: int) -> None:
    work(connection, user_id, force=True)


def function(world: World, connection: psycopg.Connection[Any], user_id: int) -> None:
    connection.execute("SELECT refresh_credits_if_due(%s)", (world.see(user_id)["external_id"],))


def spend(_world: World, connection: psycopg.Connection[Any], user_id: int) -> None:
    connection.execute(SPEND, (SPENT, user_id))


def hold(_world: World, connection: psycopg.Connection[Any], user_id: int) -> None:
    connection.execute("UPDATE users SET credit_refresh_hold = true, hold_reason = 'race' WHERE id = %s", (user_id,))


def plan_change(_world: World, connection: psycopg.Connection[Any], user_id: int) -> None:
    connection.execute("UPDATE users SET plan_code = 'pro' WHERE id = %s", (user_id,))


ACTS: dict[str, Act] = {
    "scan": scan,
    "force": force,
    "function": function,
    "spend_trigger": spend,
    "hold": hold,
    "plan_change": plan_change,
    "spend": spend,
}


def turn_on(world: World) -> None:
    with world.database.transaction(lock_timeout=timedelta(seconds=5)) as connection:
        assert turn_trigger(connection, on=True, actor="test")


def meet(world: World, user_id: int, first: str, second: str, *, commits: bool) -> None:
    """The second comes while the first has the user, and both end."""
    with (
        world.host() as one,
        world.host() as other,
        world.calls(lambda: ACTS[second](world, other, user_id)) as coming,
    ):
        ACTS[first](world, one, user_id)
        coming.start()
        world.until(lambda: world.waiting("host") == 1, f"{second} waits for {first}")
        if commits:
            one.commit()
        else:
            one.rollback()
        coming.results()
        other.commit()


def finish(world: World) -> None:
    """What upkeep does: work off what is pending. And the scan of the hour after."""
    for _ in range(2):
        world.work([row["id"] for row in world.rows("SELECT id FROM credit_refresh_batches WHERE status = 'pending'")])
        world.refresh()


def compare(world: World, user_id: int, model: Model) -> None:
    user = world.see(user_id)
    granted = [row["source"] for row in world.history(user_id) if row["status"] == "refreshed"]
    noted = [row for row in world.history(user_id) if row["status"] == "held"]
    assert granted == model.sources
    assert len(noted) == model.noted
    assert user["credit_balance"] == model.balance
    assert (user["plan_code"], user["credit_refresh_hold"]) == (model.plan, model.held)
    assert user["last_credit_refresh"] == (world.history(user_id)[-1]["created_at"] if granted else None)


# No second run batches a user who is in an unfinished batch; these are smuggled in.
_SECOND_BATCH = """
INSERT INTO credit_refresh_batches (run_id, seq, user_ids)
SELECT run_id, 1, user_ids FROM credit_refresh_batches WHERE run_id = %s
"""
_FOR = "UPDATE credit_refresh_batches SET user_ids = %s::bigint[] WHERE run_id = ANY (%s)"


def open_runs(world: World, user_id: int, *, scans: int = 1, forced: int = 0) -> runs.Opened:
    """A scan over all who are due, and forced runs over one user, whose instant is that of their opening."""
    opened: list[UUID] = []
    for _ in range(forced):
        opened.append(world.scan(force=True).run_id)
        world.sql.execute(_FOR, ([], opened))
    run = world.scan()
    world.sql.execute(_FOR, ([user_id], opened))
    if scans > 1:
        world.sql.execute(_SECOND_BATCH, (run.run_id,))
    return run


# What force grants overlaps what was granted already; the rest of the ledger holds with it, too.
_UNTOLD = """
SELECT user_id, run_id, old_balance, credits_added, created_at FROM credit_refresh_histories WHERE status = 'refreshed'
EXCEPT ALL
SELECT user_id, run_id, balance_before, credits, occurred_at FROM credit_audit_logs WHERE action = 'refreshed'
"""


def check_books(world: World, rest: dict[int, int], *, forced: bool) -> None:
    if not forced:
        check_ledger(world, rest)
        return
    assert world.rows(_UNTOLD) == []
    for user_id, not_ours in rest.items():
        granted = sum(row["credits_added"] for row in world.history(user_id))
        assert world.see(user_id)["credit_balance"] == granted + not_ours


PAIRS = [(one, other) for one, other in combinations_with_replacement(ACTS, 2)]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_at_once_leave_what_one_after_the_other_would(world: World, one: str, other: str) -> None:
    trigger = "spend_trigger" in (one, other)
    if trigger:
        turn_on(world)
    rest: dict[int, int] = {}
    for first, second in dict.fromkeys([(one, other), (other, one)]):
        for commits in (True, False):
            user_id = world.user(f"{first}-{second}-{commits}")
            open_runs(world, user_id, scans=1 + (first == second == "scan"), forced=(first, second).count("force"))
            meet(world, user_id, first, second, commits=commits)
            model = Model(trigger)
            for act in (first, second) if commits else (second,):
                getattr(model, act)()
            compare(world, user_id, model)
            finish(world)
            # Batches in the order of their runs: what was rolled back is done now.
            if first == "force" and not commits:
                model.force()
            model.scan()
            compare(world, user_id, model)
            rest[user_id] = OPENING - model.spent
    check_books(world, rest, forced="force" in (one, other))


@pytest.mark.parametrize("first", [name for name in ACTS if name != "scan"])
def test_a_batch_of_many_leaves_the_user_to_a_batch_of_their_own(world: World, first: str) -> None:
    """It does not wait: what it finds locked it defers, and what the first has done counts when it is taken up."""
    if first == "spend_trigger":
        turn_on(world)
    ada, bob = world.user(), world.user("bob")
    run = open_runs(world, ada, forced=int(first == "force"))
    model, other = Model(trigger=first == "spend_trigger"), Model(trigger=False)
    with world.host() as host:
        ACTS[first](world, host, ada)
        (done,) = world.work(world.claim(run))
        assert (done.users_refreshed, done.users_deferred) == (1, 1)
        other.scan()
        compare(world, bob, other)
        host.commit()
    getattr(model, first)()
    finish(world)
    model.scan()
    compare(world, ada, model)
    compare(world, bob, other)
    assert world.progress(run).status == "succeeded"
    check_books(world, {ada: OPENING - model.spent, bob: OPENING}, forced=first == "force")


@pytest.mark.parametrize("path", ["function", "spend_trigger", "spend"])
def test_many_at_once_over_one_user(world: World, path: str) -> None:
    """Eight sessions, held back by one lock and let go together."""
    if path == "spend_trigger":
        turn_on(world)
    ada = world.user()
    sessions = 8

    def come() -> None:
        with world.host() as host:
            ACTS[path](world, host, ada)
            host.commit()

    with world.host() as gate, world.calls(*[come] * sessions) as calls:
        gate.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (ada,))
        calls.start()
        world.until(lambda: world.waiting("host") == sessions, "all wait for the gate")
        gate.rollback()
        calls.results()
    finish(world)
    spent = 0 if path == "function" else SPENT * sessions
    assert len(world.history(ada)) == 1
    assert world.see(ada)["credit_balance"] == (1_000 if path == "spend" else 1_000 - spent)
    check_ledger(world, {ada: OPENING - spent})
