"""A year's refreshes of the same users: how large their table and its indexes become, with autovacuum at work."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click
import psycopg

from bench.bare import refresh_alone
from bench.report import benchmark
from bench.worlds import Worlds, libpq_url
from cli.output import err
from db import Database, one
from refresh import runs
from refresh.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from embedded import Servers

POINTS = 20
# PostgreSQL's own, for whatever migration 0004 sets but for the fillfactor of batches, which is older.
_DEFAULTS = """
DO $$
DECLARE
    part record;
BEGIN
    FOR part IN
        SELECT c.oid::regclass AS name, split_part(o.option, '=', 1) AS option
        FROM pg_class AS c CROSS JOIN LATERAL unnest(c.reloptions) AS o (option)
        WHERE c.relnamespace = 'credits'::regnamespace AND c.relname <> 'credit_refresh_batches'
            OR c.oid = 'credits.credit_refresh_batches'::regclass AND o.option NOT LIKE 'fillfactor%'
    LOOP
        EXECUTE format('ALTER TABLE %s RESET (%I)', part.name, part.option);
    END LOOP;
END
$$
"""
_WAYS = {"PostgreSQL's settings": _DEFAULTS, "ours": "SELECT 1", "no autovacuum": """
    ALTER TABLE users SET (autovacuum_enabled = off)
"""}  # fmt: skip
_SIZES = """
SELECT
    pg_relation_size('users') AS table_bytes, pg_relation_size('pk_users') AS id_bytes,
    pg_relation_size('uq_users_external_id') AS external_id_bytes, pg_relation_size('ix_users_wake_at') AS wake_bytes,
    pg_relation_size('credit_refresh_batches') AS batches_bytes,
    (SELECT autovacuum_count FROM pg_stat_user_tables WHERE relid = 'users'::regclass) AS vacuums
"""
# Each user has a grant and an audit row of each round, and stands where the last one left them.
_WRONG = """
SELECT
    (SELECT count(*) FROM credit_refresh_histories WHERE status = 'refreshed') - %(grants)s,
    (SELECT count(*) FROM credit_audit_logs WHERE action = 'refreshed') - %(grants)s,
    (SELECT count(*) FROM credit_refresh_runs WHERE status = 'succeeded' AND users_refreshed = %(users)s) - %(rounds)s,
    (
        SELECT count(*) FROM users AS u
        LEFT JOIN (
            SELECT user_id, count(*) AS grants, max(window_end) AS until FROM credit_refresh_histories GROUP BY user_id
        ) AS h ON h.user_id = u.id
        WHERE h.grants IS DISTINCT FROM %(rounds)s OR h.until IS DISTINCT FROM u.next_refresh_at
    )
"""


class _World:
    """A database whose users are refreshed again and again."""

    def __init__(self, url: str, change: str) -> None:
        self._database = Database(url, "credits", pool=2)
        self.seconds: list[float] = []
        self.sizes: list[dict[str, Any]] = []
        with self._database.statements() as connection:
            connection.execute(change)

    def refresh(self) -> None:
        """One round by force, which moves each date on as a due grant does, with no statement of ours in between."""
        started = time.perf_counter()
        refresh_alone(self._database, runs.Request("cli", "bench", 100, force=True), Selection())
        self.seconds.append(time.perf_counter() - started)

    def note(self) -> None:
        with self._database.statements() as connection:
            cursor = connection.execute(_SIZES)
            columns = [column.name for column in cursor.description or ()]
            self.sizes.append(dict(zip(columns, one(cursor), strict=True)))

    def verify(self, users: int, rounds: int) -> None:
        with self._database.statements() as connection:
            connection.execute("SET statement_timeout = 0")
            values = {"grants": users * rounds, "users": users, "rounds": rounds}
            wrong = one(connection.execute(_WRONG, values))
        if any(wrong):
            raise SystemExit(f"not every user was refreshed once in each round: {wrong}")

    def close(self) -> None:
        self._database.close()


@contextmanager
def _autovacuum_every(running: Servers, seconds: int) -> Iterator[None]:
    with psycopg.connect(libpq_url(running.database_url), autocommit=True) as admin:
        try:
            admin.execute(f"ALTER SYSTEM SET autovacuum_naptime = '{seconds}s'")
        except psycopg.errors.InsufficientPrivilege as error:
            raise SystemExit("this benchmark sets autovacuum_naptime: its role must be a superuser") from error
        admin.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            admin.execute("ALTER SYSTEM RESET autovacuum_naptime")
            admin.execute("SELECT pg_reload_conf()")


@click.command()
@click.option("--users", default=20_000, show_default=True, type=click.IntRange(100), help="Users in the table.")
@click.option(
    "--rounds", default=100, show_default=True, type=click.IntRange(POINTS),
    help="How often all of them are refreshed; the issue's figure is for 1,000.",
)  # fmt: skip
@click.option(
    "--naptime", default=1, show_default=True, type=click.IntRange(1),
    help="Seconds between autovacuum's looks at a database, for rounds with no day between; PostgreSQL's own is 60.",
)  # fmt: skip
@click.option(
    "--settings", "ways", multiple=True, default=tuple(_WAYS), type=click.Choice(list(_WAYS)),
    help="Those alone; can be repeated. A thousand rounds of all three take half an hour and 26 GB.",
)  # fmt: skip
def bloat(users: int, rounds: int, naptime: int, ways: tuple[str, ...]) -> None:
    """What a thousand refreshes of 20,000 users leave of the users table, with PostgreSQL's settings and with ours."""
    with benchmark("bloat") as (running, report), _autovacuum_every(running, naptime), ExitStack() as stack:
        template = Worlds(running, users, name="bloat")
        stack.callback(template.drop)
        worlds = {way: _World(stack.enter_context(template.copy()), _WAYS[way]) for way in _WAYS if way in ways}
        for world in worlds.values():
            stack.callback(world.close)
            world.note()
        for done in range(1, rounds + 1):
            for world in worlds.values():
                world.refresh()
                if done % (rounds // POINTS) == 0:
                    world.note()
            if done % (rounds // POINTS) == 0:
                sizes = ", ".join(f"{world.sizes[-1]['table_bytes'] / 1e6:.1f}" for world in worlds.values())
                err.print(f"{done}/{rounds}: {sizes} MB", highlight=False)
        for world in worlds.values():
            world.verify(users, rounds)
        title = f"{users:,} users refreshed {rounds:,} times, verified: {users * rounds:,} grants each"
        report.table(title, [_row(name, world) for name, world in worlds.items()])
        for what in ("table", "wake"):
            named = {"table": "users table", "wake": "wake index"}[what]
            report.lines(
                what, f"{named}: {title}", ("rounds", "MB"),
                {
                    name: [(i * (rounds // POINTS), size[f"{what}_bytes"] / 1e6) for i, size in enumerate(world.sizes)]
                    for name, world in worlds.items()
                },
            )  # fmt: skip
        report.figures("sizes", {name: world.sizes for name, world in worlds.items()})
        report.figures("seconds", {name: world.seconds for name, world in worlds.items()})


def _row(name: str, world: _World) -> dict[str, object]:
    first, last = world.sizes[0], world.sizes[-1]
    tenth = max(1, len(world.seconds) // 10)
    return {
        "settings": name,
        **{
            what: f"{first[f'{key}_bytes'] / 1e6:.1f} → {last[f'{key}_bytes'] / 1e6:.1f}"
            for what, key in {
                "table, MB": "table", "id index, MB": "id", "external id index, MB": "external_id",
                "wake index, MB": "wake", "batches, MB": "batches",
            }.items()
        },
        "vacuums": last["vacuums"],
        "a round at first, s": f"{statistics.median(world.seconds[:tenth]):.2f}",
        "at last, s": f"{statistics.median(world.seconds[-tenth:]):.2f}",
    }  # fmt: skip
