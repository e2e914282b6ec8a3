"""The states of runs and batches: each arrow that docs/runs.md draws is walked, every other one is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from refresh import delivery, runs, totals
from refresh.cancel import cancel_run
from tests.integration.test_isolation import poison

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.world import World

START = "[*]"
RUN_STATES = ("running", "succeeded", "partial", "failed", "cancelled")
BATCH_STATES = ("pending", "done", "failed", "cancelled")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "runs.md"

Arrow = tuple[str, str]


def drawn(what: str) -> set[Arrow]:
    section = DOCUMENT.read_text(encoding="utf-8").split(f"## The states of a {what}\n")[1].split("```")[1]
    return set(re.findall(r"^ +(\S+) --> (\w+):", section, re.MULTILINE))


def opened(world: World) -> runs.Opened:
    world.users(4)
    return world.scan(batch_size=2)


def empty(world: World) -> runs.Opened:
    return world.scan()


def ended(world: World, *bad: str) -> runs.Opened:
    world.users(4)
    if bad:
        poison(world, *bad)
    run = world.scan(batch_size=2)
    world.work(world.claim(run))
    return run


def given_up(world: World) -> runs.Opened:
    run = opened(world)
    world.sql.execute("UPDATE credit_refresh_batches SET attempts = 5, error = 'boom'")
    with world.database.statements() as connection:
        delivery.give_up_batches(connection, max_attempts=5)
        totals.finish_runs(connection)
    return run


def cancelled(world: World) -> runs.Opened:
    run = opened(world)
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        cancel_run(connection, run.run_id, actor="test", reason="test")
    return run


RUN_WALKS: dict[Arrow, Callable[[World], runs.Opened]] = {
    (START, "running"): opened,
    (START, "succeeded"): empty,
    ("running", "succeeded"): ended,
    ("running", "partial"): lambda world: ended(world, "user-1"),
    ("running", "failed"): lambda world: ended(world, *(f"user-{n}" for n in range(1, 5))),
    ("running", "cancelled"): cancelled,
}
BATCH_WALKS: dict[Arrow, Callable[[World], runs.Opened]] = {
    (START, "pending"): opened,
    ("pending", "done"): ended,
    ("pending", "failed"): given_up,
    ("pending", "cancelled"): cancelled,
}


def test_the_drawings_name_each_state() -> None:
    assert {state for arrow in drawn("run") for state in arrow} == {START, *RUN_STATES}
    assert {state for arrow in drawn("batch") for state in arrow} == {START, *BATCH_STATES}
    assert drawn("run") == RUN_WALKS.keys()
    assert drawn("batch") == BATCH_WALKS.keys()


@pytest.mark.parametrize("arrow", RUN_WALKS, ids="-".join)
def test_a_run_walks_each_arrow(world: World, arrow: Arrow) -> None:
    run = RUN_WALKS[arrow](world)
    row = world.row("SELECT status, finished_at IS NULL AS running FROM credit_refresh_runs WHERE id = %s", run.run_id)
    assert row == {"status": arrow[1], "running": arrow[1] == "running"}


@pytest.mark.parametrize("arrow", BATCH_WALKS, ids="-".join)
def test_a_batch_walks_each_arrow(world: World, arrow: Arrow) -> None:
    BATCH_WALKS[arrow](world)
    assert world.rows("SELECT DISTINCT status FROM credit_refresh_batches") == [{"status": arrow[1]}]


def insert_run(world: World, status: str, *, batches: int = 1) -> object:
    return world.value(
        """
        INSERT INTO credit_refresh_runs (source, requested_by, status, batches_total, finished_at)
        SELECT 'cli', 'test', s, %s, CASE WHEN s <> 'running' THEN now() END FROM (VALUES (%s)) AS v (s)
        RETURNING id
        """,
        batches,
        status,
    )


def insert_batch(world: World, status: str) -> object:
    return world.value(
        "INSERT INTO credit_refresh_batches (run_id, seq, user_ids, status) VALUES (%s, 0, '{}', %s) RETURNING id",
        insert_run(world, "running"),
        status,
    )


def turn_run(world: World, run_id: object, status: str) -> None:
    ends = "NULL" if status == "running" else "now()"
    world.sql.execute(
        f"UPDATE credit_refresh_runs SET status = %s, finished_at = {ends} WHERE id = %s",  # noqa: S608 - one of two
        (status, run_id),
    )


def turn_batch(world: World, batch_id: object, status: str) -> None:
    world.sql.execute("UPDATE credit_refresh_batches SET status = %s WHERE id = %s", (status, batch_id))


@pytest.mark.parametrize("state", RUN_STATES)
def test_every_other_change_of_a_run_is_refused(world: World, state: str) -> None:
    for target in RUN_STATES:
        run_id = insert_run(world, "running")
        if state != "running":
            turn_run(world, run_id, state)
        if (state, target) in drawn("run") or state == target:
            turn_run(world, run_id, target)
            continue
        with pytest.raises(psycopg.errors.CheckViolation, match=f"from {state} to {target} there is no way"):
            turn_run(world, run_id, target)


@pytest.mark.parametrize("state", BATCH_STATES)
def test_every_other_change_of_a_batch_is_refused(world: World, state: str) -> None:
    for target in BATCH_STATES:
        batch_id = insert_batch(world, "pending")
        if state != "pending":
            turn_batch(world, batch_id, state)
        if (state, target) in drawn("batch") or state == target:
            turn_batch(world, batch_id, target)
            continue
        with pytest.raises(psycopg.errors.CheckViolation, match=f"from {state} to {target} there is no way"):
            turn_batch(world, batch_id, target)


@pytest.mark.parametrize("state", RUN_STATES)
def test_every_other_beginning_of_a_run_is_refused(world: World, state: str) -> None:
    if (START, state) in drawn("run"):
        insert_run(world, state, batches=0 if state == "succeeded" else 1)
    if state != "running":  # what has batches begins with them
        with pytest.raises(psycopg.errors.CheckViolation, match=f"from nothing to {state} there is no way"):
            insert_run(world, state)


@pytest.mark.parametrize("state", BATCH_STATES)
def test_every_other_beginning_of_a_batch_is_refused(world: World, state: str) -> None:
    if (START, state) in drawn("batch"):
        insert_batch(world, state)
        return
    with pytest.raises(psycopg.errors.CheckViolation, match=f"from nothing to {state} there is no way"):
        insert_batch(world, state)
