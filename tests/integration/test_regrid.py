"""The regrid: a plan's users move to its new grid in batches that grant nothing, however often the plan is changed."""

from __future__ import annotations

from datetime import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from refresh.work import do_batch, pending_batches
from tests.integration.planning import DAILY, MONTHLY, NINE, change, date, draft, move, next_of, save

if TYPE_CHECKING:
    from tests.integration.world import World


def test_users_move_to_the_first_boundary_after_their_present_window(world: World) -> None:
    on, between, own_zone, own_day, due = (world.user(name) for name in ("on", "between", "zone", "day", "due"))
    gone = world.user("gone", active=False)
    none = world.user("none", due_in=None)
    other = world.user("other", plan_code="pro")
    world.sql.execute("UPDATE users SET timezone = 'UTC' WHERE id = %s", (own_zone,))
    world.sql.execute("UPDATE users SET credit_refresh_day = 15 WHERE id = %s", (own_day,))
    for user in (between, own_zone, own_day, gone, other):
        date(world, user, "2099-02-10 00:00Z")
    date(world, on, "2099-02-28 08:00Z")
    date(world, due, "2020-02-10 00:00Z")
    made = draft(world, **MONTHLY)
    assert made.users_moved == 5
    run = save(world, made, batch_size=2)
    assert run is not None
    assert (run.users_selected, run.batches_total) == (5, 3)
    opened = world.row("SELECT * FROM credit_refresh_runs")
    assert (opened["kind"], opened["selection"]) == ("regrid", {"plan": "free", "leavesExternal": False})
    assert next_of(world, between) == "2099-02-10 00:00"  # until their batch is done
    world.work(world.claim(run))
    done = world.progress(run)
    assert (done.kind, done.status, done.users_refreshed, done.users_skipped) == ("regrid", "succeeded", 5, 0)
    assert done.credits_granted == 0
    assert [next_of(world, user) for user in (on, between, own_zone, own_day, due, gone, none, other)] == [
        "2099-02-28 08:00", "2099-02-28 08:00", "2099-02-28 09:00", "2099-02-15 08:00", "2020-02-29 08:00",
        "2099-02-28 08:00", "none", "2099-02-10 00:00",
    ]  # fmt: skip
    audit = world.rows("SELECT * FROM credit_audit_logs WHERE action = 'regridded' ORDER BY id")
    assert [row["detail"]["users_moved"] for row in audit] == [2, 2, 1]
    assert {(row["actor"], row["run_id"]) for row in audit} == {("cli:ops", run.run_id)}
    (set_,) = world.rows("SELECT * FROM credit_audit_logs WHERE action = 'plan_set'")
    assert (set_["run_id"], set_["detail"]["usersMoved"]) == (run.run_id, 5)
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == 0


@pytest.mark.parametrize("changes", [{"amount": 7}, {"interval_days": 7}, {"time_of_day": NINE}, {"active": False}])
def test_a_change_that_moves_nobody_opens_no_run(world: World, changes: dict[str, Any]) -> None:
    world.user()
    made = draft(world, **changes)
    assert made.users_moved == 0
    assert save(world, made) is None
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0


def test_a_user_with_a_day_of_their_own_moves_when_a_rolling_plans_time_does(world: World) -> None:
    ada = world.user()
    world.sql.execute("UPDATE users SET credit_refresh_day = 10, next_refresh_at = '2099-02-10 00:00Z'")
    done = move(world, {"time_of_day": NINE})
    assert done is not None
    assert next_of(world, ada) == "2099-02-10 09:00"


def test_to_external_and_back(world: World) -> None:
    ada, bob = world.user(), world.user("bob")
    world.refresh()
    granted_until = world.see(ada)["next_refresh_at"]
    world.sql.execute("UPDATE credit_refresh_histories SET status = 'skipped' WHERE user_id = %s", (bob,))
    move(world, {"cadence": "external"})
    assert next_of(world, ada) == next_of(world, bob) == "none"
    assert world.refresh().users_selected == 0
    done = move(world, {"cadence": "rolling"})
    assert done is not None
    assert done.users_refreshed == 2
    # Never before the end of what was granted; and now, where nothing was.
    assert world.see(ada)["next_refresh_at"] == granted_until
    assert world.see(bob)["next_refresh_at"] <= world.value("SELECT now()")


def test_a_batch_does_what_the_plan_says_when_it_is_done(world: World) -> None:
    ada = world.user()
    date(world, ada, "2099-02-10 00:00Z")
    first, second = change(world, MONTHLY), change(world, {"day_of_month": 15})
    world.work(world.claim(second))
    assert next_of(world, ada) == "2099-02-15 08:00"
    world.work(world.claim(first))
    assert next_of(world, ada) == "2099-02-15 08:00"
    assert (world.progress(second).users_refreshed, world.progress(first).users_skipped) == (1, 1)


def test_who_has_left_the_plan_or_was_deleted_is_skipped(world: World) -> None:
    ada, bob, eve = world.user(), world.user("bob"), world.user("eve")
    for user in (ada, bob, eve):
        date(world, user, "2099-02-10 00:00Z")
    run = change(world, MONTHLY)
    world.sql.execute("UPDATE users SET plan_code = 'pro' WHERE id = %s", (ada,))
    world.sql.execute("DELETE FROM users WHERE id = %s", (bob,))
    world.work(world.claim(run))
    done = world.progress(run)
    assert (done.users_refreshed, done.users_skipped) == (1, 2)
    assert (next_of(world, ada), next_of(world, eve)) == ("2099-02-10 00:00", "2099-02-28 08:00")


def test_users_whom_somebody_else_has_locked_are_moved_later(world: World) -> None:
    ada, bob = world.user(), world.user("bob")
    for user in (ada, bob):
        date(world, user, "2099-02-10 00:00Z")
    run = change(world, MONTHLY)
    with world.host() as host:
        host.execute("SELECT FROM users WHERE id = %s FOR UPDATE", (bob,))
        (outcome,) = world.work(world.claim(run))
        assert (outcome.users_refreshed, outcome.users_deferred) == (1, 1)
        assert world.progress(run).status == "running"
    world.sql.execute("UPDATE credit_refresh_batches SET next_attempt_at = now()")
    world.work(world.claim(run))
    assert next_of(world, bob) == "2099-02-28 08:00"
    done = world.progress(run)
    assert (done.status, done.users_refreshed) == ("succeeded", 2)


def test_done_twice_a_batch_moves_nobody(world: World) -> None:
    ada = world.user()
    date(world, ada, "2099-02-10 00:00Z")
    run = change(world, MONTHLY)
    batch_ids = world.claim(run)
    with world.database.statements() as connection:
        (pending,) = pending_batches(connection, batch_ids)
        assert do_batch(connection, pending) is not None
        assert do_batch(connection, pending) is None
    assert world.value("SELECT count(*) FROM credit_audit_logs WHERE action = 'regridded'") == 1


def test_a_scan_is_not_held_up_by_users_who_still_have_to_move(world: World) -> None:
    ada = world.user(due_in="-40 days")
    run = change(world, DAILY)
    assert world.refresh().users_refreshed == 1
    granted_until = world.see(ada)["next_refresh_at"]
    world.work(world.claim(run))
    assert world.see(ada)["next_refresh_at"] == granted_until
    assert world.refresh().users_selected == 0


def test_while_paused_the_plan_is_saved_and_its_users_move_on_resume(world: World) -> None:
    ada = world.user()
    date(world, ada, "2099-02-10 00:00Z")
    world.sql.execute("UPDATE settings SET enabled = false")
    made = draft(world, **MONTHLY)
    assert made.paused
    run = save(world, made)
    assert run is not None
    assert world.claim(run) == []
    world.sql.execute("UPDATE settings SET enabled = true")
    world.work(world.claim(run))
    assert next_of(world, ada) == "2099-02-28 08:00"


FLIPS: list[dict[str, Any]] = [
    {"cadence": "daily", "time_of_day": time(23, 30), "timezone": "Pacific/Kiritimati"},
    {"cadence": "rolling", "interval_days": 1},
    {"cadence": "monthly", "day_of_month": 31, "timezone": "America/New_York"},
    {"cadence": "rolling", "interval_days": 30},
    {"cadence": "monthly", "day_of_month": 1, "timezone": "UTC"},
    {"cadence": "daily", "time_of_day": time(0, 15), "timezone": "Pacific/Pago_Pago"},
]


@pytest.mark.parametrize("late", [False, True], ids=["moved-at-once", "moved-after-the-scan"])
def test_however_often_a_plan_is_flipped_no_time_is_granted_twice(world: World, late: bool) -> None:  # noqa: FBT001
    """200 days, a flip and a scan every 5: windows never overlap, and dates never go back behind what was granted."""
    users = [world.user(name, due_in="-200 days") for name in ("ada", "bob", "eve")]
    begun = world.see(users[0])["next_refresh_at"]
    world.sql.execute("UPDATE users SET credit_refresh_day = 31 WHERE external_id = 'bob'")
    world.sql.execute("UPDATE users SET timezone = 'Asia/Kathmandu' WHERE external_id = 'eve'")
    for step in range(40):
        run = save(world, draft(world, **FLIPS[step % len(FLIPS)]))
        if run and not late:
            world.work(world.claim(run))
        world.refresh(as_of=world.value("SELECT now() - interval '200 days' + %s * interval '5 days'", step))
        if run and late:
            world.work(world.claim(run))
        for user in users:
            ends = [row["window_end"] for row in world.history(user)]
            assert world.see(user)["next_refresh_at"] >= max(ends, default=begun)
    assert world.value("SELECT count(*) FROM credit_refresh_histories") > 10
    for user in users:
        windows = [(row["window_start"], row["window_end"]) for row in world.history(user)]
        for (_, end), (start, _) in pairwise(windows):
            assert start >= end


def dates_of(world: World) -> list[Any]:
    return [row["next_refresh_at"] for row in world.rows("SELECT next_refresh_at FROM users ORDER BY id")]


def test_flipped_back_a_plan_leaves_every_date_as_it_was(world: World) -> None:
    users = [world.user(name, due_in=f"-{n} days") for n, name in enumerate(("ada", "bob", "eve", "own", "late"))]
    world.sql.execute("UPDATE users SET timezone = 'Asia/Kathmandu' WHERE external_id = 'eve'")
    world.sql.execute("UPDATE users SET credit_refresh_day = 31 WHERE external_id = 'own'")
    world.refresh()
    # Refreshed two years ago, and not since: their last window began long before the others'.
    world.restore("UPDATE users SET next_refresh_at = next_refresh_at - interval '700 days' WHERE id = %s", users[-1])
    world.restore(
        "UPDATE credit_refresh_histories SET window_start = window_start - interval '700 days',"
        " window_end = window_end - interval '700 days' WHERE user_id = %s",
        users[-1],
    )
    rolling = dates_of(world)
    moved = []
    again: dict[str, Any] = {"cadence": "rolling", "interval_days": 30, "time_of_day": None, "timezone": "UTC"}
    for changes in (*FLIPS, {"cadence": "external"}, again):
        before, made = dates_of(world), draft(world, **changes)
        run = save(world, made)
        assert (run.users_selected if run else 0) == made.users_moved
        if run:
            world.work(world.claim(run))
            assert world.progress(run).users_refreshed == made.users_moved
        moved.append(sum(old != new for old, new in zip(before, dates_of(world), strict=True)))
        assert moved[-1] == made.users_moved
    assert dates_of(world)[:-1] == rolling[:-1]
    # The one whose window had long ended is due when the plan has dates again: now, at the latest.
    assert rolling[-1] < dates_of(world)[-1] <= world.value("SELECT now()")
    assert moved[0] == 5
    assert moved[1] == 4  # bob's day keeps him on a calendar: "own" moves to another one
    assert world.refresh().users_selected == 1


def test_a_change_counts_from_the_last_window_and_not_from_a_date_that_was_put_off(world: World) -> None:
    ada = world.user()
    world.user("bob")
    world.refresh()
    ends = dates_of(world)
    world.sql.execute("UPDATE users SET next_refresh_at = next_refresh_at + interval '60 days' WHERE id = %s", (ada,))
    assert dates_of(world) != ends
    made = draft(world, interval_days=7)
    assert made.users_moved == 1
    run = save(world, made)
    assert run is not None
    world.work(world.claim(run))
    assert dates_of(world) == ends


# As rollback.py leaves a window behind: its credits taken, and closed; or given back.
_TAKE_BACK = "UPDATE credit_refresh_histories SET reversed_by_run_id = run_id WHERE user_id = ANY (%s)"
_REOPEN = """
WITH reopen AS MATERIALIZED (SELECT set_config('credits.reopen', 'on', true))
UPDATE users AS u SET next_refresh_at = h.previous_next_refresh_at
FROM credit_refresh_histories AS h, reopen
WHERE h.user_id = u.id AND u.id = ANY (%s)
"""


def test_windows_that_were_taken_back_count_if_they_are_closed(world: World) -> None:
    closed, reopened, _ = (world.user(name, due_in="-3 days") for name in ("closed", "reopened", "quiet"))
    begun = world.see(reopened)["next_refresh_at"]
    world.refresh()
    end, _, other_end = dates_of(world)
    world.sql.execute(_TAKE_BACK, ([closed, reopened],))
    world.sql.execute(_REOPEN, ([reopened],))
    assert world.see(reopened)["next_refresh_at"] == begun
    # On another rolling grid everybody stays where they are.
    assert draft(world, interval_days=7).users_moved == 0
    # Put off by hand, the closed window's end is where a change brings them back to.
    world.sql.execute("UPDATE users SET next_refresh_at = next_refresh_at + interval '9 days' WHERE id = %s", (closed,))
    done = move(world, {"interval_days": 7})
    assert done is not None
    assert done.users_refreshed == 1
    assert dates_of(world) == [end, begun, other_end]
    # To external and back they do not get the time that was granted once, either.
    move(world, {"cadence": "external"})
    move(world, {"cadence": "rolling"})
    assert (dates_of(world)[0], dates_of(world)[2]) == (end, other_end)


def test_who_was_never_refreshed_moves_from_their_date(world: World) -> None:
    ada = world.user()
    date(world, ada, "2099-02-10 00:00Z")
    move(world, MONTHLY)
    move(world, {"cadence": "rolling"})
    assert next_of(world, ada) == "2099-02-28 08:00"
