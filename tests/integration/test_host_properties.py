"""Scan, view, functions, trigger and dry run never disagree, over made-up users of every cadence, mode and state."""

from __future__ import annotations

from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings

from refresh.switch import turn_trigger
from tests.integration.ledger import check_ledger
from tests.integration.population import add_plans, add_users, populations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.integration.world import World

People = list[dict[str, Any]]

# One database for all examples: each begins with an empty table of users, whose ids are new. They are the same ones in
# each run of the tests.
some = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
names = count(1)

DECISION = (
    "h.user_id, h.window_start, h.window_end, h.first_missed_at, h.windows_passed, h.plan_code, h.grant_mode, h.target,"
    " h.old_balance, h.credits_added, h.new_balance, h.previous_next_refresh_at, h.previous_last_refresh,"
    " h.shortfall"
)
_ROWS = f"""
SELECT {DECISION} FROM credit_refresh_histories AS h JOIN users AS u ON u.id = h.user_id
WHERE h.status = %s ORDER BY h.user_id
"""  # noqa: S608 - from the columns above
_VIEW = "SELECT id, credit_balance, next_refresh_at FROM user_credits_now ORDER BY id"
_USERS = "SELECT id, credit_balance, next_refresh_at FROM users ORDER BY id"
# Whose balance does not fit stays out: one credit less, and the grant might.
_SPEND = """
UPDATE users SET credit_balance = credit_balance - 1 WHERE credit_balance BETWEEN -(2 ^ 62) AND 2 ^ 62 RETURNING id
"""


@pytest.fixture
def planned(world: World) -> World:
    add_plans(world)
    with world.database.transaction(lock_timeout=timedelta(seconds=5)) as connection:
        turn_trigger(connection, on=True, actor="test")
    return world


def people(world: World, made_up: Sequence[dict[str, Any]], at: object = None) -> None:
    world.sql.execute("DELETE FROM users")
    add_users(world, f"example-{next(names)}", made_up, at)


def scan(world: World) -> set[int]:
    world.refresh()
    return set()


def if_due(world: World) -> set[int]:
    world.rows("SELECT refresh_credits_if_due(external_id) FROM users ORDER BY md5(external_id)")
    return set()


def due(world: World) -> set[int]:
    while world.value("SELECT refresh_due(7)")["more"]:
        pass
    # Those whose balance does not fit come back each time, and may be in the way of the others.
    world.value("SELECT refresh_due(1000)")
    return set()


def spend(world: World) -> set[int]:
    return {row["id"] for row in world.rows(_SPEND)}


PATHS = {"scan": scan, "if_due": if_due, "due": due, "spend": spend}


@pytest.mark.parametrize("path", PATHS)
def test_view_and_dry_run_say_beforehand_what_any_path_then_writes(planned: World, path: str) -> None:
    @some
    @given(populations)
    def agree(made_up: People) -> None:
        people(planned, made_up)
        shown = planned.rows(_VIEW)
        planned.refresh(dry_run=True)
        assert planned.rows(_USERS) != [] != shown
        spenders = PATHS[path](planned)
        for row in shown:
            row["credit_balance"] -= row["id"] in spenders
        assert planned.rows(_USERS) == shown
        assert planned.rows(_ROWS, "refreshed") == planned.rows(_ROWS, "planned")
        # Now that it has happened, the view shows what is there.
        assert planned.rows(_VIEW) == shown
        assert planned.value("SELECT count(*) FROM user_credits_now WHERE verdict = 'due'") == 0

    agree()
    check_ledger(planned)


AS_OF = ("2024-02-29 00:00+00", "2025-03-30 01:00+00", "2025-10-26 01:00+00", "2026-01-01 00:00+00")


@pytest.fixture(params=AS_OF)
def instant(request: pytest.FixtureRequest, planned: World) -> object:
    """Instants on which months turn and clocks change, as the run's own."""
    return planned.value("SELECT %s::timestamptz", request.param)


def test_a_dry_run_counts_what_the_scan_then_counts(planned: World, instant: object) -> None:
    @settings(some, max_examples=8)
    @given(populations)
    def agree(made_up: People) -> None:
        people(planned, made_up, instant)
        dry, wet = planned.refresh(dry_run=True, as_of=instant), planned.refresh(as_of=instant)
        counts = ("users_selected", "users_refreshed", "users_held", "users_failed", "users_skipped", "credits_granted")
        assert [getattr(dry, name) for name in counts] == [getattr(wet, name) for name in counts]
        assert planned.rows(_ROWS, "refreshed") == planned.rows(_ROWS, "planned")

    agree()
    check_ledger(planned)


_BOOKS = """
SELECT h.* FROM credit_refresh_histories AS h JOIN users AS u ON u.id = h.user_id
WHERE h.status IN ('refreshed', 'held') ORDER BY h.id
"""
_LOG = """
SELECT a.* FROM credit_audit_logs AS a JOIN users AS u ON u.id = a.user_id
WHERE a.action <> 'refresh_failed' ORDER BY a.id
"""


def test_a_scan_twice_is_a_scan_once(planned: World, instant: object) -> None:
    """But for those whose balance does not fit: they fail each time, and each time it is told."""

    def everything() -> list[list[dict[str, Any]]]:
        return [planned.rows(query) for query in ("SELECT * FROM users ORDER BY id", _BOOKS, _LOG)]

    @settings(some, max_examples=8)
    @given(populations)
    def idempotent(made_up: People) -> None:
        people(planned, made_up, instant)
        planned.refresh(as_of=instant)
        once = everything()
        again = planned.refresh(as_of=instant)
        assert everything() == once
        assert (again.users_refreshed, again.users_held, again.credits_granted) == (0, 0, 0)
        assert again.users_selected == again.users_failed

    idempotent()
    check_ledger(planned)
