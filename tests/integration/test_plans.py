"""Plans: checked, shown before they are saved, and saved with an audit row. Moving their users: test_regrid.py."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from refresh import plans
from refresh.errors import RefusedError
from tests.integration.command import CREDITS, refused
from tests.integration.planning import DAILY, MONTHLY, draft, save, stored

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World


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
    assert plans.Plan(**stored(world, "team")) == plans.Plan(code="team", name="team", amount=1)
