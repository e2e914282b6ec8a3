"""Each guard, and the shortest sequence that needs it: clean while it is there, and red without it."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis

from refresh import delivery, runs
from settings import CHECKOUT, environment
from tests.faults import breaks
from tests.faults.breaks import BREAKS, Break, Edit, GoneError, Swap
from tests.faults.faults.catalogue import FAULTS
from tests.faults.town import AN_HOUR, Town, a_town, spend
from tests.integration.hooks import endpoint, outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import embedded


A_CENTURY = timedelta(days=36_500)
"""A slot that does not end while a test looks."""


@pytest.fixture
def town(database_url: str) -> Iterator[Town]:
    with a_town(database_url) as made:
        yield made


@pytest.fixture
def upkeep(database_url: str, servers: embedded.Servers) -> Iterator[Callable[[str | None], None]]:
    """Upkeep in a process of its own, as a worker would have it, with a broker that has lost everything."""
    with redis.Redis.from_url(servers.redis_url.replace("redis+socket://", "unix://").partition("?")[0]) as broker:
        broker.flushdb()

        def run(broken: str | None) -> None:
            broken_in = "" if broken is None else "import tests.faults.broken; "
            variables = {} if broken is None else {"FAULTS_BREAK": broken}
            subprocess.run(
                [sys.executable, "-c", f"{broken_in}from tasks.upkeep import upkeep; upkeep()"],
                cwd=CHECKOUT,
                env=environment(DATABASE_URL=database_url, REDIS_URL=servers.redis_url, **variables),
                check=True,
            )

        yield run
        broker.flushdb()


def _set_back(town: Town) -> None:
    town.bring_many(5)
    town.scan()
    town.set_back("user-1")


def unique_key(town: Town) -> None:
    _set_back(town)
    town.scan()


def row_lock(town: Town) -> None:
    town.bring_many(5)
    ids = town.world.claim(town.open_scan())
    with ThreadPoolExecutor() as pool, town.world.host() as host:
        spend(host, "user-2", 30)
        batch = pool.submit(town.world.work, ids)
        # Without the lock, it waits with what it has read. With it, whoever is locked is put off.
        town.world.until(lambda: batch.done() or town.world.waiting("credits-worker") > 0, "the batch")
        host.commit()
        batch.result()
    _do_what_was_put_off(town)


def _do_what_was_put_off(town: Town) -> None:
    town.sql.execute("UPDATE credit_refresh_batches SET next_attempt_at = now() WHERE status = 'pending'")
    town.world.work(town.world.claim())


def recheck(town: Town) -> None:
    town.bring_many(5)
    run = town.open_scan()
    town.hold("user-3")
    town.world.work(town.world.claim(run))


def advisory_lock(town: Town) -> None:
    open_two(town)
    town.world.work(town.world.claim())


def open_two(town: Town) -> None:
    """One run is opened while another is being opened."""
    town.bring_many(5)
    world = town.world
    with ThreadPoolExecutor() as pool:
        with world.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            runs.open_run(connection, runs.Request("cli", "cli:ops", 20))
            other = pool.submit(world.open, batch_size=20)
            world.until(lambda: other.done() or world.waiting("credits-worker") > 0, "the other opening")
        other.result()


def savepoint(town: Town) -> None:
    town.bring_many(5)
    town.bring("toad", kind="poison")
    run = town.open_scan()
    with town.world.database.statements() as connection:
        for batch_id in town.world.claim(run):
            try:
                town.world.work([batch_id])
            except psycopg.Error as error:
                delivery.record_failure(connection, batch_id, str(error))


def batch_claim(town: Town) -> None:
    town.bring_many(40)
    first, second = town.world.claim(town.open_scan())
    for batch_id in (first, first, second):
        town.world.work([batch_id])


def run_finish(town: Town) -> None:
    town.bring_many(40)
    for batch_id in town.world.claim(town.open_scan()):
        town.world.work([batch_id])


def slot(town: Town) -> None:
    town.bring_many(5)
    for _ in range(2):
        opened = town.world.scheduled(interval=A_CENTURY)
        if isinstance(opened, runs.Opened):
            town.world.work(town.world.claim(opened))


def idempotency_key(town: Town) -> None:
    town.bring_many(5, due_in=AN_HOUR)
    for _ in range(2):
        town.world.open(force=True, idempotency_key="once", reason="a gift")
        town.world.work(town.world.claim())


SEQUENCES: dict[str, Callable[[Town], None]] = {
    "unique-key": unique_key,
    "row-lock": row_lock,
    "recheck": recheck,
    "advisory-lock": advisory_lock,
    "savepoint": savepoint,
    "batch-claim": batch_claim,
    "run-finish": run_finish,
    "slot": slot,
    "idempotency-key": idempotency_key,
}


def _take_out(town: Town, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if BREAKS[name].sql:
        town.sql.execute(BREAKS[name].sql)
    breaks.take_out(name, monkeypatch.setattr)


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_guard_is_enough(town: Town, name: str) -> None:
    SEQUENCES[name](town)
    assert town.check(finished=False) == []


@pytest.mark.parametrize("name", SEQUENCES)
def test_without_the_guard_the_checker_is_red(town: Town, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _take_out(town, name, monkeypatch)
    SEQUENCES[name](town)
    found = town.check(finished=False)
    assert found
    assert {finding.rule for finding in found} <= set(BREAKS[name].rules), found


@pytest.mark.parametrize("name", ["row-lock", "recheck", "batch-claim"])
def test_the_statements_that_tell_lose_their_guard_too(town: Town, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint(town.world, "user.refreshed")
    _take_out(town, name, monkeypatch)
    SEQUENCES[name](town)
    found = town.check(finished=False)
    assert found
    assert {finding.rule for finding in found} <= set(BREAKS[name].rules), found
    assert outbox(town.world, "user.refreshed")


@pytest.mark.parametrize("broken", [None, "upkeep"])
def test_only_upkeep_knows_of_what_was_lost(
    town: Town, upkeep: Callable[[str | None], None], broken: str | None
) -> None:
    town.bring_many(5)
    run = town.open_scan()
    assert town.world.claim(run)  # and the messages never came
    town.sql.execute("UPDATE credit_refresh_batches SET published_at = published_at - interval '1 minute'")
    upkeep(broken)
    found = town.world.rows("SELECT id FROM credit_refresh_batches WHERE attempts = 1 AND next_attempt_at IS NULL")
    town.world.work([row["id"] for row in found])  # whose messages are there again
    assert {finding.rule for finding in town.check(finished=True)} == ({"unfinished", "due-left"} if broken else set())


def test_two_openings_are_seen_while_they_last(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    _take_out(town, "advisory-lock", monkeypatch)
    open_two(town)
    assert {finding.rule for finding in town.watch()} == {"two-batches"}


def test_there_are_ten_and_each_is_shown() -> None:
    assert BREAKS.keys() == SEQUENCES.keys() | {"upkeep"}
    assert len(BREAKS) == 10
    for broken in BREAKS.values():
        assert set(broken.faults) <= FAULTS.keys()
        assert broken.rules


@pytest.mark.parametrize(
    "change",
    [
        Edit("refresh.work.GRANT_MANY", "a text that was never there"),
        Edit("refresh.work.GRANT_MANY", "SELECT"),
        Edit("refresh.work.NOTHING", "SELECT"),
        Edit("refresh.work.do_batch", "SELECT"),
        Swap("refresh.work.nothing", print),
        Swap("refresh.work.GRANT_MANY", print),
    ],
)
def test_a_guard_that_has_gone_elsewhere_raises(change: Edit | Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BREAKS, "gone", Break("a guard", "it was", ("none",), changes=(change,)))

    def put(*_arguments: Any) -> None:
        pytest.fail("nothing is to be replaced")

    with pytest.raises(GoneError):
        breaks.take_out("gone", put)


@pytest.mark.parametrize("name", sorted(BREAKS))
def test_a_process_of_the_service_starts_broken(name: str, database_url: str, servers: embedded.Servers) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.broken", "stats", "--json"],
        cwd=CHECKOUT,
        env=environment(DATABASE_URL=database_url, REDIS_URL=servers.redis_url, FAULTS_BREAK=name),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
