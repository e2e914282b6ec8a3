"""The database: connections, limits and the only commit.

`transaction()` is the one way to change anything in several statements. `statements()` is for the hot path, where
one statement is the whole transaction: the server commits it by itself, even if the worker that sent it is stopped
or killed in the same instant, and no round trip is spent on BEGIN and COMMIT.
"""

from __future__ import annotations

import math
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psycopg
from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, QueuePool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from sqlalchemy import Connection

Row = TypeVar("Row")

ALEMBIC_INI = Path(__file__).resolve().parent / "alembic.ini"
REVISION = "0008"
"""The migration that this code was written for; a test holds it against `migrations/`. Asking Alembic would cost each
command most of a second."""

# A batch of 100 takes milliseconds. These end what is stuck in every pool, where Celery's soft time limits hold in
# prefork alone; a worker frozen inside a transaction gives its locks back.
STATEMENT_TIMEOUT_SECONDS = 30
IDLE_IN_TRANSACTION_SECONDS = 60
CONNECT_TIMEOUT_SECONDS = 5
CONNECTIONS_MAX = 10
"""Of one process's pool; whoever needs another waits."""
SILENCE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4, "tcp_user_timeout": 30_000}
"""A wire that has gone silent for good is given up after half a minute; TCP's own patience is a quarter of an hour, or
two hours. The names are libpq's; a local socket has no use for them."""
IDLE_SECONDS = 1.0
"""A pooled connection that was idle for longer is asked whether it still is one."""

# Half of the host's deadlock_timeout, or less: should we and a host ever wait for each other, our wait ends first, so
# that PostgreSQL never has to pick a victim, which might be the host.
LOCK_TIMEOUT_MS = 500
_LOCK_TIMEOUT = """
SELECT set_config('lock_timeout', least(%s,
    extract(epoch FROM current_setting('deadlock_timeout')::interval) * 500)::int::text, false)
"""


class DatabaseError(RuntimeError):
    """The database cannot be used as it is. The text is one line for people and names the way out."""


class Database:
    """A pool of connections whose `search_path` is the service's schema and whose limits are set.

    Args:
        url: an SQLAlchemy URL, `postgresql+psycopg://…` (`Settings.database_url`).
        schema: a checked identifier (`Settings.database_schema`).
        name: what `pg_stat_activity` shows.
        pool: connections that stay open for the next use, of `CONNECTIONS_MAX` at once; 0 for commands that connect
            once. Where more are busy at once, each of the others is opened anew, which takes longer than most
            statements.
        lock_timeout_ms: how long a statement may wait for a lock, where the server's deadlock_timeout admits as much.
    """

    def __init__(
        self,
        url: str,
        schema: str,
        *,
        name: str = "credits",
        pool: int = 0,
        lock_timeout_ms: int = LOCK_TIMEOUT_MS,
    ) -> None:
        self.schema = schema
        options = " ".join(
            f"-c {key}={value}"
            for key, value in {
                "search_path": schema,
                "timezone": "UTC",
                "statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS}s",
                "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS}s",
                # The statements are short and exact: compiling one to machine code costs more than running it.
                "jit": "off",
            }.items()
        )
        pooling: dict[str, Any] = {"poolclass": NullPool}
        if pool:
            pooling = {"poolclass": QueuePool, "pool_size": pool, "max_overflow": CONNECTIONS_MAX - pool}
        self._engine = create_engine(
            url,
            connect_args={
                "options": options,
                "connect_timeout": CONNECT_TIMEOUT_SECONDS,
                "application_name": name,
                **SILENCE,
            },
            # The driver's own transactions are used; SQLAlchemy would turn autocommit on and off with each loan.
            isolation_level="AUTOCOMMIT",
            **pooling,
        )

        @event.listens_for(self._engine, "connect")
        def limit_lock_waits(connection: psycopg.Connection[Any], _entry: ConnectionPoolEntry) -> None:
            connection.autocommit = True
            connection.execute(_LOCK_TIMEOUT, (lock_timeout_ms,))

        # As `pool_pre_ping`, but not for each message of a busy worker, which would pay a tenth of the message for it.
        @event.listens_for(self._engine, "checkin")
        def note_return(_connection: object, entry: ConnectionPoolEntry) -> None:
            entry.info["returned"] = time.monotonic()

        @event.listens_for(self._engine, "checkout")
        def ping_idle(connection: psycopg.Connection[Any], entry: ConnectionPoolEntry, _loan: object) -> None:
            if time.monotonic() - entry.info.get("returned", math.inf) < IDLE_SECONDS:
                return
            try:
                connection.execute("SELECT 1")
            except psycopg.OperationalError as error:
                raise DisconnectionError from error

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A connection for Alembic, which opens its own transactions.

        Raises:
            DatabaseError: nothing answers at the address, or it refuses us.
        """
        try:
            connection = self._engine.connect().execution_options(isolation_level="READ COMMITTED")
        except DBAPIError as error:
            raise DatabaseError(f"The database cannot be reached: {one_line(error)} (see DATABASE_URL)") from error
        with connection:
            yield connection

    @contextmanager
    def statements(self) -> Iterator[psycopg.Connection[Any]]:
        """A psycopg connection in autocommit: each statement is a transaction of its own.

        Raises:
            DatabaseError: nothing answers at the address, or it refuses us.
        """
        try:
            loan = self._engine.raw_connection()
        except (DBAPIError, psycopg.OperationalError) as error:
            raise DatabaseError(f"The database cannot be reached: {one_line(error)} (see DATABASE_URL)") from error
        with closing(loan):
            yield cast("psycopg.Connection[Any]", loan.driver_connection)

    @contextmanager
    def transaction(self, *, lock_timeout: timedelta | None = None) -> Iterator[psycopg.Connection[Any]]:
        """One transaction on a connection of its own: see `transaction()`.

        Raises:
            DatabaseError: nothing answers at the address, or it refuses us.
        """
        with self.statements() as connection, transaction(connection, lock_timeout=lock_timeout):
            yield connection

    def dispose(self) -> None:
        """Drop pooled connections; a forked child calls it, for psycopg connections do not survive a fork."""
        self._engine.dispose(close=False)

    def close(self) -> None:
        """Close pooled connections."""
        self._engine.dispose()

    def require_migrated(self) -> None:
        """Check that the tables are those that this code was written for.

        Raises:
            DatabaseError: unreachable, not migrated, or migrated by another release.
        """
        with self.statements() as connection:
            (present, where) = one(
                connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL, current_schema()")
            )
            if where not in {self.schema, None}:
                raise DatabaseError(
                    f"The connection's search_path is {where!r} instead of {self.schema!r}: a pooler such as PgBouncer "
                    "drops it; set it on the role (docs/guide.md)."
                )
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if present else None
        found = row[0] if row else None
        if found is None:
            raise DatabaseError(
                f"The database has no tables of ours in schema {self.schema!r}: run `credits db upgrade` first."
            )
        if found != REVISION:
            raise DatabaseError(
                f"The database is at migration {found}, this release needs {REVISION}: run `credits db upgrade`."
            )


@contextmanager
def transaction(connection: psycopg.Connection[Any], *, lock_timeout: timedelta | None = None) -> Iterator[None]:
    """One transaction: committed at the end of the block, rolled back when the block raises.

    Inside another one it is a savepoint: what raises in the block undoes the block alone.

    Args:
        connection: in autocommit (`Database.statements()`), or in a transaction.
        lock_timeout: for this transaction alone, where waiting for ourselves is the point (opening runs). Its
            statements may take as long again.
    """
    with connection.transaction():
        if lock_timeout is not None:
            wait = int(lock_timeout.total_seconds() * 1000)
            connection.execute(
                "SELECT set_config('lock_timeout', %s, true), set_config('statement_timeout', %s, true)",
                (str(wait), str(2 * wait)),
            )
        yield


def one(cursor: psycopg.Cursor[Row]) -> Row:
    """The row of a statement that always has one."""
    row = cursor.fetchone()
    if row is None:
        raise DatabaseError("A statement that always returns a row returned none.")
    return row


def one_line(error: BaseException) -> str:
    """The first line of a database error, without SQLAlchemy's echo of the statement and its parameters."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
