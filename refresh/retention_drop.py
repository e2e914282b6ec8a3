"""Dropping the months before a horizon, and keeping of them what somebody still needs.

    see that nobody reads → lock the old partitions against writers → a new partition with the rows that are needed
    → (the door, the parents) → detach and drop the old ones, attach the new one, say from when on the books are whole

One transaction: all of it or nothing. What takes long is done while batches run: only the last step, which is DDL
alone, locks the tables against them, for a fraction of a second, and gives up where somebody reads. What is kept lies
in one partition for all of the time before the horizon, which the next month's retention replaces.

Who needs an old row says retention_needs.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID  # noqa: TC003 - the same

import psycopg
from psycopg.rows import class_row
from psycopg.sql import SQL, Identifier, Literal
from psycopg.types.json import Jsonb

from db import one, transaction
from refresh import runs
from refresh.errors import RefusedError
from refresh.partitions import LOCK_TIMEOUT
from refresh.retention_needs import AUDIT, HISTORY, NEEDED, NEXT_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

ATTEMPTS = 5
PAUSE_SECONDS = 1.0
"""How often the tables are asked for, each time for `LOCK_TIMEOUT`: a dump or an audit reads for longer than anybody
should wait, and then it is for the next night."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition that can go.

    Attributes:
        table: whose; with the partition's own name.
        since: the first instant in it; None: it holds what earlier retentions have kept.
        until: the first instant after it.
        rows: counted.
        size_bytes: on disk, with indexes.
    """

    table: str
    name: str
    since: datetime | None
    until: datetime
    rows: int
    size_bytes: int

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "table": self.table,
            "name": self.name,
            "since": self.since.isoformat() if self.since else None,
            "until": self.until.isoformat(),
            "rows": self.rows,
            "sizeBytes": self.size_bytes,
        }


@dataclass(frozen=True, slots=True)
class Horizon:
    """Where the books are to begin.

    Attributes:
        at: midnight UTC of a month's first day.
        held_back_by: the unfinished run that needs older months than were asked to go; None: none does.
    """

    at: datetime
    held_back_by: UUID | None


@dataclass(frozen=True, slots=True)
class Dropped:
    """What went, and what was kept of it. Rows are counted by table: history, then audit."""

    horizon: datetime
    partitions: list[Partition]
    history_kept: int
    audit_kept: int

    @property
    def rows(self) -> int:
        """Rows that are gone."""
        return sum(partition.rows for partition in self.partitions) - self.history_kept - self.audit_kept


_KEYS = {HISTORY: "window_start", AUDIT: "occurred_at"}

# An unfinished run's rows stay, and those of the run that it is about; so do those of the instant it decides as of.
_HORIZON = """
SELECT
    least(h.at, date_trunc('month', o.since, 'UTC')) AS at,
    CASE WHEN o.since < h.at THEN o.run_id END AS held_back_by
FROM (SELECT date_trunc('month', now() - make_interval(months => %(months)s), 'UTC') AS at) AS h
LEFT JOIN (
    SELECT r.id AS run_id, least(r.created_at, r.as_of, s.created_at, s.as_of, p.created_at) AS since
    FROM credit_refresh_runs AS r
    LEFT JOIN credit_refresh_runs AS s ON s.id = r.subject_run_id
    LEFT JOIN credit_refresh_runs AS p ON p.id = r.parent_run_id
    WHERE r.status = 'running'
    ORDER BY since LIMIT 1
) AS o ON true
"""
_PARTITIONS = r"""
SELECT p.relname AS table, c.relname AS name, b.since, b.until, pg_total_relation_size(c.oid) AS size_bytes, 0 AS rows
FROM pg_inherits AS i
JOIN pg_class AS p ON p.oid = i.inhparent AND p.relkind = 'p'
JOIN pg_class AS c ON c.oid = i.inhrelid
CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid) AS text) AS e
CROSS JOIN LATERAL (
    SELECT
        substring(e.text FROM $$FROM \('([^']+)'\)$$)::timestamptz AS since,
        substring(e.text FROM $$TO \('([^']+)'\)$$)::timestamptz AS until
) AS b
WHERE p.relnamespace = current_schema()::regnamespace AND p.relname = ANY (%(tables)s) AND b.until <= %(horizon)s
ORDER BY p.relname DESC, b.until
"""
_ROWS = SQL("SELECT count(*) FROM {}")

# A scan over years of rows takes as long as it takes; no lock is waited for that long.
_PATIENCE = """
SELECT
    set_config('statement_timeout', '6h', true), set_config('idle_in_transaction_session_timeout', '6h', true),
    set_config('work_mem', '64MB', true), set_config('lock_timeout', %(lock_timeout)s, true)
"""
_PAUSE = "SELECT pg_sleep(%s)"
_ASTRAY = SQL("SELECT EXISTS (SELECT FROM {default} WHERE {key} < {horizon})")
_CREATE = SQL("CREATE TABLE {new} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES) {storage}")
# As the default partition is stored: by our migrations, or by somebody's own ALTER TABLE.
_STORAGE = """
SELECT coalesce('WITH (' || array_to_string(reloptions, ', ') || ')', '') FROM pg_class WHERE oid = %s::regclass
"""
# So that attaching it looks at no row.
_BOUND = SQL("ALTER TABLE {new} ADD CONSTRAINT before_books CHECK ({key} < {horizon})")
_FILL = SQL("INSERT INTO {new} {rows}")
_KEEP_TRUNCATE_REFUSED = SQL("""
CREATE TRIGGER audit_is_not_truncated BEFORE TRUNCATE ON {new}
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()
""")
_ALONE = "SELECT pg_try_advisory_xact_lock(hashtextextended(current_schema() || '.retention', 0))"
_SINCE = "UPDATE settings SET books_since = %(horizon)s"
_AUDIT = "INSERT INTO credit_audit_logs (actor, action, detail) VALUES (%(actor)s, 'retention', %(detail)s)"


def read_horizon(connection: psycopg.Connection[Any], months: int) -> Horizon:
    """Where the books begin when whole months are kept, and no unfinished run loses what it needs.

    Args:
        connection: anything.
        months: how many, before the present one.
    """
    with connection.cursor(row_factory=class_row(Horizon)) as cursor:
        return one(cursor.execute(_HORIZON, {"months": months}))


def read_partitions(connection: psycopg.Connection[Any], horizon: datetime) -> list[Partition]:
    """The partitions that lie before a horizon, their rows counted; none where no month has passed it.

    Args:
        connection: in a transaction, which has time from then on.
        horizon: the books' new beginning.
    """
    connection.execute(_PATIENCE, {"lock_timeout": _ms(LOCK_TIMEOUT)})
    return _counted(connection, _find(connection, horizon))


def _find(connection: psycopg.Connection[Any], horizon: datetime) -> list[Partition]:
    with connection.cursor(row_factory=class_row(Partition)) as cursor:
        found = cursor.execute(_PARTITIONS, {"tables": list(_KEYS), "horizon": horizon}).fetchall()
    return [] if all(partition.since is None for partition in found) else found


def _counted(connection: psycopg.Connection[Any], found: list[Partition]) -> list[Partition]:
    rows = (one(connection.execute(_ROWS.format(Identifier(partition.name)))) for partition in found)
    return [replace(partition, rows=count) for partition, (count,) in zip(found, rows, strict=True)]


def drop_partitions(connection: psycopg.Connection[Any], months: int, *, actor: str) -> Dropped | None:
    """Drop the partitions before the horizon, but for the rows that somebody needs, and note it in the audit log.

    Args:
        connection: in autocommit: it is a transaction of its own.
        months: how many are kept before the present one.
        actor: who asks.

    Returns:
        What went; None when there was nothing.

    Raises:
        RefusedError: a run was opened meanwhile that needs them, or somebody else is at it; nothing was changed.
        psycopg.errors.LockNotAvailable: somebody reads the tables; nothing was changed.
    """
    with transaction(connection):
        if not one(connection.execute(_ALONE))[0]:
            raise RefusedError("somebody else is at it: retention is under way already")
        horizon = read_horizon(connection, months).at
        found = _find(connection, horizon)
        if not found:
            return None
        connection.execute(_PATIENCE, {"lock_timeout": _ms(LOCK_TIMEOUT)})
        astray = [table for table in _KEYS if _is_astray(connection, table, horizon)]
        replaced = [partition.name for partition in found] + [f"{table}_default" for table in astray]
        _patiently(connection, lambda: _try_readers(connection, replaced))
        _patiently(connection, lambda: _lock(connection, replaced, "SHARE"))
        found = _counted(connection, found)
        kept = {table: _build(connection, table, horizon, astray=table in astray) for table in _KEYS}
        _patiently(connection, lambda: _swap(connection, months, horizon, found, astray))
        dropped = Dropped(horizon, found, kept[HISTORY], kept[AUDIT])
        connection.execute(_SINCE, {"horizon": horizon})
        detail = {
            "booksSince": horizon.isoformat(),
            "rowsDropped": dropped.rows,
            "historyRowsKept": dropped.history_kept,
            "auditRowsKept": dropped.audit_kept,
            "partitions": [partition.facts() for partition in found],
        }
        connection.execute(_AUDIT, {"actor": actor, "detail": Jsonb(detail)})
        return dropped


def _is_astray(connection: psycopg.Connection[Any], table: str, horizon: datetime) -> bool:
    """Whether rows from before the horizon lie in the default partition, as of windows older than the service."""
    names = {"default": Identifier(f"{table}_default"), "key": Identifier(_KEYS[table]), "horizon": Literal(horizon)}
    return bool(one(connection.execute(_ASTRAY.format(**names)))[0])


def _build(connection: psycopg.Connection[Any], table: str, horizon: datetime, *, astray: bool) -> int:
    """The partition of what is needed, and a default one without old rows; returns how many are needed."""
    name = _before(table, horizon)
    names = {
        "table": Identifier(table),
        "new": Identifier(name),
        "key": Identifier(_KEYS[table]),
        "horizon": Literal(horizon),
        "storage": SQL(one(connection.execute(_STORAGE, (f"{table}_default",)))[0]),
    }
    connection.execute(_CREATE.format(**names))
    connection.execute(_BOUND.format(**names))
    values = {"horizon": Literal(horizon), "next_windows": Literal(NEXT_WINDOWS), "kept": Identifier(name)}
    rows = sum(
        connection.execute(_FILL.format(new=Identifier(name), rows=SQL(needed).format(**values))).rowcount
        for needed in NEEDED[table]
    )
    made = [name]
    if astray:
        made.append(f"{table}_default_new")
        younger = SQL("SELECT * FROM {} WHERE {} >= {}").format(
            Identifier(f"{table}_default"), Identifier(_KEYS[table]), Literal(horizon)
        )
        connection.execute(_CREATE.format(**{**names, "new": Identifier(made[-1])}))
        connection.execute(_FILL.format(new=Identifier(made[-1]), rows=younger))
    if table == AUDIT:
        for new in made:
            connection.execute(_KEEP_TRUNCATE_REFUSED.format(new=Identifier(new)))
    return rows


def _swap(
    connection: psycopg.Connection[Any], months: int, horizon: datetime, found: list[Partition], astray: list[str]
) -> None:
    # Behind the door, nobody opens a run about what goes; afterwards whoever asks finds where the books begin.
    runs.lock_door(connection)
    now = read_horizon(connection, months)
    if now.at < horizon:
        raise RefusedError(f"run {now.held_back_by} was opened meanwhile and needs what was to go: ask again")
    _lock(connection, list(_KEYS), "ACCESS EXCLUSIVE")
    for table in _KEYS:
        parent, default = Identifier(table), Identifier(f"{table}_default")
        names = [partition.name for partition in found if partition.table == table]
        for name in names:
            connection.execute(SQL("ALTER TABLE {} DETACH PARTITION {}").format(parent, Identifier(name)))
            connection.execute(SQL("DROP TABLE {}").format(Identifier(name)))
        if table in astray:
            connection.execute(SQL("ALTER TABLE {} DETACH PARTITION {}").format(parent, default))
            connection.execute(SQL("DROP TABLE {}").format(default))
            renamed = SQL("ALTER TABLE {} RENAME TO {}").format(Identifier(f"{table}_default_new"), default)
            connection.execute(renamed)
        connection.execute(
            SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM (MINVALUE) TO ({})").format(
                parent, Identifier(_before(table, horizon)), Literal(horizon)
            )
        )
        if table in astray:
            connection.execute(SQL("ALTER TABLE {} ATTACH PARTITION {} DEFAULT").format(parent, default))


def _before(table: str, horizon: datetime) -> str:
    return f"{table}_before_y{horizon:%Y}m{horizon:%m}"


def _lock(connection: psycopg.Connection[Any], names: list[str], mode: str) -> None:
    tables = SQL(", ").join(SQL("ONLY {}").format(Identifier(name)) for name in names)
    connection.execute(SQL("LOCK TABLE {} IN {} MODE").format(tables, SQL(mode)))


def _try_readers(connection: psycopg.Connection[Any], replaced: list[str]) -> None:
    """Take what the exchange will lock, and let go of it: whoever reads for hours is met before the copy, too."""
    _lock(connection, [*_KEYS, *replaced], "ACCESS EXCLUSIVE")
    raise psycopg.Rollback


def _patiently(connection: psycopg.Connection[Any], step: Callable[[], None]) -> None:
    """Try a few times what needs locks that somebody has; what a failed try had locked is free again meanwhile."""
    for left in reversed(range(ATTEMPTS)):
        try:
            with transaction(connection):
                step()
        except psycopg.errors.LockNotAvailable:
            if not left:
                raise
            connection.execute(_PAUSE, (PAUSE_SECONDS,))
        else:
            return


def _ms(wait: timedelta) -> str:
    return f"{wait.total_seconds() * 1000:.0f}ms"
