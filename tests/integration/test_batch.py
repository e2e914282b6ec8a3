"""One batch: what it writes, and that nothing changes when it comes twice."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest

from refresh import runs

if TYPE_CHECKING:
    from tests.integration.world import World

DAYS_30 = timedelta(days=30)


def test_a_due_user_is_filled_up_and_the_grant_is_on_record(world: World) -> None:
    ada = world.user(due_in="-1 hour")
    before = world.see(ada)
    run = world.refresh()
    after = world.see(ada)
    assert (run.status, run.users_refreshed, run.credits_granted) == ("succeeded", 1, 600)
    assert after["credit_balance"] == 1_000
    assert after["next_refresh_at"] == before["next_refresh_at"] + DAYS_30
    (history,) = world.history(ada)
    assert history["status"] == "refreshed"
    assert history["run_id"] == run.run_id
    assert (history["window_start"], history["window_end"]) == (before["next_refresh_at"], after["next_refresh_at"])
    assert (history["old_balance"], history["credits_added"], history["new_balance"]) == (400, 600, 1_000)
    assert (history["plan_code"], history["grant_mode"], history["target"]) == ("free", "fill", 1_000)
    assert history["previous_next_refresh_at"] == before["next_refresh_at"]
    assert history["previous_last_refresh"] is None
    assert (history["windows_passed"], history["first_missed_at"]) == (0, None)
    assert after["last_credit_refresh"] == history["created_at"]
    (audit,) = world.audit(ada)
    assert (audit["actor"], audit["action"], audit["run_id"]) == ("test", "refreshed", run.run_id)
    assert (audit["balance_before"], audit["credits"], audit["balance_after"]) == (400, 600, 1_000)
    assert audit["occurred_at"] == history["created_at"]


def test_fill_never_lowers_a_balance_and_still_moves_the_window(world: World) -> None:
    rich = world.user(credit_balance=5_000)
    run = world.refresh()
    assert (run.users_refreshed, run.credits_granted) == (1, 0)
    assert world.see(rich)["credit_balance"] == 5_000
    assert world.history(rich)[0]["credits_added"] == 0


def test_a_custom_amount_overrides_the_plans(world: World) -> None:
    ada = world.user(custom_credit_amount=7_777)
    world.refresh()
    assert world.see(ada)["credit_balance"] == 7_777


@pytest.mark.parametrize(
    ("due_in", "passed"), [("-1 second", 0), ("-29 days", 0), ("-30 days", 1), ("-95 days", 3), ("-3000 days", 100)]
)
def test_missed_windows_become_one_grant_for_the_window_of_now(world: World, due_in: str, passed: int) -> None:
    ada = world.user(due_in=due_in)
    due = world.see(ada)["next_refresh_at"]
    world.refresh()
    (history,) = world.history(ada)
    assert history["window_start"] == due + passed * DAYS_30
    assert history["window_end"] == due + (passed + 1) * DAYS_30 == world.see(ada)["next_refresh_at"]
    assert (history["windows_passed"], history["first_missed_at"]) == (passed, due if passed else None)
    assert world.see(ada)["credit_balance"] == 1_000


def test_windows_do_not_move_with_the_clock_of_a_session_in_a_zone_with_summer_time(world: World) -> None:
    ada = world.user()
    world.sql.execute("UPDATE users SET next_refresh_at = '2026-03-20 12:00:00+00' WHERE id = %s", (ada,))
    run = world.scan(as_of=world.value("SELECT '2026-03-20 12:00:00+00'::timestamptz"))
    (batch_id,) = world.claim(run)
    with world.database.statements() as connection:
        connection.execute("SET timezone = 'America/New_York'")
    world.work([batch_id])
    assert world.history(ada)[0]["window_end"] == world.value("SELECT '2026-04-19 12:00:00+00'::timestamptz")


def test_delivered_again_later_a_batch_changes_nothing(world: World) -> None:
    ada = world.user()
    run = world.scan()
    ids = world.claim(run)
    assert len(world.work(ids)) == 1
    world.sql.execute("UPDATE users SET credit_balance = 10, next_refresh_at = now() WHERE id = %s", (ada,))
    assert world.work(ids) == []
    assert world.see(ada)["credit_balance"] == 10
    assert len(world.history(ada)) == len(world.audit(ada)) == 1


def test_of_two_deliveries_at_once_the_second_finds_the_batch_taken(world: World) -> None:
    ada = world.user()
    ids = world.claim(world.scan())
    with world.host() as host, world.background(ids) as first:
        host.execute("UPDATE users SET credit_balance = credit_balance - 50 WHERE id = %s", (ada,))
        first.start()
        world.until(lambda: world.waiting("test") == 1, "the first delivery waits for the host's lock")
        assert world.work(ids) == []
        host.commit()
        assert [outcome.users_refreshed for outcome in first.result()] == [1]
    assert world.see(ada)["credit_balance"] == 1_000
    assert [row["credits_added"] for row in world.history(ada)] == [650]  # the spend counts: nothing was lost


CHANGES = {
    "is not due any more": ("next_refresh_at = now() + interval '1 day'", 400, "skipped"),
    "was put on hold": ("credit_refresh_hold = true", 400, "held"),
    "became inactive": ("active = false", 400, "skipped"),
    "lost the plan": ("plan_code = NULL", 400, "skipped"),
    "changed plan": ("plan_code = 'pro'", 20_000, "refreshed"),
    "spent credits": ("credit_balance = 1", 1_000, "refreshed"),
    "was given a custom amount": ("custom_credit_amount = 5000", 5_000, "refreshed"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_user_who_since_the_scan(world: World, what: str) -> None:
    change, balance, outcome = CHANGES[what]
    ada = world.user()
    if what == "spent credits":
        balance = 1_000
    world.user("bob")
    run = world.scan()
    world.sql.execute(f"UPDATE users SET {change} WHERE id = %s", (ada,))  # noqa: S608 - from the table above
    (done,) = world.work(world.claim(run))
    assert world.see(ada)["credit_balance"] == balance
    counts = {"refreshed": done.users_refreshed, "held": done.users_held, "skipped": done.users_skipped}
    expected = {"refreshed": 1, "held": 0, "skipped": 0}
    expected[outcome] += 1
    assert counts == expected
    assert world.progress(run).status == "succeeded"


def test_a_user_whom_the_host_deleted_since_the_scan_is_accounted_for(world: World) -> None:
    ada = world.user()
    world.user("bob")
    run = world.scan()
    world.sql.execute("DELETE FROM users WHERE id = %s", (ada,))
    (done,) = world.work(world.claim(run))
    assert (done.users_refreshed, done.users_skipped) == (1, 1)


def test_a_window_granted_already_gives_no_credits_and_moves_the_user_on(world: World) -> None:
    ada = world.user()
    world.refresh()
    window_end = world.see(ada)["next_refresh_at"]
    # As after a restore of the users table alone: the date is back, the ledger is not.
    world.restore(
        "UPDATE users SET credit_balance = 3, next_refresh_at = next_refresh_at - interval '30 days' WHERE id = %s", ada
    )
    run = world.refresh()
    assert (run.status, run.users_refreshed, run.users_skipped, run.credits_granted) == ("succeeded", 0, 1, 0)
    assert world.see(ada)["credit_balance"] == 3
    assert world.see(ada)["next_refresh_at"] == window_end
    assert [row["action"] for row in world.audit(ada)] == ["refreshed", "already_granted"]
    assert len(world.history(ada)) == 1
    assert world.scan().users_selected == 0


def test_a_balance_that_would_not_fit_fails_its_user_and_nobody_else(world: World) -> None:
    poor = world.user(credit_balance=-(2**63), custom_credit_amount=2**63 - 1)
    ada = world.user("ada2")
    run = world.refresh()
    assert (run.status, run.users_failed, run.users_refreshed) == ("partial", 1, 1)
    (history,) = world.history(poor)
    assert (history["status"], history["error"]) == ("failed", "the balance would not fit 64 bits")
    assert world.audit(poor)[0]["action"] == "refresh_failed"
    assert world.see(ada)["credit_balance"] == 1_000
    assert world.scan().users_selected == 1  # due again


def test_the_database_refuses_a_batch_that_does_not_account_for_everybody(world: World) -> None:
    world.users(2)
    world.scan()
    with pytest.raises(psycopg.errors.CheckViolation, match="accounted"):
        world.sql.execute("UPDATE credit_refresh_batches SET status = 'done', users_refreshed = 1")


def test_the_database_refuses_a_second_live_grant_for_a_window(world: World) -> None:
    ada = world.user()
    world.refresh()
    with pytest.raises(psycopg.errors.UniqueViolation):
        world.sql.execute(
            """
            INSERT INTO credit_refresh_histories (run_id, user_id, status, window_start, window_end, old_balance,
                credits_added, new_balance)
            SELECT run_id, user_id, status, window_start, window_end, 0, 0, 0
            FROM credit_refresh_histories WHERE user_id = %s
            """,
            (ada,),
        )


def test_while_paused_a_batch_waits(world: World) -> None:
    ada = world.user()
    run = world.scan()
    ids = world.claim(run)
    world.sql.execute("UPDATE settings SET enabled = false")
    assert world.work(ids) == []
    assert world.progress(run).status == "running"
    world.sql.execute("UPDATE settings SET enabled = true")
    assert len(world.work(ids)) == 1
    assert world.see(ada)["credit_balance"] == 1_000


def test_the_rule_is_inlined(world: World) -> None:
    """No call of a rule function is left in the plan of the batch: PostgreSQL pays for expressions alone."""
    world.users(300)
    world.scan()
    from refresh.batch import GRANT_MANY  # noqa: PLC0415 - the text is wanted here alone

    statement = GRANT_MANY.replace("%(batch_id)s", "1").replace("%(backoff_seconds)s", "5")
    statement = statement.replace("%(few)s", "10")
    plan = "\n".join(row["QUERY PLAN"] for row in world.rows(f"EXPLAIN (VERBOSE) {statement}"))
    assert "date_bin" in plan
    for function in ("decide", "refresh_window", "credits_to_add", "calendar_period", "calendar_boundary"):
        assert f"{function}(" not in plan


def test_an_opened_run_is_not_finished_by_a_batch_of_another(world: World) -> None:
    world.users(250)
    run = world.scan()
    assert isinstance(run, runs.Opened)
    ids = world.claim(run)
    world.work(ids[:2])
    assert world.progress(run).status == "running"
    world.work(ids[2:])
    done = world.progress(run)
    assert (done.status, done.users_refreshed, done.batches_total) == ("succeeded", 250, 3)


def test_grants_whose_sum_does_not_fit_are_granted_all_the_same(world: World) -> None:
    for name in ("one", "two"):
        world.user(name, credit_balance=0, custom_credit_amount=2**63 - 1)
    run = world.refresh()
    assert (run.status, run.users_refreshed, run.credits_granted) == ("succeeded", 2, 2**63 - 1)


def test_resets_whose_sum_does_not_fit_are_done_all_the_same(world: World) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'reset'")
    for name in ("one", "two", "three"):
        world.user(name, credit_balance=2**63 - 1)
    run = world.refresh()
    assert (run.status, run.users_refreshed, run.credits_granted) == ("succeeded", 3, -(2**63 - 1))


@pytest.mark.parametrize("date", ["infinity", "-infinity"])
def test_an_infinite_date_is_refused(world: World, date: str) -> None:
    ada = world.user()
    with pytest.raises(psycopg.errors.CheckViolation, match="next_refresh_at"):
        world.sql.execute("UPDATE users SET next_refresh_at = %s WHERE id = %s", (date, ada))


def test_refused_by_the_key_a_user_moves_to_the_end_of_what_was_granted(world: World) -> None:
    ada = world.user()
    world.refresh()
    granted_until = world.see(ada)["next_refresh_at"]
    world.sql.execute("UPDATE plans SET interval_days = 7")
    world.restore("UPDATE users SET next_refresh_at = next_refresh_at - interval '30 days'")
    world.refresh()
    assert world.see(ada)["next_refresh_at"] == granted_until


def test_a_date_that_was_taken_away_comes_back_no_earlier_than_the_last_grants_end(world: World) -> None:
    ada = world.user()
    world.refresh()
    granted_until = world.see(ada)["next_refresh_at"]
    world.sql.execute("UPDATE users SET next_refresh_at = NULL, last_credit_refresh = NULL")
    world.sql.execute("UPDATE users SET next_refresh_at = now() - interval '1 minute', credit_balance = 0")
    assert world.see(ada)["next_refresh_at"] == granted_until
    assert world.refresh().users_selected == 0
