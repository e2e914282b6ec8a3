"""What monitoring reads of the database: what is due and under way, and totals that never fall."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from refresh import delivery, metrics, retention, runs
from refresh.metrics import ENDS, Ended, Reader, Snapshot
from refresh.switch import turn
from tests.integration import past
from tests.integration.population import LARGEST
from tests.integration.rollbacks import roll_back

if TYPE_CHECKING:
    from tests.integration.world import World


def read(world: World) -> Snapshot:
    return Reader().read(world.database)


def live(snapshot: Snapshot, work: str = "refresh") -> Ended:
    return sum((snapshot.ended.get((work, False, status), Ended()) for status in ENDS), Ended())


def outcomes(ended: Ended) -> tuple[int, int, int, int]:
    return ended.users_refreshed, ended.users_held, ended.users_skipped, ended.users_failed


def overflowing(world: World, name: str) -> int:
    """A user whom each run fails."""
    world.sql.execute(
        "INSERT INTO plans (code, name, amount, grant_mode) VALUES ('add', 'Add', 5, 'add') ON CONFLICT DO NOTHING"
    )
    return world.user(name, plan_code="add", credit_balance=LARGEST)


def test_nothing_has_happened(world: World) -> None:
    found = read(world)
    assert (found.enabled, found.all_dry) == (True, False)
    assert (found.last_scan_at, found.last_success_at) == (None, None)
    assert (found.users_due, found.due_since, found.batch_seconds, found.ended) == (0, None, None, {})
    assert found.users_waiting == 0
    assert [(pending.scheduled, pending.runs, pending.batches) for pending in found.pending] == [
        (True, 0, 0), (False, 0, 0)
    ]  # fmt: skip


def test_a_pause_shows(world: World) -> None:
    with world.database.transaction() as connection:
        turn(connection, enabled=False, actor="test")
    assert not read(world).enabled
    world.sql.execute("UPDATE settings SET enabled = true, dry_run = true")
    assert (read(world).enabled, read(world).all_dry) == (True, True)


def test_the_due_are_those_whom_a_scan_takes(world: World) -> None:
    world.sql.execute("INSERT INTO plans (code, name, amount, active) VALUES ('old', 'Old', 5, false)")
    world.sql.execute("INSERT INTO plans (code, name, amount, cadence) VALUES ('paid', 'Paid', 5, 'external')")
    world.user("without a plan", plan_code=None, due_in="-9 hours")
    world.user("inactive", active=False, due_in="-8 hours")
    world.user("on an old plan", plan_code="old", due_in="-7 hours")
    world.user("held, and noted", credit_refresh_hold=True, due_in="-5 hours")
    assert world.refresh().users_held == 1
    world.user("later", due_in="1 hour")
    world.restore("UPDATE users SET plan_code = 'paid' WHERE id = %s", world.user("paid", due_in="-6 hours"))
    for name, due_in in (("ada", "-3 hours"), ("bob", "-1 hour")):
        world.user(name, due_in=due_in)
    found = read(world)
    assert found.due_since is not None
    assert found.users_due == 2
    assert found.at - found.due_since == pytest.approx(timedelta(hours=3), abs=timedelta(minutes=1))
    assert world.scan().users_selected == 2


def test_the_due_are_counted_up_to_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "USERS_MAX", 3)
    world.user("first", due_in="-2 hours")
    world.users(8)
    found = read(world)
    assert (found.users_due, found.users_waiting) == (3, 3)
    assert found.due_since is not None
    assert found.at - found.due_since > timedelta(minutes=119)


def test_whoever_hides_the_due_shows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users without a plan have waited for longer, and nobody looks past the bound: that nobody is due is not known."""
    monkeypatch.setattr(metrics, "USERS_MAX", 3)
    for number in range(3):
        world.user(f"without a plan {number}", plan_code=None, due_in="-2 hours")
    world.user("due", due_in="-1 hour")
    found = read(world)
    assert (found.users_due, found.due_since, found.users_waiting) == (0, None, 3)
    world.sql.execute("UPDATE users SET active = false WHERE plan_code IS NULL")
    found = read(world)
    assert (found.users_due, found.users_waiting) == (1, 1)


def test_what_is_under_way(world: World) -> None:
    world.users(250)
    run = world.scan()
    world.user("due")
    assert isinstance(world.scheduled(), runs.Opened)
    scheduled, asked = read(world).pending
    assert (scheduled.runs, scheduled.batches, scheduled.users) == (1, 1, 1)
    assert (asked.runs, asked.batches, asked.users, asked.retrying) == (1, 3, 250, 0)
    assert (scheduled.published_at, asked.published_at) == (None, None)

    first, second, third = world.claim(run)
    world.sql.execute(
        "UPDATE credit_refresh_batches SET published_at = published_at - interval '1 minute' WHERE id = %s", (second,)
    )
    oldest = world.value("SELECT min(published_at) FROM credit_refresh_batches")
    assert read(world).pending[1].published_at == oldest
    with world.database.statements() as connection:
        delivery.record_failure(connection, second, "tried")
    assert read(world).pending[1].published_at > oldest  # nobody waits for it
    world.work([first])
    asked = read(world).pending[1]
    assert (asked.batches, asked.users, asked.retrying) == (2, 150, 1)
    world.work([second, third])
    assert read(world).pending[1] == metrics.Pending(scheduled=False)


def test_scans(world: World) -> None:
    def scan() -> Any:
        world.sql.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 hour'")
        assert isinstance(world.scheduled(), runs.Opened)
        world.work(world.claim())
        return world.row("SELECT created_at, finished_at, status FROM credit_refresh_runs ORDER BY slot DESC LIMIT 1")

    world.user("ada")
    good = scan()
    found = read(world)
    assert (found.last_scan_at, found.last_success_at) == (good["created_at"], good["finished_at"])
    overflowing(world, "rich")
    bad = scan()
    assert bad["status"] == "failed"
    world.scheduled(dry_run=True)
    world.refresh()
    found = read(world)
    assert (found.last_scan_at, found.last_success_at) == (bad["created_at"], good["finished_at"])


def test_totals_are_the_ledgers(world: World) -> None:
    world.users(8)
    overflowing(world, "rich")
    world.user("held", credit_refresh_hold=True)
    run = world.scan()
    world.work(world.claim(run))
    world.refresh(dry_run=True)
    found = read(world)
    assert found.ended.keys() == {("refresh", False, "partial"), ("refresh", True, "failed")}
    assert outcomes(live(found)) == (8, 1, 0, 1)
    granted = world.value("SELECT sum(credits_added) FROM credit_refresh_histories WHERE status = 'refreshed'")
    assert (live(found).credits_added, live(found).credits_taken) == (granted, 0)

    roll_back(world, run)
    found = read(world)
    taken = -world.value("SELECT sum(credits_added) FROM credit_refresh_histories WHERE status = 'reversed'")
    assert taken == granted
    assert (live(found, "rollback").credits_added, live(found, "rollback").credits_taken) == (0, taken)
    assert live(found, "rollback").users_refreshed == 8
    assert live(found).credits_added == granted


def test_credits_that_a_reset_takes_off_do_not_lower_what_was_granted(world: World) -> None:
    world.sql.execute("UPDATE plans SET grant_mode = 'reset' WHERE code = 'free'")
    world.user("poor", credit_balance=400)
    world.refresh()
    world.user("rich", credit_balance=5_000)
    world.refresh()
    assert (live(read(world)).credits_added, live(read(world)).credits_taken) == (600, 4_000)


def test_sums_may_be_larger_than_64_bits(world: World) -> None:
    for name in ("ada", "bob", "cyd"):
        world.user(name)
        world.refresh()
    world.sql.execute("UPDATE credit_refresh_runs SET credits_granted = %s", (LARGEST,))
    assert live(read(world)).credits_added == 3 * LARGEST


def test_durations_of_runs(world: World) -> None:
    for seconds in (0.4, 0.5, 7, 100_000):
        world.user(f"user-{seconds}")
        run = world.scan()
        world.work(world.claim(run))
        world.sql.execute(
            "UPDATE credit_refresh_runs SET started_at = finished_at - make_interval(secs => %s) WHERE id = %s",
            (seconds, run.run_id),
        )
    world.refresh()  # finds nobody
    ended = live(read(world))
    assert (ended.runs, ended.timed, ended.microseconds) == (5, 4, 100_007_900_000)
    assert dict(zip(metrics.DURATIONS, ended.within, strict=True)) == {
        0.1: 0, 0.5: 2, 1: 2, 5: 2, 15: 3, 60: 3, 300: 3, 900: 3, 3_600: 3, 14_400: 3
    }  # fmt: skip


@pytest.mark.parametrize("batches", [3, 7, 20])
def test_durations_of_batches(world: World, monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Of each batch while there are few, of some where there are more."""
    monkeypatch.setattr(metrics, "SAMPLE_BATCHES", 7)
    world.users(10 * batches)
    world.refresh(batch_size=10)
    world.user("alone")
    world.refresh()
    world.refresh(dry_run=True)
    took = world.rows(
        """
        SELECT extract(epoch FROM b.finished_at - min(h.created_at))::float AS seconds
        FROM credit_refresh_batches AS b JOIN credit_refresh_histories AS h ON h.user_id = ANY (b.user_ids)
        WHERE cardinality(b.user_ids) = 10 GROUP BY b.id ORDER BY 1
        """
    )
    known = [row["seconds"] for row in took]
    assert len(known) == batches
    assert known[0] > 0
    found = read(world).batch_seconds
    assert found is not None
    median, p95, longest = found
    assert known[0] <= median <= p95 <= longest <= known[-1]
    if batches <= 7:
        assert median == pytest.approx(known[batches // 2])
        assert longest == pytest.approx(known[-1])


@pytest.mark.parametrize("settled_after", [timedelta(0), timedelta(milliseconds=20), timedelta(hours=1)])
def test_what_was_read_once_is_not_counted_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, settled_after: timedelta
) -> None:
    """Whoever has read before says what somebody says who reads everything for the first time."""
    monkeypatch.setattr(metrics, "SETTLED_AFTER", settled_after)
    lasting = Reader()

    def check() -> None:
        assert lasting.read(world.database).ended == read(world).ended

    check()
    world.users(4)
    going_on = world.scan()
    check()
    for number in range(3):
        world.user(f"ada-{number}")
        world.refresh()
        check()
    check()
    world.work(world.claim(going_on))
    check()
    assert outcomes(live(lasting.read(world.database))) == (7, 0, 0, 0)
    roll_back(world, going_on)
    check()


def test_retention_lowers_no_total(world: World) -> None:
    past.live_for_years(world)
    lasting = Reader()
    before = lasting.read(world.database).ended
    assert sum(ended.users_refreshed for ended in before.values()) > 0
    report = past.retain(world, retention.Terms(months=13, planned_days=90))
    assert report.dropped is not None
    assert report.batch_rows > 0
    assert lasting.read(world.database).ended == read(world).ended == before
