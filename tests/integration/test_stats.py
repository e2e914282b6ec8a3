"""`credits stats`: runs, durations, failures by cause, grants by source, and how the users stand."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from refresh import totals
from refresh.errors import RefusedError
from refresh.stats import CAUSES_SHOWN, Runs, Stats, read_stats
from tests.integration.command import refused
from tests.integration.population import LARGEST

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

HOUR = timedelta(hours=1)


def ask(world: World, **period: Any) -> Stats:
    with world.database.transaction() as connection:
        return read_stats(connection, interval=HOUR, cron=None, **period)


def overflowing(world: World, name: str) -> int:
    """A user whom each run fails."""
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, grant_mode) VALUES ('add', 'Add', 5, 'add') ON CONFLICT DO NOTHING"
    )
    return world.user(name, plan_code="add", credit_balance=LARGEST)


def give_up(world: World, error: str) -> None:
    """What delivery does with a batch that failed too often, and the end of its run."""
    world.sql.execute(
        "UPDATE credit_refresh_batches SET status = 'failed', error = %s WHERE status = 'pending'", (error,)
    )
    with world.database.statements() as connection:
        totals.finish_runs(connection)


def lasting(world: World, *seconds: float) -> None:
    """Give the runs with users these durations, in the order of their opening."""
    for run, wanted in zip(
        world.rows("SELECT id FROM credit_refresh_runs WHERE batches_total > 0 ORDER BY created_at"),
        seconds,
        strict=True,
    ):
        world.sql.execute(
            "UPDATE credit_refresh_runs SET started_at = finished_at - make_interval(secs => %s) WHERE id = %s",
            (wanted, run["id"]),
        )


def test_nothing_has_happened(world: World) -> None:
    found = ask(world)
    assert (found.by_kind, found.causes, found.sources) == ([], [], [])
    assert (found.granting.runs, found.granting.credits) == (0, 0)
    assert (found.granting.user_success_rate, found.granting.run_success_rate) == (None, None)
    assert (found.granting.median_seconds, found.granting.users_per_second) == (None, None)
    assert sum(found.users.by_verdict.values()) == 0
    assert found.at - found.since == timedelta(days=30)


def test_success(world: World) -> None:
    world.users(8)
    overflowing(world, "rich")
    world.user("held", credit_refresh_hold=True)
    world.refresh(batch_size=4)
    assert world.refresh().users_failed == 1
    found = ask(world).granting
    assert (found.runs, found.partial, found.failed, found.succeeded) == (2, 1, 1, 0)
    assert (found.users_refreshed, found.users_held, found.users_failed) == (8, 1, 2)
    assert found.credits == world.value("SELECT sum(credits_added) FROM credit_refresh_histories")
    assert found.user_success_rate == 8 / 10
    assert found.run_success_rate == 0


def test_dry_runs_and_empty_ones_are_apart(world: World) -> None:
    world.refresh()
    world.users(3)
    world.refresh(dry_run=True)
    world.refresh()
    found = ask(world)
    live, dry = found.by_kind
    assert (live.kind, live.dry_run, live.runs, live.empty, live.users_refreshed) == ("refresh", False, 2, 1, 3)
    assert (dry.kind, dry.dry_run, dry.runs, dry.empty, dry.users_refreshed) == ("refresh", True, 1, 0, 3)
    assert found.granting.runs == 2
    assert found.granting.run_success_rate == 1


def test_a_running_run_is_not_counted(world: World) -> None:
    world.users(3)
    world.scan()
    assert ask(world).by_kind == []


def test_durations(world: World) -> None:
    for n in range(4):
        world.user(f"user-{n}")
        world.refresh()
    world.refresh()
    lasting(world, 1, 2, 3, 10)
    found = ask(world).granting
    assert found.median_seconds == pytest.approx(2.5)
    assert found.p95_seconds == pytest.approx(8.95)
    assert found.max_seconds == pytest.approx(10)
    assert found.users_per_second == pytest.approx(4 / 16)


def test_a_regrid_is_no_grant(world: World) -> None:
    world.users(3)
    world.refresh()
    world.sql.execute("UPDATE credit_refresh_runs SET kind = 'regrid', work = 'regrid'")
    found = ask(world)
    assert (found.granting.runs, found.granting.users_refreshed) == (0, 0)
    assert [(runs.kind, runs.users_refreshed) for runs in found.by_kind] == [("regrid", 3)]


def test_sums_may_be_larger_than_64_bits(world: World) -> None:
    for n in range(3):
        world.user(f"user-{n}")
        world.refresh()
    world.sql.execute("UPDATE credit_refresh_runs SET credits_granted = %s", (LARGEST,))
    found = ask(world).granting
    assert found.credits == 3 * LARGEST
    assert type(found.credits) is int


def test_the_period(world: World) -> None:
    for days in (0, 3, 40):
        world.user(f"user-{days}")
        overflowing(world, f"rich-{days}")
        world.refresh()
        world.sql.execute(
            "UPDATE credit_refresh_runs SET finished_at = now() - %s * interval '1 day' - interval '1 minute'"
            " WHERE finished_at > now() - interval '1 minute'",
            (days,),
        )
    assert [ask(world, days=days).granting.runs for days in (1, 4, 30, 50)] == [1, 2, 2, 3]
    assert [ask(world, days=days).failures_total for days in (1, 4, 50)] == [1, 3, 6]
    since = world.value("SELECT now() - interval '5 days'")
    found = ask(world, since=since)
    assert (found.since, found.granting.runs) == (since, 2)


def test_failures_by_cause(world: World) -> None:
    overflowing(world, "rich")
    richer = overflowing(world, "richer")
    world.refresh()
    for number, users in ((17, ["ada"]), (42, ["bob", "cyd"])):
        for name in users:
            world.user(name)
        run = world.scan()
        give_up(world, f"process {number} was in the way\nDETAIL: and there is more")
        assert world.progress(run).status == "failed"
    world.sql.execute("DELETE FROM users WHERE id = %s", (richer,))
    found = ask(world)
    # A batch that was given up fails all of its users, and those of the run before are still due.
    assert [(cause.failures, cause.runs, cause.error) for cause in found.causes] == [
        (3 + 5, 2, "process 42 was in the way"),
        (2, 1, "the balance would not fit 64 bits"),
    ]
    assert found.causes[1].user == f"id {richer}"
    assert (found.causes_total, found.failures_total) == (2, 10)
    assert found.failures_total == found.granting.users_failed
    latest = world.value("SELECT id FROM credit_refresh_runs ORDER BY created_at DESC LIMIT 1")
    assert found.causes[0].run_id == str(latest)


def test_a_user_with_a_row_of_their_own_in_a_batch_given_up_counts_once(world: World) -> None:
    ada = world.user("ada")
    world.user("bob")
    run = world.scan()
    world.sql.execute(
        "INSERT INTO credit_refresh_histories (run_id, user_id, status, window_start, old_balance, credits_added,"
        " new_balance, error) VALUES (%s, %s, 'failed', now(), 400, 0, 400, 'the host said no')",
        (run.run_id, ada),
    )
    give_up(world, "one of its users failed")
    found = ask(world)
    assert {(cause.error, cause.failures, cause.user) for cause in found.causes} == {
        ("the host said no", 1, "ada"),
        ("one of its users failed", 1, "bob"),
    }


def test_the_most_frequent_causes_come_first_and_alone(world: World) -> None:
    for letter in "abcdefghijkl":
        world.user(letter)
        world.scan()
        give_up(world, f"cause {letter}")
    found = ask(world)
    assert len(found.causes) == CAUSES_SHOWN
    assert found.causes_total == 12
    # All who were not refreshed are tried, and fail, again with each run.
    assert [cause.failures for cause in found.causes] == list(range(12, 2, -1))
    assert found.causes[0].error == "cause l"


def test_grants_by_source(world: World) -> None:
    world.users(3)
    world.refresh()
    world.sql.execute("INSERT INTO users (external_id, plan_code) VALUES ('new', 'free')")
    called = world.user("called")
    world.sql.execute("SELECT refresh_user(%s, 'function', 'host')", (called,))
    found = {it.source: (it.grants, it.credits) for it in ask(world).sources}
    added = world.value("SELECT sum(credits_added) FROM credit_refresh_histories WHERE source = 'run'")
    assert found == {"run": (3, added), "insert": (1, 1_000), "function": (1, 600)}


def test_grants_are_bounded_by_the_windows_of_the_period(world: World) -> None:
    world.user("ada", due_in="-1 hour")
    world.refresh()
    found = ask(world, days=1)
    assert found.since - found.sources_since == timedelta(days=32)
    assert len(found.sources) == 1
    world.sql.execute("UPDATE plans SET interval_days = 365 WHERE code = 'pro'")
    found = ask(world, days=1)
    assert found.since - found.sources_since == timedelta(days=365)
    world.sql.execute("UPDATE credit_refresh_histories SET created_at = now() - interval '2 days'")
    assert ask(world, days=1).sources == []


def test_how_the_users_stand(world: World) -> None:
    world.sql.execute("INSERT INTO plans (code, name, amount, cadence) VALUES ('hook', 'Hook', 5, 'external')")
    world.user("late", due_in="-1 day")
    world.user("due", due_in="-1 second")
    world.user("freed", due_in="-1 day", credit_refresh_hold=True, hold_for="-1 second")
    world.user("ahead", due_in="1 day")
    world.user("held", credit_refresh_hold=True)
    world.user("inactive", active=False)
    world.user("planless", plan_code=None)
    world.user("hook", plan_code="hook", due_in=None)
    world.user("unscheduled", due_in=None)
    overflowing(world, "rich")
    found = ask(world)
    assert found.users.by_verdict == {
        "due": 3, "not_due": 1, "held": 1, "inactive": 1, "no_plan": 1, "external": 1, "unscheduled": 1, "overflow": 1,
    }  # fmt: skip
    assert found.users.due_since == world.value("SELECT next_refresh_at FROM users WHERE external_id = 'late'")
    hour = found.at.replace(minute=0, second=0, microsecond=0)
    assert found.users.overdue_before == hour - 2 * HOUR
    assert found.users.overdue == 2


def test_what_was_taken_back(world: World) -> None:
    ada = world.user("ada")
    world.refresh()
    run, other = world.value("SELECT id FROM credit_refresh_runs"), "00000000-0000-4000-8000-000000000001"
    world.sql.execute(
        "INSERT INTO credit_refresh_runs (id, kind, work, source, requested_by, subject_run_id, parent_run_id,"
        " started_at, status) VALUES (%s, 'rollback', 'rollback', 'cli', 'test', %s, %s, now(), 'running')",
        (other, run, run),
    )
    world.sql.execute(
        "INSERT INTO credit_refresh_histories (run_id, user_id, status, window_start, old_balance, credits_added,"
        " new_balance) VALUES (%s, %s, 'reversed', now(), 1000, -600, 400)",
        (other, ada),
    )
    world.sql.execute(
        "UPDATE credit_refresh_runs SET status = 'succeeded', finished_at = now(), users_refreshed = 1 WHERE id = %s",
        (other,),
    )
    found = ask(world)
    assert (found.users_taken_back, found.credits_taken_back) == (1, 600)
    assert (found.granting.runs, found.granting.credits) == (1, 600)


def test_nothing_can_be_written(world: World) -> None:
    with world.database.transaction() as connection:
        read_stats(connection, interval=HOUR, cron="0 2 * * *")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), connection.transaction():
            connection.execute("UPDATE users SET credit_balance = 0")


def test_a_period_that_is_not_allowed(world: World) -> None:
    for days in (0, 3_661):
        with pytest.raises(RefusedError, match=f"{days} days are not allowed: 1 to 3,660 are"):
            ask(world, days=days)
    ahead: datetime = world.value("SELECT now() + interval '1 hour'")
    with pytest.raises(RefusedError, match="lies in the future: an instant up to"):
        ask(world, since=ahead)


def test_the_command(world: World, cli: Cli) -> None:
    assert "No run that grants has ended in that time." in cli.says("stats")
    world.users(3)
    overflowing(world, "rich [bold]")
    world.refresh()
    world.refresh(dry_run=True)
    lasting(world, 2, 1)
    text = cli.says("stats")
    assert "Runs that grant: 1; 0 % succeeded." in text
    assert "1 failed; 75.00 % success." in text
    assert "Duration: median 2.0 s, 95 % within 2.0 s, longest 2.0 s; 2 users per second." in text
    assert "refresh (dry)" in text
    assert "the balance would not fit 64 bits" in text
    assert "rich [bold]" in text
    facts = cli.facts("stats", "--days", "2")
    assert facts["granting"]["userSuccessRate"] == 0.75
    assert facts["granting"]["usersPerSecond"] == 2
    assert facts["failures"]["top"][0]["exampleUserId"] == "rich [bold]"
    assert [(runs["kind"], runs["dryRun"]) for runs in facts["byKind"]] == [("refresh", False), ("refresh", True)]
    assert facts["grants"]["bySource"][0]["source"] == "run"
    assert (facts["users"]["total"], facts["users"]["notDue"], facts["users"]["overflow"]) == (4, 3, 1)
    assert facts["takenBack"] == {"users": 0, "credits": 0}
    assert cli.facts("stats", "--since", "2026-01-01T00:00:00Z")["granting"]["runs"] == 1


def test_a_rate_of_nearly_everything_is_not_everything() -> None:
    runs = Runs(None, False, 1, 0, 1, 0, 0, 0, 10**6 - 1, 0, 0, 1, 0, None, None, None, None)  # noqa: FBT003 - as rows come
    assert runs.user_success_rate is not None
    assert 0.99 < runs.user_success_rate < 1


@pytest.mark.usefixtures("world")
def test_bad_input_is_one_line(cli: Cli) -> None:
    refused(cli("stats", "--days", "0"), 2, "0 is not in the range 1<=x<=3660")
    refused(cli("stats", "--since", "yesterday"), 2, "'yesterday' is not an instant such as 2026-12-01T00:00:00Z")
    refused(cli("stats", "--since", "2999-01-01T00:00:00Z"), 2, "2999-01-01T00:00:00+00:00 lies in the future")
    refused(cli("stats", "--since", "2026-01-01T00:00:00Z", "--days", "3"), 2, "--days 3 and --since 2026-01-01")
