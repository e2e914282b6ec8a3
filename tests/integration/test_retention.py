"""Retention: whole months go, and nobody misses them: not the unique key, not the triggers, not the auditor."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest
from sqlalchemy.exc import ProgrammingError

from cli.database import migrate
from refresh import partitions, retention, retention_drop
from refresh.errors import RefusedError
from tests.integration.books import age, spend
from tests.integration.past import (
    live_for_years,
    make_partitions,
    month_of,
    months,
    names,
    old_rows,
    retain,
    survey,
    two_visits,
)
from tests.integration.rollbacks import roll_back
from tests.integration.test_migrations import downgrade
from tests.integration.test_storage import parameters

if TYPE_CHECKING:
    from tests.integration.world import World

UNTIL = """
SELECT u.id, granted_until(u.id), (
    SELECT max(window_end) FROM credit_refresh_histories WHERE user_id = u.id AND status = 'refreshed'
) AS closed_until, (
    SELECT window_end FROM credit_refresh_histories
    WHERE user_id = u.id AND status = 'refreshed' AND reversed_by_run_id IS NULL
    ORDER BY window_start DESC LIMIT 1
) AS last_end
FROM users AS u ORDER BY u.id
"""


def retention_rows(world: World) -> list[dict[str, object]]:
    return [row["detail"] for row in world.rows("SELECT detail FROM credit_audit_logs WHERE action = 'retention'")]


def test_years_go_and_nobody_misses_them(world: World) -> None:
    live_for_years(world)
    assert names(world) == []
    until, rows = world.rows(UNTIL), world.value("SELECT count(*) FROM credit_refresh_histories")
    found_before = survey(world)
    assert months(world).count("audit_logs_y2024m02") == 1
    report = retain(world)
    assert report.dropped is not None
    assert names(world) == []
    assert world.rows(UNTIL) == until
    assert [part.name for part in report.dropped.partitions] == [part.name for part in found_before.partitions]
    since = f"{report.dropped.horizon:y%Ym%m}"
    for table in ("audit_logs", "refresh_histories"):
        mine = [name.removeprefix(f"{table}_") for name in months(world) if name.startswith(table)]
        assert mine[0] == f"before_{since}"
        assert mine[2] == since
    kept = {(row["external_id"], row["status"]) for row in old_rows(world)}
    assert {("decade", "refreshed"), ("held", "held"), ("left", "refreshed"), ("given-back", "reversed")} <= kept
    assert (None, "refreshed") not in kept
    gone = rows - world.value("SELECT count(*) FROM credit_refresh_histories")
    assert gone > 400
    assert report.batch_rows == found_before.batch_rows > 20
    (months_row, *rows_rows) = retention_rows(world)
    assert months_row["booksSince"] == report.dropped.horizon.isoformat()
    assert months_row["rowsDropped"] == report.dropped.rows > gone
    assert {key: row[key] for row in rows_rows for key in row if key.endswith("Rows")} == {
        key: rows for key, rows in (("plannedRows", report.planned_rows), ("batchRows", report.batch_rows)) if rows
    }
    # Nothing is left to do, no month comes back, and everybody is refreshed as ever.
    assert retain(world).nothing
    before = months(world)
    with world.database.transaction() as connection:
        partitions.ensure_partitions(connection)
    assert months(world) == before
    spend(world)
    age(world, "31 days")
    world.refresh()
    world.sql.execute("UPDATE users SET active = true, credit_refresh_hold = false")
    world.refresh()
    assert names(world) == []


def test_what_was_kept_goes_once_it_is_needed_no_more(world: World) -> None:
    live_for_years(world)
    assert names(world) == []
    first = retain(world, retention.Terms(24, 90))
    assert names(world) == []
    kept = len(old_rows(world))
    world.sql.execute("UPDATE users SET active = true WHERE external_id = 'left'")
    world.refresh()
    second = retain(world)
    assert first.dropped is not None
    assert second.dropped is not None
    assert first.dropped.history_kept == kept
    assert "before" in second.dropped.partitions[0].name
    assert names(world) == []
    assert [name for name in months(world) if "before" in name] == [
        f"{table}_before_{second.dropped.horizon:y%Ym%m}" for table in ("audit_logs", "refresh_histories")
    ]
    assert "left" not in {row["external_id"] for row in old_rows(world)}
    assert retain(world, retention.Terms(24, 90)).nothing


FAULTS = {
    "balance_rose": "UPDATE users SET credit_balance = credit_balance + 700 WHERE external_id = 'left'",
    "date_before_grant": (
        "UPDATE users SET next_refresh_at = next_refresh_at - interval '1 day' WHERE external_id = 'left'"
    ),
    "last_refresh_disagrees": (
        "UPDATE users SET last_credit_refresh = last_credit_refresh + interval '1 day' WHERE external_id = 'left'"
    ),
    "audit_without_history": (
        "DELETE FROM credit_refresh_histories WHERE created_at > now() - interval '1 day' AND user_id = 1"
    ),
    "history_without_audit": (
        "DELETE FROM credit_audit_logs WHERE occurred_at > now() - interval '1 day' AND user_id = 1"
    ),
    "wrong_sum": ("UPDATE credit_refresh_histories SET new_balance = 1 WHERE window_start < now() - interval '1 year'"),
    "run_totals_disagree": (
        "UPDATE credit_refresh_runs SET users_refreshed = 9 WHERE finished_at > now() - interval '1 day'"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_auditor_finds_what_is_wrong_in_the_rest(world: World, fault: str) -> None:
    two_visits(world, "ada", "left")
    retain(world)
    assert names(world) == []
    world.sql.execute("ALTER TABLE credit_refresh_histories DROP CONSTRAINT ck_credit_refresh_histories_balance")
    world.restore(FAULTS[fault])
    assert fault in names(world)


@pytest.mark.parametrize("days_before_its_end", [60, 365])
def test_a_window_that_reaches_into_the_books_is_known_though_the_next_one_is_taken_back(
    world: World, days_before_its_end: int
) -> None:
    make_partitions(world)
    world.sql.execute("UPDATE plans SET interval_days = 365 WHERE code = 'pro'")
    user = world.user("ada", plan_code="pro", credit_balance=0)
    world.user("bob")
    world.refresh()
    age(world, "430 days")
    spend(world)
    run = world.scan()
    world.work(world.claim(run))
    first = world.history(user)[0]
    report = retain(world)
    assert report.dropped is not None
    assert first["window_start"] < report.dropped.horizon < first["window_end"]
    roll_back(world, run, reopen=True, users=["ada"])
    moved_to = first["window_end"] - timedelta(days=days_before_its_end)
    world.sql.execute("UPDATE users SET next_refresh_at = %s WHERE id = %s", (moved_to, user))
    assert world.see(user)["next_refresh_at"] == first["window_end"]
    world.refresh(as_of=first["window_end"] - timedelta(days=1))
    world.refresh()
    live = [row for row in world.history(user) if row["status"] == "refreshed" and row["reversed_by_run_id"] is None]
    assert [row["window_start"] for row in live] == [first["window_start"], first["window_end"]]
    assert names(world) == []


def test_beats_plan_of_a_window_that_has_not_ended_stays(world: World) -> None:
    make_partitions(world)
    world.sql.execute("UPDATE plans SET interval_days = 3650 WHERE code = 'pro'")
    user = world.user("decade", plan_code="pro")
    world.user("monthly")
    world.scheduled(dry_run=True)
    world.work(world.claim())
    age(world, "900 days")
    report = retain(world)
    assert report.dropped is not None
    assert [row["user_id"] for row in old_rows(world)] == [user]
    world.scheduled(dry_run=True)
    world.work(world.claim())
    assert [row["status"] for row in world.history(user)] == ["planned"]
    assert names(world) == ["overdue"] * 2


def test_the_books_are_not_forgotten_on_the_way_down(world: World) -> None:
    two_visits(world, "ada", "left")
    retain(world)
    with pytest.raises(ProgrammingError, match="retention has dropped what lies before"):
        downgrade(world.database, "0003")
    assert survey(world).books_since is not None
    assert names(world) == []
    world.sql.execute("UPDATE settings SET books_since = NULL")
    downgrade(world.database, "0003")
    migrate(world.database)


@pytest.mark.parametrize("name", ["decade", "left"])
def test_no_path_grants_again_what_is_gone(world: World, name: str) -> None:
    make_partitions(world)
    world.sql.execute("INSERT INTO plans (code, name, amount, interval_days) VALUES ('decade', 'Decade', 9, 3650)")
    user = world.user(name, plan_code="decade" if name == "decade" else "free")
    world.user("other")
    world.refresh()
    grant = world.history(user)[0]
    moved = grant["window_start"] - grant["window_end"]
    age(world, "900 days")
    world.sql.execute("UPDATE users SET active = external_id <> 'left'")
    world.refresh()
    assert retain(world).dropped is not None
    (row,) = [row for row in old_rows(world) if row["user_id"] == user]
    assert row["id"] == grant["id"]
    # The date cannot be moved back, by hand, by another plan or from it.
    for change in (
        f"next_refresh_at = next_refresh_at - interval '{-moved.days} days'",
        "next_refresh_at = NULL", f"next_refresh_at = '{row['window_start'].isoformat()}'",
        "plan_code = 'pro'", "credit_refresh_day = 5", "credit_refresh_day = NULL",
        f"plan_code = '{row['plan_code']}'",
    ):  # fmt: skip
        world.sql.execute(f"UPDATE users SET {change} WHERE id = %s", (user,))  # noqa: S608
        assert world.value("SELECT coalesce(next_refresh_at >= granted_until(id), true) FROM users WHERE id = %s", user)
    # Behind the triggers' back it is the key that refuses.
    if name == "decade":
        world.restore(
            "UPDATE users SET next_refresh_at = %s, credit_balance = 0 WHERE id = %s", row["window_start"], user
        )
        world.sql.execute("SELECT refresh_credits_if_due('decade')")
        world.restore("UPDATE users SET next_refresh_at = %s WHERE id = %s", row["window_start"], user)
        world.refresh()
        assert world.see(user)["credit_balance"] == 0
        assert world.see(user)["next_refresh_at"] == row["window_end"]
        assert [entry["action"] for entry in world.audit(user)][-2:] == ["already_granted"] * 2
        assert world.see(user)["credit_balance"] == 0


def test_a_reader_makes_it_give_up_with_nothing_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refresh.retention_drop.PAUSE_SECONDS", 0.01)
    two_visits(world, "ada")
    before = (months(world), world.rows("SELECT * FROM credit_refresh_batches"), retention_rows(world))
    with world.host() as host:
        host.execute("SELECT count(*) FROM credit_refresh_histories")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            retain(world)
    assert (months(world), world.rows("SELECT * FROM credit_refresh_batches"), retention_rows(world)) == before
    assert survey(world).books_since is None
    assert retain(world).dropped is not None


def test_who_reads_for_hours_is_met_before_the_copy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention_drop, "PAUSE_SECONDS", 0.01)
    monkeypatch.delattr(retention_drop, "_build")
    two_visits(world, "ada")
    with world.host() as dump:
        dump.execute(f"LOCK TABLE ONLY {month_of(world.history(1)[0])} IN ACCESS SHARE MODE")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            retain(world)


def test_batches_go_on_while_the_months_are_read(world: World) -> None:
    """Whoever writes to the months that go waits, and nobody else."""
    two_visits(world, "ada")
    world.user("bob")
    run = world.scan()
    with world.host() as host:
        host.execute("LOCK TABLE credit_refresh_histories_y2025m09 IN SHARE MODE")
        host.execute("LOCK TABLE credit_audit_logs_y2025m09 IN SHARE MODE")
        (outcome,) = world.work(world.claim(run))
        assert outcome.users_refreshed == 1


def test_old_rows_in_the_default_partition_go_too(world: World) -> None:
    make_partitions(world, years=2)
    world.user("ada", due_in="-1 hour")
    world.user("left")
    for _ in range(3):
        world.refresh()
        age(world, "400 days")
        spend(world)
        world.sql.execute("UPDATE users SET active = external_id <> 'left'")
    world.refresh()
    assert world.value("SELECT count(*) FROM ONLY credit_audit_logs_default") > 0
    assert names(world) == []
    report = retain(world)
    assert report.dropped is not None
    assert names(world) == []
    assert world.value("SELECT count(*) FROM credit_audit_logs_default") == 0
    assert world.value("SELECT count(*) FROM credit_refresh_histories_default") == 0
    assert {row["external_id"] for row in old_rows(world) if row["created_at"] < report.dropped.horizon} == {"left"}
    stored = parameters(world)
    for name in ("default", f"before_{report.dropped.horizon:y%Ym%m}"):
        for table in ("credit_audit_logs", "credit_refresh_histories"):
            assert "autovacuum_freeze_min_age=0" in stored[f"{table}_{name}"]
            assert stored[f"{table}_{name}"] == stored[f"{table}_{report.dropped.horizon:y%Ym%m}"]
        for table in ("credit_audit_logs", f"credit_audit_logs_{name}"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                world.sql.execute(f"TRUNCATE {table}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        world.sql.execute("DELETE FROM credit_audit_logs")


def test_acts_upon_the_service_and_holds_that_are_on_stay_on_record(world: World) -> None:
    two_visits(world, "ada")
    world.sql.execute("UPDATE users SET credit_refresh_hold = true, hold_reason = 'checking'")
    world.user("bob")
    world.sql.execute("UPDATE users SET credit_refresh_hold = true WHERE external_id = 'bob'")
    world.sql.execute("UPDATE users SET credit_refresh_hold = false WHERE external_id = 'bob'")
    for action in ("imported", "paused", "plan_set", "verified", "planned"):
        world.sql.execute("INSERT INTO credit_audit_logs (actor, action) VALUES ('kim', %s)", (action,))
    age(world, "500 days")
    retain(world)
    actions = [row["action"] for row in world.rows("SELECT action FROM credit_audit_logs ORDER BY id")]
    assert actions == ["hold_set", "imported", "paused", "plan_set", "verified", "retention", "retention"]


def test_two_at_once_are_one(world: World) -> None:
    two_visits(world, "ada")
    with world.host() as host:
        host.execute("SELECT pg_advisory_xact_lock(hashtextextended('credits.retention', 0))")
        with pytest.raises(RefusedError, match="under way already"):
            retain(world)


def test_a_service_younger_than_the_horizon_loses_nothing(world: World) -> None:
    world.users(3)
    world.refresh()
    assert survey(world).nothing
    assert retain(world).nothing
    with pytest.raises(RefusedError, match="12 months are too few"):
        retention.Terms(12, 90)
