"""The scan and the batch go by their indexes whatever the statistics say, and so does what runs every minute.

Among 50,000 users of whom a few hundred are due, beside a run that is going on: large enough that a wrong plan shows.
Blocks are counted, and no time.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, get_args
from uuid import UUID

import psycopg
import pytest

from refresh import delivery, metrics, runs, totals
from refresh.batch import GRANT_ALL, GRANT_MANY, GRANT_ONE, PLAN, TELL_MANY, TELL_ONE
from refresh.closing import close_batch
from refresh.work import pending_batches
from tests.integration.explained import Mode, explaining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cluster import Cluster
    from tests.integration.explained import Explainer

    Call = Callable[[psycopg.Connection[Any]], object]

USERS = 50_000
DUE = 500
IN_BATCHES = 101
BATCHES_GOING_ON = 3_000
RUNS_BEFORE = 2_000
LARGE_BLOCKS = 8
GOING_ON, NEW, DRY, SINGLE = UUID(int=1), UUID(int=2), UUID(int=3), UUID(int=4)

# The next hours' users lie in no order on disk.
_FILL = f"""
INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)
SELECT 'user-' || n, 'free', n % 1000, now() + make_interval(mins => (n * 7919) % {USERS} + 1)
FROM generate_series(1, {USERS}) AS n;
INSERT INTO credit_refresh_runs (source, requested_by, status, slot, created_at, started_at, finished_at)
SELECT 'beat', 'beat', 'succeeded', s.at, s.at, s.at, s.at
FROM generate_series('2025-10-01'::timestamptz, '2025-12-24', '1 hour') AS s (at);
INSERT INTO credit_refresh_batches (run_id, seq, user_ids, status, published_at, finished_at, users_refreshed)
SELECT r.id, seq, ARRAY[seq], 'done', now(), now(), 1
FROM credit_refresh_runs AS r CROSS JOIN generate_series(0, 19) AS seq;
INSERT INTO credit_refresh_histories
    (run_id, user_id, status, window_start, window_end, old_balance, credits_added, new_balance)
SELECT gen_random_uuid(), id, 'refreshed', at - interval '60 days', at - interval '30 days', 0, 0, 0
FROM (SELECT id, next_refresh_at AS at FROM users) AS u;
INSERT INTO credit_audit_logs (occurred_at, actor, action, user_id)
SELECT now() - make_interval(secs => id), 'beat', 'refreshed', id FROM users
"""  # noqa: S608 - texts of this module alone
# Published half a minute ago, to workers that have not come to them yet.
_GO_ON = f"""
INSERT INTO credit_refresh_runs (id, source, requested_by, started_at) VALUES ('{GOING_ON}', 'cli', 'test', now());
INSERT INTO credit_refresh_batches (run_id, seq, user_ids, published_at)
SELECT '{GOING_ON}', n, ARRAY[2 * n + 1], now() FROM generate_series(1, {BATCHES_GOING_ON}) AS n
"""  # noqa: S608 - the same
# One batch each of a run that grants, of one that plans, and of one for a single user. And a webhook endpoint that
# wants to know of users: what does not tell does not look.
_OPEN = f"""
INSERT INTO webhook_endpoints (url, secret, events, created_by)
VALUES ('https://hooks.example/', 'x', ARRAY['user.refreshed'], 'test');
INSERT INTO credit_refresh_runs (id, source, requested_by, dry_run, started_at)
SELECT id, 'cli', 'test', id = '{DRY}', now()
FROM unnest(ARRAY['{NEW}', '{DRY}', '{SINGLE}']::uuid[]) AS r (id);
INSERT INTO credit_refresh_batches (run_id, seq, user_ids)
SELECT r.id, 0, ARRAY(SELECT id FROM users WHERE wake_at <= now() ORDER BY id LIMIT r.users OFFSET r.after)
FROM (VALUES ('{NEW}'::uuid, 100, 0), ('{DRY}', 100, 0), ('{SINGLE}', 1, 100)) AS r (id, users, after)
"""  # noqa: S608 - the same
_SOME_DUE = f"UPDATE users SET next_refresh_at = now() - interval '1 hour' WHERE id % ({USERS} / {DUE}) = 0"  # noqa: S608
_ALL_DUE = "UPDATE users SET next_refresh_at = next_refresh_at - interval '100 days'"
_NONE_DUE = "UPDATE users SET next_refresh_at = next_refresh_at + interval '100 days'"

# What was done to the tables, in order; _GO_ON and _OPEN come last. No statistics but those that are asked for here.
STATISTICS = {
    "fresh": (_FILL, _SOME_DUE, _GO_ON, "VACUUM (ANALYZE)"),
    "none": (_FILL, _SOME_DUE, _GO_ON),
    "of empty tables": ("VACUUM (ANALYZE)", _FILL, _SOME_DUE, _GO_ON),
    "of when nobody was due": (_FILL, "VACUUM (ANALYZE)", _SOME_DUE, _GO_ON),
    "of when all were due": (_FILL, _ALL_DUE, "VACUUM (ANALYZE)", _NONE_DUE, "VACUUM users", _SOME_DUE, _GO_ON),
}


def change(connection: psycopg.Connection[Any], *scripts: str) -> None:
    """Past the triggers, statement by statement."""
    connection.execute("SET session_replication_role = replica")
    for statement in ";".join(scripts).split(";"):
        connection.execute(statement)
    connection.execute("RESET session_replication_role")


def keep_statistics(connection: psycopg.Connection[Any]) -> None:
    """From autovacuum, which would bring its own."""
    leaves = connection.execute(
        "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'credits'::regnamespace AND relkind = 'r'"
    ).fetchall()
    for (name,) in leaves:
        connection.execute(f"ALTER TABLE {name} SET (autovacuum_enabled = off)")


@pytest.fixture(scope="module", params=STATISTICS)
def crowd(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    """The statistics of one kind, and a session that holds them."""
    name = cluster.create(cluster.template)
    dsn = cluster.url(name).replace("+psycopg", "")
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=credits -c timezone=UTC") as connection:
        keep_statistics(connection)
        change(connection, *STATISTICS[request.param], _OPEN)
        yield connection
    cluster.drop(name)


@pytest.fixture(scope="module")
def large_tables(crowd: psycopg.Connection[Any]) -> set[str]:
    """A table of a few blocks may be read whole; so may a partition that nothing is in.

    Before the first statement is explained: what is rolled back leaves blocks in which nothing is, too.
    """
    rows = crowd.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'credits'::regnamespace AND relkind = 'r'"
        " AND pg_relation_size(oid) > %s * 8192",
        (LARGE_BLOCKS,),
    )
    return {name for (name,) in rows}


@pytest.fixture(params=get_args(Mode))
def explainer(
    request: pytest.FixtureRequest, crowd: psycopg.Connection[Any], large_tables: set[str]
) -> Iterator[Explainer]:
    del large_tables
    with explaining(crowd.info.dsn, request.param) as made:
        yield made


def scan(connection: psycopg.Connection[Any]) -> None:
    slot = datetime(2126, 1, 1, tzinfo=UTC)
    opened = runs.open_run(connection, runs.Request("beat", "beat", 100, slot=slot, reason=runs.SCHEDULED))
    assert isinstance(opened, runs.Opened)
    assert opened.users_selected == DUE - IN_BATCHES


def batch_of(connection: psycopg.Connection[Any], run_id: UUID) -> int:
    (row,) = (
        psycopg.Cursor(connection)
        .execute("SELECT id FROM credit_refresh_batches WHERE run_id = %s", (run_id,))
        .fetchall()
    )
    return int(row[0])


def granting(statement: str, run_id: UUID, users: int) -> Call:
    def grant(connection: psycopg.Connection[Any]) -> None:
        done = close_batch(connection, batch_of(connection, run_id), statement)
        assert done is not None
        assert done.users_refreshed == users

    return grant


def message(connection: psycopg.Connection[Any]) -> None:
    """What a worker asks before its batches and after them."""
    ids = [batch_of(connection, run_id) for run_id in (NEW, SINGLE)]
    assert len(pending_batches(connection, ids)) == 2
    assert totals.finish_runs(connection, [NEW, SINGLE]) == []


def failure(connection: psycopg.Connection[Any]) -> None:
    assert delivery.record_failure(connection, batch_of(connection, NEW), "tried") == 1
    delivery.unclaim_batches(connection, [batch_of(connection, SINGLE)])


def finish(connection: psycopg.Connection[Any]) -> None:
    psycopg.Cursor(connection).execute(
        "UPDATE credit_refresh_batches SET status = 'done', users_refreshed = 100 WHERE run_id = %s", (NEW,)
    )
    assert [done.run_id for done in totals.finish_runs(connection, [NEW])] == [NEW]


def minute(connection: psycopg.Connection[Any]) -> None:
    """What upkeep asks."""
    for scheduled in (True, False):
        assert delivery.record_losses(connection, scheduled=scheduled) == 0
        for run_id, ring_again in ((None, True), (NEW, False)):
            claim = delivery.Claim(scheduled=scheduled, max_attempts=5, run_id=run_id, ring_again=ring_again)
            delivery.claim_batches(connection, claim)
    assert delivery.give_up_batches(connection, max_attempts=5) == []
    assert totals.finish_runs(connection) == []


def scrape(connection: psycopg.Connection[Any]) -> None:
    """What monitoring asks, for the first time and ever after."""
    reader = metrics.Reader()
    for _ in range(2):
        found = reader.look(connection)
        assert found.users_due == DUE
        assert found.pending[1].batches == BATCHES_GOING_ON + 3
        assert found.ended["refresh", False, "succeeded"].runs > RUNS_BEFORE


def test_the_scan_goes_by_the_wake_index(explainer: Explainer, large_tables: set[str]) -> None:
    explained = explainer.explain(scan)
    for statement in explained:
        assert statement.read_whole() & large_tables == set()
    cut = explained[-1]
    assert cut.indexes("users") == {"ix_users_wake_at"}
    # Due users, not users: a block of the table for each, and those of the index.
    assert cut.blocks_of("users") < 2 * DUE
    assert sum(statement.blocks for statement in explained[:-1]) < 20


def test_the_scan_sorts_by_numbers_where_no_plan_is_atomic(crowd: psycopg.Connection[Any]) -> None:
    """Planned for the values at hand: a text in the first key makes a large scan take twice as long."""
    with explaining(crowd.info.dsn, "force_custom_plan") as explainer:
        cut = explainer.explain(scan)[-1]
    keys = [key for node in cut.nodes for key in node.get("Sort Key", ())]
    assert keys
    assert not [key for key in keys if "CASE" in key]


@pytest.mark.parametrize(
    ("grant", "users", "blocks_a_user"),
    [
        (granting(GRANT_MANY, NEW, 100), 100, 45),
        (granting(GRANT_ALL, NEW, 100), 100, 45),
        (granting(PLAN, DRY, 100), 100, 20),
        (granting(GRANT_ONE, SINGLE, 1), 1, 100),
        # A user's own row once more, a row of the outbox and its two index entries.
        (granting(TELL_MANY, NEW, 100), 100, 60),
        (granting(TELL_ONE, SINGLE, 1), 1, 115),
    ],
    ids=["many", "all or none", "plan", "one", "many, told of", "one, told of"],
)
def test_a_batch_touches_its_own_rows(
    explainer: Explainer, large_tables: set[str], grant: Call, users: int, blocks_a_user: int
) -> None:
    (batch,) = explainer.explain(grant)
    assert batch.read_whole() & large_tables == set()
    assert batch.indexes("users") == {"pk_users"}
    # Not the index over pending batches, of which a large run has many thousands.
    assert batch.indexes("credit_refresh_batches") == {"pk_credit_refresh_batches"}
    # The lock, the update and its index entries, and the rows of history and audit with theirs.
    assert batch.blocks < blocks_a_user * users


@pytest.mark.parametrize("call", [message, failure, finish])
def test_what_is_asked_with_every_message_looks_at_nothing_else(
    explainer: Explainer, large_tables: set[str], call: Call
) -> None:
    for statement in explainer.explain(call):
        assert statement.read_whole() & large_tables == set()
        assert statement.blocks < 30, statement.text


def test_what_upkeep_asks_every_minute_looks_at_what_is_pending(explainer: Explainer, large_tables: set[str]) -> None:
    for statement in explainer.explain(minute):
        assert statement.read_whole() & large_tables == set()
        # A few blocks for each, where each one's run is looked up.
        assert statement.blocks < 6 * BATCHES_GOING_ON, statement.text


def test_what_monitoring_asks_every_few_seconds_looks_at_who_is_due_and_what_is_pending(
    explainer: Explainer, large_tables: set[str]
) -> None:
    explained = explainer.explain(scrape)
    for statement in explained:
        assert statement.read_whole() & large_tables == set()
    again = explained[len(explained) // 2 :]
    assert any(statement.indexes("users") == {"ix_users_wake_at"} for statement in again)
    # A block for each who is due, and less for a batch; the runs that ended are not read again.
    assert sum(statement.blocks for statement in again) < 2 * DUE + BATCHES_GOING_ON
