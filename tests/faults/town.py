"""A few users of the fault suite in a database of a test's own, and what people do to them."""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import dict_row

from db import Database
from refresh import holds, runs
from tests.conftest import LOCK_TIMEOUT_MS
from tests.faults import checker, population, witness
from tests.integration.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refresh.totals import Progress

PLANS = {plan.code: plan for plan in population.PLANS}
AN_HOUR = timedelta(hours=1)
INSTANTLY = timedelta(milliseconds=1)
"""A slot so narrow that each scan has its own."""

_SPEND = """
WITH spent AS (
    UPDATE credits.users SET credit_balance = credit_balance - %(amount)s WHERE external_id = %(name)s
    RETURNING external_id
)
INSERT INTO host.spends (external_id, amount) SELECT external_id, %(amount)s FROM spent
"""


def spend(connection: psycopg.Connection[Any], name: str, amount: int) -> None:
    """As the host does, in its transaction."""
    connection.execute(_SPEND, {"name": name, "amount": amount})


@dataclass(frozen=True)
class Town:
    """A database with the schema `host` and the witness."""

    world: World

    @property
    def sql(self) -> psycopg.Connection[dict[str, Any]]:
        """The test's own connection, in autocommit."""
        return self.world.sql

    def bring(  # noqa: PLR0913 - what a user is made of
        self,
        name: str,
        *,
        plan: str = "filled",
        balance: int | None = 100,
        due_in: timedelta | None = -AN_HOUR,
        custom: int | None = None,
        kind: str | None = None,
    ) -> None:
        """Bring a user in; without a date they come without a balance, too."""
        kind = kind or ("new" if due_in is None else "dated")
        with self.sql.transaction():
            now = self.world.value("SELECT now()")
            due_at = None if due_in is None else now + due_in
            balance = None if due_in is None else balance
            population.bring(self.sql, population.User(name, PLANS[plan], balance, due_at, custom, kind), now)
            if kind == "poison":
                self.sql.execute("INSERT INTO host.poisoned VALUES (%s)", (name,))

    def bring_many(self, count: int, *, due_in: timedelta = -AN_HOUR) -> None:
        """Users of all plans, `user-1` and so on."""
        for number in range(1, count + 1):
            plan = list(PLANS)[number % len(PLANS)]
            self.bring(f"user-{number}", plan=plan, balance=37 * number % 1_500, due_in=due_in)

    def spend(self, name: str, amount: int) -> None:
        spend(self.sql, name, amount)

    def set_back(self, name: str) -> None:
        """The host's mistake: the date of the last grant again, past the triggers."""
        with self.sql.transaction():
            self.sql.execute("SET LOCAL session_replication_role = replica")
            row = self.world.row(
                """
                SELECT u.id, u.next_refresh_at AS from_at, max(h.window_start) AS to_at
                FROM users AS u JOIN credit_refresh_histories AS h ON h.user_id = u.id AND h.status = 'refreshed'
                WHERE u.external_id = %s GROUP BY u.id
                """,
                name,
            )
            self.sql.execute("UPDATE users SET next_refresh_at = %s WHERE id = %s", (row["to_at"], row["id"]))
            self.sql.execute(
                "INSERT INTO host.moved (external_id, from_at, to_at) VALUES (%s, %s, %s)",
                (name, row["from_at"], row["to_at"]),
            )

    def hold(self, name: str) -> None:
        with self.world.database.transaction() as connection:
            holds.hold(connection, name, reason="a question", until=None, actor="cli:ops")

    def release(self, name: str) -> None:
        with self.world.database.transaction() as connection:
            assert holds.release(connection, name, actor="cli:ops")

    def open_scan(self, *, batch_size: int = 20) -> runs.Opened:
        """Beat's scan, in a slot of its own."""
        opened = self.world.scheduled(interval=INSTANTLY, batch_size=batch_size)
        assert isinstance(opened, runs.Opened), opened
        return opened

    def scan(self, *, batch_size: int = 20) -> Progress:
        """Beat's scan from its opening to its end."""
        run = self.open_scan(batch_size=batch_size)
        self.world.work(self.world.claim(run))
        return self.world.progress(run)

    def check(self, *, finished: bool) -> list[checker.Finding]:
        with psycopg.connect(self.sql.info.dsn, autocommit=True) as connection:
            return checker.check(connection, finished=finished)

    def watch(self) -> list[checker.Finding]:
        with psycopg.connect(self.sql.info.dsn, autocommit=True) as connection:
            return checker.watch(connection)


@contextmanager
def a_town(database_url: str, *, prepared: bool = False) -> Iterator[Town]:
    """A town in a fresh migrated database; the service is known to the host by the name of its connections.

    Args:
        database_url: of the database.
        prepared: it is the copy of a town.
    """
    database = Database(database_url, "credits", name="credits-worker", pool=2, lock_timeout_ms=LOCK_TIMEOUT_MS)
    options = "-c search_path=credits -c timezone=UTC"
    with closing(database):
        with database.statements() as connection:
            dsn = connection.info.dsn
        with psycopg.connect(
            dsn, autocommit=True, row_factory=dict_row, options=options, application_name="host"
        ) as sql:
            if not prepared:
                population.prepare(sql)
                witness.install(sql)
            yield Town(World(database, sql))
