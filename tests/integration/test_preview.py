"""What a bulk refresh says beforehand is what it then does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refresh.errors import RefusedError
from refresh.selection import Selection
from tests.integration.bulk import change_plan, foresee, refresh

if TYPE_CHECKING:
    from datetime import datetime

    from tests.integration.world import World


def populate(world: World) -> None:
    change_plan(world, "pro", cadence="external")
    world.sql.execute("INSERT INTO plans (code, name, amount, active) VALUES ('old', 'Old', 5, false)")
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, grant_mode) VALUES ('big', 'Big', 9223372036854775807, 'add')"
    )
    world.users(120)
    world.user("later", due_in="3 days")
    world.user("held", credit_refresh_hold=True)
    world.user("gone", active=False)
    world.user("planless", plan_code=None)
    world.user("old-plan", plan_code="old")
    world.user("by-webhook", plan_code="pro", due_in=None)
    world.user("dateless", due_in=None)
    world.user("too-much", plan_code="big")
    again = world.user("again")
    refresh(world, Selection(user="again"))
    (granted,) = world.history(again)
    world.restore("UPDATE users SET next_refresh_at = %s WHERE id = %s", granted["window_start"], again)


NOBODY_ELSE = {"inactive": 1, "no_plan": 2, "held": 1, "overflow": 1, "already_granted": 1}


@pytest.mark.parametrize(
    ("asked", "force", "matching", "apart"),
    [
        (Selection(), False, 123, {"held": 1, "overflow": 1, "already_granted": 1}),
        (Selection(), True, 129, NOBODY_ELSE),
        (
            Selection(balance_below=10**9),
            False,
            129,
            {**NOBODY_ELSE, "not_due": 1, "external": 1, "unscheduled": 1},
        ),
        (Selection(plan="pro"), False, 1, {"external": 1}),
        (Selection(active=False), True, 1, {"inactive": 1}),
    ],
)
def test_a_preview_says_what_the_run_does(
    world: World, asked: Selection, *, force: bool, matching: int, apart: dict[str, int]
) -> None:
    populate(world)
    shown = foresee(world, asked, force=force)
    assert (shown.users_matching, shown.apart) == (matching, apart)
    assert shown.users_refreshed == matching - sum(apart.values())
    if shown.users_refreshed:
        done = refresh(world, asked, force=force)
        assert (done.users_refreshed, done.credits_granted) == (shown.users_refreshed, shown.credits)
        assert done.users_failed == apart.get("overflow", 0)


def test_a_preview_knows_sums_beyond_64_bits(world: World) -> None:
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, grant_mode) VALUES ('big', 'Big', 9223372036854775807, 'add')"
    )
    for name in "abc":
        world.user(name, plan_code="big", credit_balance=0)
    assert foresee(world).credits == 3 * 9223372036854775807


def test_a_preview_of_an_unknown_plan_is_refused(world: World) -> None:
    with pytest.raises(RefusedError, match="there is no plan 'gold'; known are: free, pro"):
        foresee(world, Selection(plan="gold"))


def test_a_preview_looks_ahead(world: World) -> None:
    world.user(due_in="3 days")
    at: datetime = world.value("SELECT now() + interval '4 days'")
    assert foresee(world).users_matching == 0
    assert foresee(world, as_of=at, dry_run=True).users_refreshed == 1
