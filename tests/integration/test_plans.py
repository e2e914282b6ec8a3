"""Plans: checked, shown, saved; and their users moved to the new grid in batches that grant nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from dataclasses import replace
from datetime import UTC, time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from refresh import plans, runs
from refresh.batch import pending_statements, refresh_batch
from refresh.runs import RefusedError
from tests.integration.command import CREDITS, refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.integration.command import Cli
    from tests.integration.world import World

NINE = time(9)
MONTHLY: dict[str, Any] = {"cadence": "monthly", "day_of_month": 31, "time_of_day": NINE, "timezone": "Europe/Berlin"}
DAILY: dict[str, Any] = {"cadence": "daily", "time_of_day": time(0)}


def draft(world: World, code: str = "free", **changes: Any) -> plans.Draft:
    with world.database.statements() as connection:
        return plans.draft(connection, code, changes)


def save(world: World, made: plans.Draft, *, batch_size: int = 100) -> runs.Opened | None:
    with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        return plans.save(connection, made, actor="cli:ops", batch_size=batch_size)


def change(world: World, changes: Mapping[str, Any], code: str = "free") -> runs.Opened:
    run = save(world, draft(world, code, **changes))
    assert run is not None
    return run


def move(world: World, changes: Mapping[str, Any], code: str = "free") -> runs.Progress | None:
    """Change a plan, and do what the workers do."""
    run = save(world, draft(world, code, **changes))
    if run is None:
        return None
    world.work(world.claim(run))
    return world.progress(run)


def stored(world: World, code: str = "free") -> dict[str, Any]:
    return world.row("SELECT * FROM plans WHERE code = %s", code)


def next_of(world: World, user_id: int) -> str:
    at = world.see(user_id)["next_refresh_at"]
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}" if at else "none"


def date(world: World, user_id: int, at: str | None) -> None:
    world.sql.execute("UPDATE users SET next_refresh_at = %s WHERE id = %s", (at, user_id))


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"amount": 0}, r"amount 0 is not allowed: 1 to 9,223,372,036,854,775,807 are"),
        ({"amount": 2**63}, r"amount 9223372036854775808 is not allowed"),
        ({"rollover_cap": -1, "grant_mode": "rollover"}, r"rollover cap -1 is not allowed: 0 to"),
        ({"interval_days": 0}, r"interval days 0 is not allowed: 1 to 3,660 are"),
        ({"interval_days": 3_661}, r"interval days 3661 is not allowed"),
        ({"cadence": "monthly", "day_of_month": 0}, r"day of month 0 is not allowed: 1 to 31 are"),
        ({"cadence": "monthly", "day_of_month": 32}, r"day of month 32 is not allowed"),
        ({"grant_mode": "top-up"}, r"grant mode 'top-up' is not allowed: fill, reset, add, rollover are"),
        ({"cadence": "weekly"}, r"cadence 'weekly' is not allowed: rolling, monthly, daily, external are"),
        ({"name": " "}, r"a plan's name cannot be empty"),
        ({"grant_mode": "rollover"}, r"grant mode rollover needs a cap"),
        ({"cadence": "monthly"}, r"cadence monthly needs a day of the month"),
        ({"cadence": "daily"}, r"cadence daily needs a time of day"),
        ({"rollover_cap": 5}, r"--rollover-cap says something of grant mode rollover only, and this plan's is fill"),
        ({"day_of_month": 5}, r"--day says something of cadence monthly only, and this plan's is rolling"),
        ({**DAILY, "interval_days": 7}, r"--interval-days says something of cadence rolling only"),
        ({"timezone": "Europe/Berln"}, r"time zone 'Europe/Berln' is not allowed: did you mean Europe/Berlin"),
        ({"timezone": "europe/berlin"}, r"did you mean Europe/Berlin"),
        ({"timezone": "new york"}, r"did you mean America/New_York"),
        ({"timezone": "-/-"}, r"IANA names such as Europe/Berlin are"),
    ],
    ids=str,
)
def test_a_value_that_is_not_allowed_is_refused_with_those_that_are(
    world: World, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(RefusedError, match=says):
        draft(world, **changes)


def test_a_new_plan_needs_an_amount_and_a_plain_code(world: World) -> None:
    with pytest.raises(RefusedError, match=r"there is no plan 'team'; a new one needs an amount"):
        draft(world, "team")
    with pytest.raises(RefusedError, match=r"'Team 1' is no code for a new plan"):
        draft(world, "Team 1", amount=1)
    made = draft(world, "team", amount=5)
    assert (made.before, made.after) == (None, plans.Plan(code="team", name="team", amount=5))
    save(world, made)
    assert plans.Plan(**stored(world, "team")) == made.after


def test_every_value_is_saved_with_an_audit_row_and_nothing_by_a_draft(world: World) -> None:
    values: dict[str, Any] = {
        "name": "Free of charge", "amount": 2_000, "grant_mode": "rollover", "rollover_cap": 0, **MONTHLY,
        "atomic": True, "active": False,
    }  # fmt: skip
    before = stored(world)
    made = draft(world, **values)
    assert stored(world) == before
    assert world.value("SELECT count(*) FROM credit_audit_logs") == 0
    assert save(world, made) is None
    assert stored(world) == {**before, **values}
    audit = world.row("SELECT * FROM credit_audit_logs")
    assert (audit["actor"], audit["action"], audit["run_id"]) == ("cli:ops", "plan_set", None)
    assert audit["detail"]["plan"] == "free"
    assert (audit["detail"]["before"]["cadence"], audit["detail"]["after"]["cadence"]) == ("rolling", "monthly")
    assert audit["detail"]["after"]["timeOfDay"] == "09:00"


def test_a_plan_that_was_changed_meanwhile_is_not_overwritten(world: World) -> None:
    changed, created = draft(world, amount=1), draft(world, "team", amount=1)
    world.sql.execute("UPDATE plans SET amount = 7 WHERE code = 'free'")
    world.sql.execute("INSERT INTO plans (code, name, amount) VALUES ('team', 'Team', 9)")
    for made in (changed, created):
        with pytest.raises(RefusedError, match="was changed by somebody else meanwhile"):
            save(world, made)
    assert (stored(world)["amount"], stored(world, "team")["amount"]) == (7, 9)


# --- the preview ----------------------------------------------------------------------------------------------------


def test_the_preview_is_of_a_user_who_starts_now(world: World) -> None:
    made = draft(world, **MONTHLY, amount=7)
    now = world.value("SELECT now()")
    assert len(made.windows) == 6
    assert (now - made.windows[0].starts_at).total_seconds() < 20
    for window in made.windows[1:]:
        assert f"{window.local:%H:%M}" == "09:00"
        assert window.local.day >= 28
        assert (window.amount, window.zone) == (7, "Europe/Berlin")
    assert [window.ends_at for window in made.windows[:-1]] == [window.starts_at for window in made.windows[1:]]


def test_the_preview_agrees_with_what_an_inserted_user_gets(world: World) -> None:
    save(world, draft(world, **MONTHLY))
    windows = draft(world).windows
    world.sql.execute("INSERT INTO users (external_id, plan_code) VALUES ('bob', 'free')")
    assert world.row("SELECT next_refresh_at FROM users")["next_refresh_at"] == windows[0].ends_at


def test_an_external_plan_has_no_windows(world: World) -> None:
    assert draft(world, cadence="external").windows == []


# --- moving the users -----------------------------------------------------------------------------------------------


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
        ((batch_id, statement),) = pending_statements(connection, batch_ids)
        assert refresh_batch(connection, batch_id, statement) is not None
        assert refresh_batch(connection, batch_id, statement) is None
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
    """200 days, a flip and a scan every 5: windows never overlap, and dates never go back."""
    users = [world.user(name, due_in="-200 days") for name in ("ada", "bob", "eve")]
    world.sql.execute("UPDATE users SET credit_refresh_day = 31 WHERE external_id = 'bob'")
    world.sql.execute("UPDATE users SET timezone = 'Asia/Kathmandu' WHERE external_id = 'eve'")
    seen = {user: world.see(user)["next_refresh_at"] for user in users}
    for step in range(40):
        run = save(world, draft(world, **FLIPS[step % len(FLIPS)]))
        if run and not late:
            world.work(world.claim(run))
        world.refresh(as_of=world.value("SELECT now() - interval '200 days' + %s * interval '5 days'", step))
        if run and late:
            world.work(world.claim(run))
        for user in users:
            now_next = world.see(user)["next_refresh_at"]
            assert now_next >= seen[user]
            seen[user] = now_next
    assert world.value("SELECT count(*) FROM credit_refresh_histories") > 10
    for user in users:
        windows = [(row["window_start"], row["window_end"]) for row in world.history(user)]
        for (_, end), (start, _) in pairwise(windows):
            assert start >= end


# --- the commands ---------------------------------------------------------------------------------------------------

MONTHLY_OPTIONS = ("--cadence", "monthly", "--day", "31", "--time", "09:00", "--timezone", "Europe/Berlin")


def test_list_and_preview(world: World, cli: Cli) -> None:
    world.users(3)
    text = cli.says("plans", "list")
    for word in ("free", "20,000", "every 30 days", "fill"):
        assert word in text
    assert [(plan["code"], plan["users"]) for plan in cli.facts("plans", "list")["plans"]] == [("free", 3), ("pro", 0)]
    text = cli.says("plans", "preview", "free", *MONTHLY_OPTIONS)
    assert "monthly on day 31 at 09:00 Europe/Berlin" in text
    assert text.count(" 09:00 +0") == 5
    assert "Users who move to another date: 3." in text
    facts = cli.facts("plans", "preview", "trial", "--amount", "50", "--cadence", "daily", "--time", "00:00")
    assert (facts["before"], facts["after"]["amount"], len(facts["windows"])) == (None, 50, 6)
    assert world.value("SELECT count(*) FROM plans") == 2


def test_set(world: World, cli: Cli) -> None:
    world.users(3)
    done = cli("plans", "set", "free", *MONTHLY_OPTIONS, "--yes")
    assert done.returncode == 0, done.stderr
    run = world.row("SELECT * FROM credit_refresh_runs")
    assert done.stdout == f"Plan free is changed. Run {run['id']} moves 3 users to the new grid.\n"
    assert "The next windows of a user who starts now" in done.stderr
    assert run["requested_by"].startswith("cli:")
    assert world.value("SELECT count(*) FROM credit_refresh_batches WHERE published_at IS NOT NULL") == 1
    assert "like that already" in cli.says("plans", "set", "free", *MONTHLY_OPTIONS)
    facts = cli.facts("plans", "set", "team", "--amount", "5", "--mode", "rollover", "--rollover-cap", "2", "--yes")
    assert (facts["changed"], facts["run"], facts["after"]["rolloverCap"]) == (True, None, 2)
    assert stored(world, "team")["grant_mode"] == "rollover"


def test_set_waits_for_the_workers(world: World, cli: Cli) -> None:
    world.users(150)
    published = "SELECT id FROM credit_refresh_batches WHERE published_at IS NOT NULL"
    with world.calls(lambda: cli("plans", "set", "free", *MONTHLY_OPTIONS, "--yes", "--wait", "--json")) as command:
        command.start()
        world.until(lambda: len(world.rows(published)) == 2, "two batches are published")
        world.work([row["id"] for row in world.rows(published)])
        (done,) = command.results()
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)["run"]
    assert (run["kind"], run["status"], run["users_refreshed"]) == ("regrid", "succeeded", 150)


def test_set_on_a_terminal_asks(world: World, cli: Cli) -> None:
    for answer, code, amount in ((b"n\n", 2, 1_000), (b"y\n", 0, 7)):
        ours, theirs = pty.openpty()
        os.write(ours, answer)
        done = subprocess.run(
            [CREDITS, "plans", "set", "free", "--amount", "7"],
            stdin=theirs, capture_output=True, text=True, check=False, timeout=60, env=cli.environment,
        )  # fmt: skip
        os.close(theirs)
        os.close(ours)
        assert (done.returncode, stored(world)["amount"]) == (code, amount), done
        assert "Change plan free? [y/N]" in done.stderr


def test_bad_arguments(world: World, cli: Cli) -> None:
    world.user()
    before = stored(world)
    refused(cli("plans", "set", "free", "--amount", "7"), 2, "Change plan free? Without a terminal")
    refused(cli("plans", "set", "free", "--time", "25:00"), 2, "'25:00' is not allowed: 00:00 to 23:59 are")
    refused(cli("plans", "set", "free", "--mode", "top-up"), 2, "'fill', 'reset', 'add', 'rollover'")
    refused(cli("plans", "set", "free", "--cadence", "monthly", "--yes"), 2, "needs a day of the month")
    refused(cli("plans", "preview", "nope"), 2, "there is no plan 'nope'")
    move_it = ("plans", "set", "free", *MONTHLY_OPTIONS, "--yes", "--json")
    refused(cli(*move_it, REDIS_URL="redis://127.0.0.1:1/0"), 1, "The broker cannot be reached")
    refused(cli(*move_it, CREDIT_REFRESH_ENABLED="false"), 2, "CREDIT_REFRESH_ENABLED is false")
    assert stored(world) == before
    assert world.value("SELECT count(*) FROM credit_audit_logs") == 0


def test_a_plans_defaults_are_the_tables(world: World) -> None:
    world.sql.execute("INSERT INTO plans (code, name, amount) VALUES ('team', 'team', 1)")
    assert plans.Plan(**stored(world, "team")) == replace(plans.Plan(code="team", name="team", amount=1))
