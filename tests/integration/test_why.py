"""`credits why` and `credits users show`: the verdict, the facts behind it, and the windows ahead."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from cli.why import explanation
from refresh.verdict import Verdict, explain_user
from refresh.windows import user_windows
from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

BIGGEST = 2**63 - 1


def explained(world: World, external_id: str = "ada") -> Verdict:
    with world.database.statements() as connection:
        return explain_user(connection, external_id)


def why(world: World, external_id: str = "ada") -> str:
    """The sentences, with every instant as T."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "T", explanation(explained(world, external_id)))


def set_plan(world: World, values: str, code: str = "free") -> None:
    world.sql.execute(f"UPDATE plans SET {values} WHERE code = %s", (code,))  # noqa: S608 - the tests' own text


def set_user(world: World, values: str) -> None:
    world.sql.execute(f"UPDATE users SET {values} WHERE external_id = 'ada'")  # noqa: S608 - the tests' own text


NO_REFRESH = "No refresh of theirs is on record."


def test_due(world: World) -> None:
    world.user()
    assert why(world) == (
        "ada is due since T: the next scan refreshes them with 600 credits (fills 400 up to 1,000) for the window T to "
        f"T. {NO_REFRESH}"
    )


@pytest.mark.parametrize(
    ("values", "grant"),
    [
        ("grant_mode = 'reset', amount = 100", "-300 credits (sets 400 to 100)"),
        ("grant_mode = 'add', amount = 1", "1 credit (adds to 400)"),
        (
            "grant_mode = 'rollover', rollover_cap = 50, amount = 100",
            "-250 credits (adds 100 to what is left, of which at most 50 is kept)",
        ),
    ],
)
def test_due_says_what_the_mode_makes_of_the_balance(world: World, values: str, grant: str) -> None:
    set_plan(world, values)
    world.user()
    assert f"refreshes them with {grant} for" in why(world)


def test_due_for_longer_than_a_window(world: World) -> None:
    world.user(due_in="-70 days")
    assert "stands for 2 missed windows too, the first of which was due then." in why(world)
    verdict = explained(world)
    assert (verdict.windows_passed, verdict.first_missed_at) == (2, verdict.next_refresh_at)


def test_due_but_granted_already(world: World) -> None:
    ada = world.user()
    world.refresh()
    world.sql.execute("SET credits.reopen = 'on'")
    window = world.history(ada)[0]["window_start"]
    world.sql.execute("UPDATE users SET next_refresh_at = %s", (window,))
    assert "has been granted the window T to T already: the next scan moves them on to T without credits." in why(world)
    facts: Any = explained(world).facts()["next"]
    assert (facts["creditsAdded"], facts["alreadyGranted"]) == (0, True)


def test_not_due_tells_the_last_refresh(world: World) -> None:
    ada = world.user()
    world.refresh()
    assert why(world) == (
        "ada is not due before T; as things are, they get 0 credits (fills 1,000 up to 1,000) then. "
        "Last refreshed T with 600 credits, for the window T to T."
    )
    (history,) = world.history(ada)
    facts: Any = explained(world).facts()["lastRefresh"]
    assert (facts["runId"], facts["creditsAdded"]) == (str(history["run_id"]), 600)
    assert facts["windowEnd"] == world.see(ada)["next_refresh_at"].isoformat()


def test_held(world: World) -> None:
    world.user()
    world.sql.execute("SET credits.actor = 'cli:ops'")
    set_user(world, "credit_refresh_hold = true, hold_reason = 'fraud check'")
    assert why(world) == (
        "ada is held since T by cli:ops because 'fraud check' (until released); the window that fell due T would be "
        f"refreshed on release with 600 credits (fills 400 up to 1,000). {NO_REFRESH}"
    )
    world.sql.execute("SET credits.actor = 'cli:eve'")
    set_user(world, "hold_reason = 'chargeback', hold_until = now() + interval '1 day'")
    assert "held since T by cli:ops because 'chargeback' (until T, changed T by cli:eve);" in why(world)


def test_held_before_the_window_is_due_or_with_nothing_to_come(world: World) -> None:
    world.user(due_in="1 day", credit_refresh_hold=True)
    assert "their next window falls due T and would get 600 credits" in why(world)
    set_user(world, "next_refresh_at = NULL")
    assert "Without the hold: ada has no next_refresh_at" in why(world)
    set_plan(world, "cadence = 'external'")
    assert "Without the hold: ada is on the plan free, which is external" in why(world)


def test_held_by_a_hold_older_than_the_audit_log(world: World) -> None:
    world.user()
    world.sql.execute("ALTER TABLE users DISABLE TRIGGER audit_hold")
    set_user(world, "credit_refresh_hold = true")
    assert why(world).startswith("ada is held without a reason (until released); the window")


def test_a_hold_that_has_run_out(world: World) -> None:
    world.user()
    set_user(world, "credit_refresh_hold = true, hold_until = now() - interval '1 hour'")
    assert why(world).startswith("ada is due since T: ")
    assert "A hold has run out T; the next refresh clears it." in why(world)


def test_inactive_and_without_a_plan_and_on_an_inactive_one(world: World) -> None:
    world.user(active=False)
    assert why(world) == f"ada is inactive: nothing is granted while `active` is false. {NO_REFRESH}"
    set_user(world, "active = true")
    set_plan(world, "active = false")
    assert "on the plan free, which is inactive: nothing is granted by it." in why(world)
    set_user(world, "plan_code = NULL, credit_refresh_hold = true")
    assert "ada has no plan: nothing is granted before plan_code names one. They are held as well, since" in why(world)
    assert explained(world).facts()["next"] is None


def test_external_and_unscheduled(world: World) -> None:
    world.user(due_in=None)
    assert "`credits users stagger` gives them a date." in why(world)
    set_plan(world, "cadence = 'external'")
    assert "they are refreshed when a webhook says so, and by no scan." in why(world)


def test_overflow(world: World) -> None:
    set_plan(world, "grant_mode = 'add'")
    world.user(credit_balance=BIGGEST)
    assert why(world) == (
        f"ada is due since T; a balance of {BIGGEST:,} and an amount of 1,000 under add do not fit 64 bits, and each "
        f"scan records a failure until one of them is changed. {NO_REFRESH}"
    )
    set_user(world, "next_refresh_at = now() + interval '1 day'")
    assert "ada is not due before T; a balance of" in why(world)


def test_a_pause_dry_runs_and_an_unfinished_run_are_told(world: World) -> None:
    world.user()
    run = world.scan()
    world.sql.execute("UPDATE credit_refresh_batches SET attempts = 2, error = 'deadlock detected'")
    said = why(world)
    assert f"Run {run.run_id} has them in a batch that is still to be done, tried 2 times (deadlock detected)." in said
    world.sql.execute("UPDATE settings SET dry_run = true")
    assert "All runs are dry: nothing is granted." in why(world)
    world.sql.execute("UPDATE settings SET enabled = false")
    assert "The service is paused: nothing is granted before `credits resume`." in why(world)


VERDICTS = {
    "due": "next_refresh_at = now() - interval '1 hour'",
    "not_due": "next_refresh_at = now() + interval '1 hour'",
    "held": "credit_refresh_hold = true",
    "inactive": "active = false",
    "no_plan": "plan_code = NULL",
    "unscheduled": "next_refresh_at = NULL",
}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_verdict_is_that_of_the_view(world: World, verdict: str) -> None:
    world.user()
    set_user(world, VERDICTS[verdict])
    assert explained(world).verdict == verdict
    assert world.value("SELECT verdict FROM user_credits_now") == verdict


def test_the_commands(world: World, cli: Cli) -> None:
    ada = world.user(due_in="2 days")
    set_plan(world, "cadence = 'monthly', day_of_month = 31, time_of_day = '09:00', timezone = 'Europe/Berlin'")
    world.sql.execute("UPDATE users SET email = '[ada]@example.com' WHERE id = %s", (ada,))
    assert cli.says("why", "ada").startswith("ada is not due before ")
    facts = cli.facts("why", "ada")
    assert (facts["userId"], facts["verdict"], facts["paused"], facts["hold"]) == ("ada", "not_due", False, None)
    assert facts["next"]["amount"] == 1_000
    assert facts["next"]["creditsAdded"] == 600
    assert facts["text"].startswith("ada is not due before ")
    shown = cli.facts("users", "show", "ada")
    assert shown["email"] == "[ada]@example.com"
    assert len(shown["windows"]) == 6
    assert shown["windows"][0]["startsAt"] == facts["nextRefreshAt"]
    text = cli.says("users", "show", "ada")
    assert "[ada]@example.com" in text
    assert "local (Europe/Berlin)" in text
    assert text.count(" 09:00 +0") == 5
    refused(cli("why", "bob"), 2, "there is no user 'bob'")
    refused(cli("users", "show", "bob"), 2, "there is no user 'bob'")


def starts(world: World, external_id: str = "ada") -> list[str]:
    with world.database.statements() as connection:
        windows = user_windows(connection, explain_user(connection, external_id).user_id)
    assert [window.ends_at for window in windows[:-1]] == [window.starts_at for window in windows[1:]]
    return [f"{window.local:%m-%d %H:%M %z}" for window in windows]


def test_the_windows_ahead_follow_the_users_own_day_and_zone(world: World) -> None:
    world.user()
    set_user(
        world,
        "credit_refresh_day = 31, timezone = 'Europe/Berlin', custom_credit_amount = 77, "
        "next_refresh_at = '2099-01-30 23:00Z'",
    )
    assert starts(world) == [
        "01-31 00:00 +0100", "02-28 00:00 +0100", "03-31 00:00 +0200", "04-30 00:00 +0200", "05-31 00:00 +0200",
        "06-30 00:00 +0200",
    ]  # fmt: skip


def test_the_windows_of_who_is_due_begin_with_the_present_one(world: World) -> None:
    world.user(due_in="-31 days")
    verdict = explained(world)
    with world.database.statements() as connection:
        first = user_windows(connection, verdict.user_id)[0]
    assert (first.starts_at, first.ends_at) == (verdict.window_start, verdict.window_end)
    assert first.starts_at <= verdict.at < first.ends_at


def test_the_windows_of_who_is_held_follow_the_hold(world: World) -> None:
    world.user()
    until = datetime(2099, 1, 1, tzinfo=UTC)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true, hold_until = %s", (until,))
    with world.database.statements() as connection:
        first = user_windows(connection, explain_user(connection, "ada").user_id)[0]
    assert first.starts_at <= until < first.ends_at


@pytest.mark.parametrize("verdict", ["inactive", "no_plan", "unscheduled"])
def test_who_has_nothing_ahead_has_no_windows(world: World, verdict: str) -> None:
    world.user()
    set_user(world, VERDICTS[verdict])
    assert starts(world) == []
