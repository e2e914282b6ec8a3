"""Retention: what is older than somebody wants to keep goes, but never what the books still need.

    months before the horizon, both ledgers (retention_drop.py) → planned rows of old dry runs → batch rows of runs that
    ended before the books begin

The months are one transaction; rows go in pieces, a transaction each with its row in the audit log, so that a
repetition goes on wherever the last one was stopped. Runs stay for ever, with their totals. Unless months are given,
history and audit are kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from db import one, transaction
from refresh import runs
from refresh.errors import RefusedError
from refresh.retention_drop import Dropped, Horizon, Partition, drop_partitions, read_horizon, read_partitions

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

PIECE_ROWS = 10_000
"""Rows deleted in one transaction: a tenth of a second. Whoever opens a run waits for it."""
DOOR_TIMEOUT = timedelta(minutes=1)
MONTHS_MIN = 13
"""A year and the present month: less would drop windows of yearly plans as they end."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is to be kept.

    Attributes:
        months: of history and audit, before the present one; None: all of them.
        planned_days: planned rows of dry runs that are no older.
    """

    months: int | None
    planned_days: int

    def __post_init__(self) -> None:
        if self.months is not None and self.months < MONTHS_MIN:
            raise RefusedError(f"{self.months} months are too few: the books keep {MONTHS_MIN} at least")


@dataclass(frozen=True, slots=True)
class Survey:
    """What would go now.

    Attributes:
        books_since: where the books begin now; None: nothing was ever dropped.
        horizon: where they would begin, and why; None: no months were given.
        partitions: the months before it.
        planned_rows: of how many dry runs together, `planned_runs`; not counting those that go with the months.
        batch_rows: of runs that ended before the books begin.
    """

    books_since: datetime | None
    horizon: Horizon | None
    partitions: list[Partition]
    planned_rows: int
    planned_runs: int
    batch_rows: int

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to do."""
        return not self.partitions and not self.planned_rows and not self.batch_rows

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        horizon = self.horizon
        return {
            "booksSince": _iso(horizon.at if self.partitions and horizon else self.books_since),
            "heldBackBy": str(horizon.held_back_by) if horizon and horizon.held_back_by else None,
            "partitions": [partition.facts() for partition in self.partitions],
            "plannedRows": self.planned_rows,
            "batchRows": self.batch_rows,
        }


@dataclass(slots=True)
class Report:
    """What went. Rows are counted.

    Attributes:
        books_since: where the books begin now.
        dropped: the months; None: none were too old.
    """

    books_since: datetime | None = None
    dropped: Dropped | None = None
    planned_rows: int = 0
    batch_rows: int = 0

    @property
    def nothing(self) -> bool:
        """Whether there was nothing to do."""
        return self.dropped is None and not self.planned_rows and not self.batch_rows

    @property
    def summary(self) -> str:
        """What went, in a sentence."""
        if self.nothing:
            return "Nothing was too old."
        rows = f"{self.planned_rows:,} planned rows and {self.batch_rows:,} batch rows were deleted"
        if self.dropped is None:
            return f"{rows[:1].upper()}{rows[1:]}."
        kept = self.dropped.history_kept + self.dropped.audit_kept
        return (
            f"The books begin at {self.dropped.horizon:%Y-%m-%d}: {self.dropped.rows:,} older rows of history and "
            f"audit were dropped, {kept:,} are still needed and were kept; {rows}."
        )

    def facts(self) -> dict[str, object]:
        """What a log line or a JSON answer says of it."""
        dropped = self.dropped
        return {
            "booksSince": _iso(self.books_since),
            "partitions": [partition.facts() for partition in dropped.partitions] if dropped else [],
            "historyRowsKept": dropped.history_kept if dropped else 0,
            "auditRowsKept": dropped.audit_kept if dropped else 0,
            "plannedRows": self.planned_rows,
            "batchRows": self.batch_rows,
        }


# Beat's dry runs would plan a window anew that has not ended. A run that is being applied keeps its plan.
_OLD_PLANS = """
r.dry_run AND r.status <> 'running' AND r.created_at < now() - make_interval(days => %(planned_days)s)
AND NOT EXISTS (SELECT FROM credit_refresh_runs AS a WHERE a.subject_run_id = r.id AND a.status = 'running')
"""
_OLD_PLANNED = """
h.run_id = r.id AND h.status = 'planned' AND h.status <> 'refreshed'
AND NOT (h.reason = 'scheduled' AND h.window_end > now())
"""
# Where months go first, without those that go with them.
_PLANS = f"""
SELECT r.id, p.rows
FROM credit_refresh_runs AS r
CROSS JOIN LATERAL (
    SELECT count(*) AS rows FROM credit_refresh_histories AS h
    WHERE {_OLD_PLANNED} AND coalesce(greatest(h.window_start, h.created_at) >= %(horizon)s::timestamptz, true)
) AS p
WHERE {_OLD_PLANS} AND p.rows > 0
ORDER BY r.created_at
"""  # noqa: S608 - texts of this module alone
_DELETE_PLANNED = f"""
WITH piece AS MATERIALIZED (
    SELECT h.id, h.window_start
    FROM credit_refresh_runs AS r JOIN credit_refresh_histories AS h ON {_OLD_PLANNED}
    WHERE r.id = ANY (%(run_ids)s) AND {_OLD_PLANS}
    LIMIT %(rows)s
)
DELETE FROM credit_refresh_histories AS h USING piece AS p WHERE h.id = p.id AND h.window_start = p.window_start
"""  # noqa: S608 - texts of this module alone
_ENDED = "r.status <> 'running' AND r.finished_at < %(since)s"
_ENDED_RUNS = f"""
SELECT r.id, n.rows
FROM credit_refresh_runs AS r
CROSS JOIN LATERAL (SELECT count(*) AS rows FROM credit_refresh_batches AS b WHERE b.run_id = r.id) AS n
WHERE {_ENDED} AND n.rows > 0
ORDER BY r.created_at
"""  # noqa: S608 - the same
_DELETE_BATCHES = f"""
DELETE FROM credit_refresh_batches
WHERE id IN (
    SELECT b.id FROM credit_refresh_runs AS r JOIN credit_refresh_batches AS b ON b.run_id = r.id
    WHERE r.id = ANY (%(run_ids)s) AND {_ENDED}
    LIMIT %(rows)s
)
"""  # noqa: S608 - the same
_SINCE = "SELECT books_since FROM settings"
_PATIENCE = "SELECT set_config('statement_timeout', '6h', true)"
_AUDIT = "INSERT INTO credit_audit_logs (actor, action, detail) VALUES (%(actor)s, 'retention', %(detail)s)"


def books_since(connection: psycopg.Connection[Any]) -> datetime | None:
    """From when on the books are whole; None where nothing was ever dropped."""
    (since,) = one(connection.execute(_SINCE))
    return since if isinstance(since, datetime) else None


def survey(connection: psycopg.Connection[Any], terms: Terms) -> Survey:
    """What would go if retention was carried out now; nothing is changed.

    Args:
        connection: in autocommit.
        terms: what is to be kept.
    """
    with transaction(connection):
        connection.execute(_PATIENCE)
        horizon = read_horizon(connection, terms.months) if terms.months is not None else None
        partitions = read_partitions(connection, horizon.at) if horizon else []
        begin = books_since(connection)
        since = horizon.at if horizon and partitions else begin
        going = {"planned_days": terms.planned_days, "horizon": since if partitions else None}
        plans = connection.execute(_PLANS, going).fetchall()
        ended = connection.execute(_ENDED_RUNS, {"since": since}).fetchall()
    return Survey(
        begin, horizon, partitions, sum(rows for _, rows in plans), len(plans), sum(rows for _, rows in ended)
    )


def carry_out(
    connection: psycopg.Connection[Any],
    terms: Terms,
    *,
    actor: str,
    on_rows: Callable[[int], None] = lambda _rows: None,
) -> Report:
    """Drop and delete what is too old. Stopped anywhere, the next time goes on from there.

    The audit log has a row for the months, and one for each piece of single rows, written together with them.

    Args:
        connection: in autocommit.
        terms: what is to be kept.
        actor: who asks.
        on_rows: is told of each piece how many rows it had.

    Raises:
        RefusedError, psycopg.errors.LockNotAvailable: as `drop_partitions()`; nothing was changed.
    """
    report = Report()
    if terms.months is not None:
        report.dropped = drop_partitions(connection, terms.months, actor=actor)
    with transaction(connection):
        connection.execute(_PATIENCE)
        report.books_since = books_since(connection)
        values = {"planned_days": terms.planned_days, "since": report.books_since, "horizon": None, "actor": actor}
        plans = [run_id for run_id, _ in connection.execute(_PLANS, values)]
        ended = [run_id for run_id, _ in connection.execute(_ENDED_RUNS, values)]
    report.planned_rows = _in_pieces(connection, _DELETE_PLANNED, "plannedRows", {**values, "run_ids": plans}, on_rows)
    report.batch_rows = _in_pieces(connection, _DELETE_BATCHES, "batchRows", {**values, "run_ids": ended}, on_rows)
    return report


def _in_pieces(
    connection: psycopg.Connection[Any],
    statement: str,
    what: str,
    values: dict[str, Any],
    on_rows: Callable[[int], None],
) -> int:
    """Behind the door, so that nobody opens a run about the rows in the same instant."""
    total = 0
    rows = PIECE_ROWS if values["run_ids"] else 0
    while rows == PIECE_ROWS:
        with transaction(connection, lock_timeout=DOOR_TIMEOUT):
            runs.lock_door(connection)
            rows = connection.execute(statement, {**values, "rows": PIECE_ROWS}).rowcount
            if rows:
                detail = {"plannedDays": values["planned_days"], "booksSince": _iso(values["since"]), what: rows}
                connection.execute(_AUDIT, {"actor": values["actor"], "detail": Jsonb(detail)})
        on_rows(rows)
        total += rows
    return total


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
