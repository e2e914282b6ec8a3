"""Bulk refreshes in process: whom they find, what force does under each plan, and that one key is one run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from refresh import runs
from refresh.errors import RefusedError
from refresh.selection import Selection
from tests.integration.bulk import change_plan, foresee, open_bulk, opened, refresh, selected

if TYPE_CHECKING:
    from tests.integration.world import World

MONTH = timedelta(days=30)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (Selection(), {"due", "due-pro", "poor"}),
        (Selection(plan="pro"), {"due-pro"}),
        (Selection(balance_below=400), {"poor"}),
        (Selection(balance_below=401, plan="free"), {"due", "poor"}),
        (Selection(active=True), {"due", "due-pro", "poor"}),
        (Selection(user="due"), {"due"}),
    ],
    ids=["all", "plan", "poor", "poor and free", "active", "one"],
)
def test_those_who_match_and_are_due(world: World, asked: Selection, found: set[str]) -> None:
    world.user("due")
    world.user("due-pro", plan_code="pro")
    world.user("poor", credit_balance=1)
    world.user("later", due_in="1 day", credit_balance=1)
    world.user("gone", active=False)
    opened(world, asked)
    assert selected(world) == found


def test_with_force_all_who_match(world: World) -> None:
    world.user("due")
    world.user("later", due_in="1 day")
    world.user("much-later", due_in="9 days")
    world.user("gone", active=False)
    soon = world.value("SELECT now() + interval '2 days'")
    opened(world, Selection(next_refresh_before=soon, active=True), force=True)
    assert selected(world) == {"due", "later"}


def test_a_file_and_a_plan(world: World) -> None:
    for name in ("ada", "bob", "cy"):
        world.user(name, plan_code="pro" if name == "cy" else "free")
    opened(world, Selection(plan="free"), file="bob\ncy\nzoe\n")
    assert selected(world) == {"bob"}
    facts = world.value("SELECT selection FROM credit_refresh_runs")
    assert (facts["plan"], facts["users"]["ids"], len(facts["users"]["digest"])) == ("free", 3, 64)


def test_nobody_who_matches_is_no_run(world: World) -> None:
    world.user("later", due_in="1 day")
    with pytest.raises(RefusedError, match="nobody matches"):
        open_bulk(world)
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0


def test_the_selection_is_evaluated_once(world: World) -> None:
    leaves = world.user("leaves", plan_code="pro")
    joins = world.user("joins")
    held = world.user("held", plan_code="pro")
    run = opened(world, Selection(plan="pro"))
    world.sql.execute("UPDATE users SET plan_code = 'free' WHERE id = %s", (leaves,))
    world.sql.execute("UPDATE users SET plan_code = 'pro' WHERE id = %s", (joins,))
    world.sql.execute("UPDATE users SET credit_refresh_hold = true WHERE id = %s", (held,))
    world.work(world.claim(run))
    # By the verdict of the plan that they have now; and whoever is held is held.
    assert (world.see(leaves)["credit_balance"], world.history(leaves)[0]["plan_code"]) == (1_000, "free")
    assert world.history(joins) == []
    assert world.history(held)[0]["status"] == "held"
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.users_held) == ("succeeded", 1, 1)


def test_history_and_audit_say_who_asked_and_why(world: World) -> None:
    ada = world.user(due_in="3 days")
    run = refresh(world, Selection(plan="free"), force=True, reason="launch bonus")
    row = world.row("SELECT * FROM credit_refresh_runs")
    assert (row["reason"], row["requested_by"], row["force"], row["selection"]) == (
        "launch bonus", "cli:ops", True, {"due": False, "plan": "free"}
    )  # fmt: skip
    (history,) = world.history(ada)
    assert (history["reason"], history["run_id"]) == ("launch bonus", run.run_id)
    (audit,) = world.audit(ada)
    assert (audit["actor"], audit["action"], audit["detail"]) == ("cli:ops", "refreshed", {"reason": "launch bonus"})
    assert (audit["balance_before"], audit["balance_after"], audit["credits"]) == (400, 1_000, 600)


# Forced: what becomes of the date.


def test_forced_a_rolling_grid_starts_anew(world: World) -> None:
    ada = world.user(due_in="3 days")
    refresh(world, force=True)
    as_of = world.value("SELECT as_of FROM credit_refresh_runs")
    (history,) = world.history(ada)
    assert (history["window_start"], history["window_end"]) == (as_of, as_of + MONTH)
    assert (history["windows_passed"], history["first_missed_at"]) == (0, None)
    assert world.see(ada)["next_refresh_at"] == as_of + MONTH


def test_forced_a_date_never_moves_back(world: World) -> None:
    ada = world.user(due_in="45 days")
    before = world.see(ada)["next_refresh_at"]
    refresh(world, force=True)
    assert world.see(ada)["next_refresh_at"] == before


def test_forced_a_calendar_grid_stays(world: World) -> None:
    change_plan(world, "free", day_of_month=1, cadence="monthly", time_of_day="00:00", timezone="UTC")
    first = world.value("SELECT date_trunc('month', now()) + interval '1 month'")
    ada = world.user(due_in=None)
    bob = world.user("bob", due_in=None)
    world.restore("UPDATE users SET next_refresh_at = %s WHERE id = %s", first, ada)
    world.restore("UPDATE users SET next_refresh_at = %s WHERE id = %s", first + timedelta(days=40), bob)
    refresh(world, force=True)
    assert world.see(ada)["next_refresh_at"] == first
    assert world.see(bob)["next_refresh_at"] == first + timedelta(days=40)
    assert world.history(ada)[0]["window_end"] == first


@pytest.mark.parametrize("due_in", ["3 days", None])
def test_forced_with_keep_window_the_date_stays(world: World, due_in: str | None) -> None:
    ada = world.user(due_in=due_in)
    before = world.see(ada)["next_refresh_at"]
    refresh(world, force=True, keep_window=True)
    (history,) = world.history(ada)
    assert (history["status"], history["window_end"], history["credits_added"]) == ("refreshed", before, 600)
    assert world.see(ada)["next_refresh_at"] == before


def test_forced_an_external_user_keeps_having_no_date(world: World) -> None:
    change_plan(world, "free", cadence="external")
    ada = world.user(due_in=None)
    refresh(world, force=True)
    (history,) = world.history(ada)
    assert (history["window_end"], history["credits_added"]) == (None, 600)
    assert world.see(ada)["next_refresh_at"] is None


def test_forced_an_unscheduled_user_gets_a_date(world: World) -> None:
    ada = world.user(due_in=None)
    refresh(world, force=True)
    as_of = world.value("SELECT as_of FROM credit_refresh_runs")
    assert world.see(ada)["next_refresh_at"] == as_of + MONTH


@pytest.mark.parametrize("options", [{}, {"force": True}, {"force": True, "keep_window": True}], ids=str)
def test_who_is_due_is_refreshed_for_the_due_window_forced_or_not(world: World, options: dict[str, Any]) -> None:
    ada = world.user(due_in="-65 days")
    due_at = world.see(ada)["next_refresh_at"]
    refresh(world, **options)
    (history,) = world.history(ada)
    assert (history["window_start"], history["windows_passed"], history["first_missed_at"]) == (
        due_at + 2 * MONTH, 2, due_at
    )  # fmt: skip
    assert world.see(ada)["next_refresh_at"] == due_at + 3 * MONTH


def test_force_overrides_no_hold_no_inactivity_and_no_missing_plan(world: World) -> None:
    change_plan(world, "pro", active=False)
    users = [
        world.user("held", credit_refresh_hold=True),
        world.user("held-later", credit_refresh_hold=True, due_in="3 days"),
        world.user("gone", active=False),
        world.user("planless", plan_code=None),
        world.user("old-plan", plan_code="pro"),
    ]
    done = refresh(world, force=True)
    assert (done.users_selected, done.users_refreshed, done.users_held, done.users_skipped) == (5, 0, 2, 3)
    assert {world.see(id_)["credit_balance"] for id_ in users} == {400}
    assert world.value("SELECT count(*) FROM credit_refresh_histories WHERE status = 'refreshed'") == 0


# Forced: how much.


@pytest.mark.parametrize(
    ("mode", "amount", "added"),
    [
        ("fill", None, 600),
        ("fill", 500, 100),
        ("fill", 300, 0),
        ("reset", None, 600),
        ("reset", 300, -100),
        ("add", None, 1_000),
        ("add", 50, 50),
        ("rollover", None, 800),
        ("rollover", 50, -150),
    ],
)
def test_an_amount_takes_the_targets_place_under_the_plans_mode(
    world: World, mode: str, amount: int | None, added: int
) -> None:
    if mode == "rollover":
        change_plan(world, "free", rollover_cap=200, grant_mode=mode)
    change_plan(world, "free", grant_mode=mode)
    ada = world.user(due_in="3 days")
    shown = foresee(world, force=True, amount=amount)
    done = refresh(world, force=True, amount=amount)
    (history,) = world.history(ada)
    assert (history["target"], history["credits_added"]) == (amount or 1_000, added)
    assert world.see(ada)["credit_balance"] == 400 + added
    assert done.credits_granted == shown.credits == added


def test_an_amount_is_before_the_users_own(world: World) -> None:
    ada = world.user(custom_credit_amount=700)
    refresh(world, amount=500)
    assert world.see(ada)["credit_balance"] == 500


# Once.


def test_a_forced_batch_delivered_twice_grants_once(world: World) -> None:
    change_plan(world, "free", grant_mode="add")
    ada = world.user(due_in="3 days")
    run = opened(world, force=True)
    ids = world.claim(run)
    # The worst that can happen: the same user of the same run in a second batch that nobody has done.
    world.sql.execute(
        "INSERT INTO credit_refresh_batches (run_id, seq, user_ids) SELECT run_id, 9, user_ids FROM"
        " credit_refresh_batches"
    )
    world.work(ids)
    world.work(world.claim(run))
    world.work(ids)
    assert world.see(ada)["credit_balance"] == 1_400
    assert [row["action"] for row in world.audit(ada)] == ["refreshed", "already_granted"]
    assert len(world.history(ada)) == 1


def test_two_forced_runs_are_two_grants(world: World) -> None:
    change_plan(world, "free", grant_mode="add")
    ada = world.user(due_in="3 days")
    for _ in range(2):
        refresh(world, force=True, keep_window=True)
    assert world.see(ada)["credit_balance"] == 2_400


def test_users_of_an_unfinished_run_are_left_out(world: World) -> None:
    world.user("ada")
    world.scan()
    world.user("bob", due_in="3 days")
    shown = foresee(world, force=True)
    assert (shown.users_refreshed, shown.apart) == (1, {"unfinished": 1})
    assert opened(world, force=True).users_selected == 1
    with pytest.raises(RefusedError, match="nobody matches"):
        open_bulk(world, force=True)
    assert foresee(world, force=True, dry_run=True).users_refreshed == 2


# One key, one run.


def test_the_same_key_is_the_same_run(world: World) -> None:
    world.users(150)
    first = opened(world, file="user-1\nuser-2\n", idempotency_key="k")
    again = opened(world, file="userId,x\nuser-2,\nuser-1,\n", idempotency_key="k")
    assert again == runs.Opened(first.run_id, dry_run=False, users_selected=2, batches_total=1, existing=True)
    world.work(world.claim(first))
    assert opened(world, file="user-1\nuser-2\n", idempotency_key="k").run_id == first.run_id
    world.sql.execute("UPDATE settings SET enabled = false")
    assert opened(world, file="user-1\nuser-2\n", idempotency_key="k").run_id == first.run_id
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


def test_the_same_key_while_all_runs_are_dry(world: World) -> None:
    world.user()
    world.sql.execute("UPDATE settings SET dry_run = true")
    first = opened(world, idempotency_key="k")
    assert first.dry_run
    assert opened(world, idempotency_key="k").run_id == first.run_id


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_the_same_key_after_the_dry_switch_was_turned(world: World, *, dry: bool, force: bool) -> None:
    world.users(2)
    world.sql.execute("UPDATE settings SET dry_run = %s", (dry,))
    first = opened(world, idempotency_key="k", force=force)
    assert first.dry_run == dry
    world.sql.execute("UPDATE settings SET dry_run = NOT dry_run")
    again = opened(world, idempotency_key="k", force=force)
    assert (again.run_id, again.dry_run, again.existing) == (first.run_id, dry, True)
    with pytest.raises(RefusedError, match="take a new key"):  # a look ahead is another request, whatever it makes
        open_bulk(world, idempotency_key="k", force=force, dry_run=True)
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


@pytest.mark.parametrize(
    "other",
    [
        {"force": True},
        {"reason": "another"},
        {"dry_run": True},
        {"amount": 5},
        {"atomic": True},
        {"asked": Selection(plan="pro")},
        {"file": "user-1\nuser-3\n"},
    ],
    ids=str,
)
def test_the_same_key_with_other_content_is_refused(world: World, other: dict[str, Any]) -> None:
    world.users(3)
    run = opened(world, file="user-1\nuser-2\n", idempotency_key="k")
    with pytest.raises(RefusedError, match=rf"belongs to run {run.run_id}.*take a new key"):
        open_bulk(world, **{"file": "user-1\nuser-2\n", "idempotency_key": "k", **other})
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


def test_the_same_key_twice_at_the_same_instant_is_one_run(world: World) -> None:
    world.users(10)
    ask = lambda: open_bulk(world, force=True, idempotency_key="k")  # noqa: E731 - what two people do
    with world.host() as host, world.calls(ask, ask) as both:
        host.execute("SELECT pg_advisory_xact_lock(hashtextextended('credits.open_run', 0))")
        both.start()
        world.until(lambda: world.waiting("test") == 2, "both wait at the door")
        host.rollback()
        one, other = both.results()
    assert isinstance(one, runs.Opened)
    assert isinstance(other, runs.Opened)
    assert one.run_id == other.run_id
    assert {one.existing, other.existing} == {True, False}


def test_what_was_opened_and_never_published_is_upkeeps(world: World) -> None:
    """The command is killed between the commit and the publishing."""
    world.users(150)
    run = opened(world, force=True)
    world.work(world.claim())
    assert world.progress(run).status == "succeeded"
    assert world.value("SELECT max(attempts) FROM credit_refresh_batches") == 0
