"""Imports: a CSV of users into the table, all of it or nothing.

    rows → checked in Python → COPY into a temporary table → checked in SQL → lock and update the users that differ
    → insert the new ones → one audit row

An import grants nothing: it writes balances as the file says them, and no history. Bad rows go through the temporary
table as well, each with its reason, so that they come out in the file's order and the memory stays bounded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from psycopg import errors
from psycopg.sql import SQL, Composed, Identifier
from psycopg.types.json import Jsonb

from db import one
from refresh.errors import RefusedError
from refresh.holds import ACTOR
from refresh.import_columns import BALANCE, KEY, NEXT, Column, Known, Value, convert_row, fetch_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg

    from refresh.import_file import UserFile

Stage: TypeAlias = Literal["Reading", "Checking", "Writing", "Waiting for locks"]

EXAMPLES = 20
"""Bad rows that are named one by one."""

STATEMENT_TIMEOUT_SECONDS = 6 * 3_600
"""The pool's 30 seconds are meant for batches. COPY of 1,000,000 rows took 9 seconds; this admits billions of bytes."""

WRITING_ATTEMPTS = 60
WRITING_PAUSE_SECONDS = 1
"""How often an import tries again when a host holds one of its users for longer than `lock_timeout`. That limit stays
short, below the host's deadlock_timeout, so that we yield and not the host."""

_ROWS_BETWEEN_REPORTS = 2_048
_KEY_CONSTRAINT = "uq_users_external_id"


class Reject(NamedTuple):
    """A row that is not imported: where it starts, why, and its cells as they stand in the file."""

    line: int
    reason: str
    cells: list[str]


@dataclass(frozen=True, slots=True)
class Report:
    """What an import did.

    Attributes:
        new: users inserted.
        changed: users of whom at least one value differed from the file's.
        unchanged: users who were as the file has them already; nothing was written.
        bad: rows left out.
        kept: users who keep a later next_refresh_at than the file's, because they were granted until then.
        unscheduled: active users among the imported who have no next_refresh_at and no plan that sets it from outside.
    """

    new: int
    changed: int
    unchanged: int
    bad: int
    kept: int
    unscheduled: int

    @property
    def users(self) -> int:
        """Rows that were good."""
        return self.new + self.changed + self.unchanged


class BadRowsError(ValueError):
    """Some rows are bad and the caller did not ask to leave them out. Nothing may be committed."""

    def __init__(self, bad: int, examples: list[tuple[int, str]]) -> None:
        super().__init__(f"{bad:,} bad rows, the first in line {examples[0][0]}: {examples[0][1]}")
        self.bad = bad
        self.examples = examples


# Two imports that insert the same users in different orders would deadlock.
_ALONE = "SELECT pg_try_advisory_xact_lock(hashtextextended(current_schema() || '.import_users', 0))"
_PATIENCE = "SELECT set_config('statement_timeout', %s, true)"

_CREATE = SQL("""
CREATE TEMPORARY TABLE import_rows (line bigint NOT NULL, at bigint NOT NULL, reason text, {typed_columns})
ON COMMIT DROP
""")
_COPY = SQL("COPY import_rows (line, at, reason, {columns}) FROM STDIN")

# Rows that are bad for another reason count as well: which of the two lines is meant, only a person can say.
_MARK_DOUBLES = """
UPDATE import_rows AS r SET reason = format('external_id is in line %s already', d.first_line)
FROM (SELECT external_id, min(line) AS first_line FROM import_rows GROUP BY external_id HAVING count(*) > 1) AS d
WHERE r.external_id = d.external_id AND r.line > d.first_line AND r.reason IS NULL
"""
_MARK_WITHOUT_BALANCE = SQL("""
UPDATE import_rows AS r SET reason = 'credit_balance is needed for a new user'
WHERE r.reason IS NULL AND {without_balance}
    AND NOT EXISTS (SELECT FROM users AS u WHERE u.external_id = r.external_id)
""")
_COUNT = "SELECT count(*), count(reason) FROM import_rows"
_EXAMPLES = "SELECT line, reason FROM import_rows WHERE reason IS NOT NULL ORDER BY line LIMIT %s"
_REJECTS = "SELECT line, at, reason FROM import_rows WHERE reason IS NOT NULL ORDER BY line"

# In id order, as every statement of ours locks users. Who is as the file says is not locked at all: a repeated import
# stops nobody from spending.
_LOCK_DIFFERENT = SQL("""
CREATE TEMPORARY TABLE import_changes ON COMMIT DROP AS
SELECT u.id AS user_id, r.line
FROM import_rows AS r JOIN users AS u ON u.external_id = r.external_id
WHERE r.reason IS NULL AND {stored} IS DISTINCT FROM {wanted}
ORDER BY u.id
FOR NO KEY UPDATE OF u
""")
# A date never moves before the end of the last live grant's window: importing an old file earns nothing twice. Under
# the lock, and in a statement of its own, so that no grant can have come since.
_KEEP_GRANTED = """
UPDATE import_rows AS r SET next_refresh_at = g.window_end
FROM import_changes AS c
CROSS JOIN LATERAL (
    SELECT max(h.window_end) AS window_end
    FROM credit_refresh_histories AS h
    WHERE h.user_id = c.user_id AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
) AS g
WHERE r.line = c.line AND r.next_refresh_at < g.window_end
"""
_UPDATE = SQL("""
UPDATE users AS u SET {assignments}, updated_at = now()
FROM import_changes AS c JOIN import_rows AS r ON r.line = c.line
WHERE u.id = c.user_id AND {stored} IS DISTINCT FROM {wanted}
""")
# In the file's order: users who belong together lie together.
_INSERT = SQL("""
INSERT INTO users ({columns})
SELECT {columns} FROM import_rows AS r
WHERE r.reason IS NULL AND NOT EXISTS (SELECT FROM users AS u WHERE u.external_id = r.external_id)
ORDER BY r.line
""")
_COUNT_UNSCHEDULED = """
SELECT count(*)
FROM import_rows AS r
JOIN users AS u ON u.external_id = r.external_id
LEFT JOIN plans AS p ON p.code = u.plan_code
WHERE r.reason IS NULL AND u.active AND u.next_refresh_at IS NULL AND p.cadence IS DISTINCT FROM 'external'
"""
_AUDIT = "INSERT INTO credit_audit_logs (actor, action, detail) VALUES (%s, 'imported', %s)"


def import_users(
    connection: psycopg.Connection[Any],
    file: UserFile,
    *,
    actor: str,
    on_reject: Callable[[Reject], None] | None = None,
    on_progress: Callable[[Stage, int], None] = lambda _stage, _bytes: None,
) -> Report:
    """Import a CSV: insert the users who are new, and of the others change the columns that the file has.

    Args:
        connection: in a transaction of its own, which the caller commits when this returns.
        file: freshly opened.
        actor: who asks, for the audit log.
        on_reject: gets every bad row, in the file's order, and the good ones are imported; None: all must be good.
        on_progress: gets the stage and the bytes read, every few thousand rows.

    Raises:
        BadRowsError: and the caller must not commit.
        RefusedError: another import is running.
        psycopg.errors.LockNotAvailable: somebody held one of the users for more than a minute.
    """
    if not one(connection.execute(_ALONE))[0]:
        raise RefusedError("Another import is running: try again when it has ended")
    connection.execute(_PATIENCE, (f"{STATEMENT_TIMEOUT_SECONDS}s",))
    connection.execute(ACTOR, {"actor": actor})  # of the holds that it sets and ends
    statements = _Statements.of(file.columns)
    _load(connection, file, statements, on_progress)
    on_progress("Checking", file.read)
    users, bad = _check(connection, statements)
    if bad and on_reject is None:
        raise BadRowsError(bad, connection.execute(_EXAMPLES, (EXAMPLES,)).fetchall())
    if bad and on_reject is not None:
        for reject in _rejects(connection, file):
            on_reject(reject)
    on_progress("Writing", file.read)
    new, changed, kept = _write_patiently(connection, statements, lambda: on_progress("Waiting for locks", file.read))
    (unscheduled,) = one(connection.execute(_COUNT_UNSCHEDULED))
    report = Report(new, changed, users - bad - new - changed, bad, kept, unscheduled)
    detail = {"file": file.name, "columns": [column.name for column in file.columns], **asdict(report)}
    connection.execute(_AUDIT, (actor, Jsonb(detail)))
    return report


@dataclass(frozen=True, slots=True)
class _Statements:
    """The statements whose text depends on the file's columns, all of them from the list in `import_columns`."""

    create: Composed
    copy: Composed
    mark_without_balance: Composed
    lock_different: Composed | None
    update: Composed | None
    insert: Composed
    moves_dates: bool

    @classmethod
    def of(cls, columns: list[Column]) -> _Statements:
        names = [column.name for column in columns]
        others = [name for name in names if name != KEY]
        joined = SQL(", ").join
        listed = joined([Identifier(name) for name in names])
        stored = SQL("ROW({})").format(joined([Identifier("u", name) for name in others]))
        values = {name: _wanted(name, Identifier("r", name)) for name in others}
        wanted = SQL("ROW({})").format(joined(values.values()))
        return cls(
            create=_CREATE.format(
                typed_columns=joined([Identifier(column.name) + SQL(" " + column.sql_type) for column in columns])
            ),
            copy=_COPY.format(columns=listed),
            mark_without_balance=_MARK_WITHOUT_BALANCE.format(
                without_balance=SQL("r.credit_balance IS NULL") if BALANCE in names else SQL("true")
            ),
            lock_different=_LOCK_DIFFERENT.format(stored=stored, wanted=wanted) if others else None,
            update=_UPDATE.format(assignments=_assignments(values), stored=stored, wanted=wanted) if others else None,
            insert=_INSERT.format(columns=listed),
            moves_dates=NEXT in names,
        )


def _wanted(name: str, value: Identifier) -> Composed:
    """A known user may come without a balance, and keeps theirs; an empty cell elsewhere means what it says."""
    return SQL("coalesce({}, {})").format(value, Identifier("u", name)) if name == BALANCE else Composed([value])


def _assignments(values: dict[str, Composed]) -> Composed:
    return SQL(", ").join([SQL("{} = {}").format(Identifier(name), value) for name, value in values.items()])


def _load(
    connection: psycopg.Connection[Any],
    file: UserFile,
    statements: _Statements,
    on_progress: Callable[[Stage, int], None],
) -> None:
    known = fetch_known(connection, [column.name for column in file.columns])
    connection.execute(statements.create)
    with connection.cursor() as cursor, cursor.copy(statements.copy) as copy:
        for count, row in enumerate(_checked(file, known)):
            if count % _ROWS_BETWEEN_REPORTS == 0:
                on_progress("Reading", file.read)
            copy.write_row(row)
    connection.execute("ANALYZE import_rows")


def _checked(file: UserFile, known: Known) -> Iterator[list[Value]]:
    columns = file.columns
    nothing: list[Value] = [None] * len(columns)
    for line, at, cells, problem in file.rows():
        if problem is None:
            values, reason = convert_row(columns, cells, known)
            yield [line, at, reason, *values]
        else:
            yield [line, at, problem, *nothing]


def _check(connection: psycopg.Connection[Any], statements: _Statements) -> tuple[int, int]:
    """Find what a single row does not show. Returns the rows, and the bad ones among them."""
    connection.execute(_MARK_DOUBLES)
    connection.execute(statements.mark_without_balance)
    rows, bad = one(connection.execute(_COUNT))
    return rows, bad


def _rejects(connection: psycopg.Connection[Any], file: UserFile) -> Iterator[Reject]:
    with connection.cursor(name="import_rejects") as cursor:
        cursor.itersize = 1_000
        for line, at, reason in cursor.execute(_REJECTS):
            yield Reject(line, reason, file.cells_at(at))


def _write_patiently(
    connection: psycopg.Connection[Any], statements: _Statements, on_wait: Callable[[], None]
) -> tuple[int, int, int]:
    """Write; where somebody else is in the way, give all locks back, wait, and begin anew."""
    for _ in range(WRITING_ATTEMPTS - 1):
        try:
            with connection.transaction():
                return _write(connection, statements)
        except errors.LockNotAvailable:
            pass
        except errors.UniqueViolation as error:
            # A host was faster with a user who was new: now they are known.
            if error.diag.constraint_name != _KEY_CONSTRAINT:
                raise
        on_wait()
        connection.execute("SELECT pg_sleep(%s)", (WRITING_PAUSE_SECONDS,))
    return _write(connection, statements)


def _write(connection: psycopg.Connection[Any], statements: _Statements) -> tuple[int, int, int]:
    changed = kept = 0
    if statements.lock_different is not None and statements.update is not None:
        connection.execute(statements.lock_different)
        connection.execute("ANALYZE import_changes")
        if statements.moves_dates:
            kept = connection.execute(_KEEP_GRANTED).rowcount
        changed = connection.execute(statements.update).rowcount
    new = connection.execute(statements.insert).rowcount
    return new, changed, kept
