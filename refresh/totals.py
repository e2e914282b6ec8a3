"""How far a run has come, and how it ends: both are questions to its batches, and no row that every batch updates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - the same

from psycopg.rows import class_row

from refresh.errors import RefusedError
from refresh.webhook_events import TELL_RUNS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import psycopg


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has just ended, with its totals. Seconds run from the scan to the last commit."""

    run_id: UUID
    kind: str
    work: str
    status: str
    dry_run: bool
    users_selected: int
    users_refreshed: int
    users_held: int
    users_skipped: int
    users_failed: int
    credits_granted: int
    seconds: float
    correlation_id: str | None

    def facts(self) -> dict[str, object]:
        """What a log line says of it."""
        facts = {**asdict(self), "run_id": str(self.run_id), "seconds": round(self.seconds, 3)}
        if self.correlation_id is None:
            del facts["correlation_id"]
        return facts


# Cheap enough to ask after every message: one look at the run's last pending batch. As NOT EXISTS it is joined, and
# by statistics of a quiet hour the join reads all that is pending.
_DRAINED = """
SELECT r.id
FROM credit_refresh_runs AS r
WHERE {which} AND r.status = 'running'
    AND (
        SELECT b.id FROM credit_refresh_batches AS b WHERE b.run_id = r.id AND b.status = 'pending'
        ORDER BY b.id DESC LIMIT 1
    ) IS NULL
"""
_DRAINED_THESE = _DRAINED.format(which="r.id = ANY (%(run_ids)s)")
_DRAINED_ANY = _DRAINED.format(which="true")

# Guarded, and issued after a worker's own commit: of two workers that close the last two batches at once, the later
# one sees both. A batch that was given up counts all its users as failed.
_FINISH = f"""
WITH finished AS (
UPDATE credit_refresh_runs AS r SET
    status = CASE
        WHEN t.cancelled THEN 'cancelled'
        WHEN t.failed = 0 THEN 'succeeded'
        WHEN t.refreshed + t.held + t.skipped > 0 THEN 'partial'
        ELSE 'failed'
    END,
    finished_at = clock_timestamp(),
    users_refreshed = t.refreshed, users_held = t.held, users_skipped = t.skipped, users_failed = t.failed,
    credits_granted = t.credits, batches_total = t.batches, error = t.error
FROM (
    SELECT
        run_id, count(*) AS batches, sum(users_refreshed) AS refreshed, sum(users_held) AS held,
        sum(users_skipped) AS skipped, min(error) AS error,
        -- A statistic, where two grants of nearly 2^63 must not keep the run from ending.
        greatest(least(sum(credits_granted), 9223372036854775807), -9223372036854775807)::bigint AS credits,
        sum(CASE status WHEN 'failed' THEN cardinality(user_ids) ELSE users_failed END) AS failed,
        bool_or(status = 'cancelled') AS cancelled
    FROM credit_refresh_batches
    WHERE run_id = ANY (%(run_ids)s)
    GROUP BY run_id
) AS t
WHERE r.id = t.run_id AND r.status = 'running'
    AND (
        SELECT b.id FROM credit_refresh_batches AS b WHERE b.run_id = r.id AND b.status = 'pending'
        ORDER BY b.id DESC LIMIT 1
    ) IS NULL
RETURNING r.*
),
{TELL_RUNS}
SELECT id AS run_id, kind, work, status, dry_run, users_selected, users_refreshed, users_held, users_skipped,
    users_failed, credits_granted, extract(epoch FROM finished_at - started_at)::float AS seconds,
    metadata ->> 'correlationId' AS correlation_id
FROM finished
"""  # noqa: S608 - a constant


def finish_runs(connection: psycopg.Connection[Any], run_ids: Iterable[UUID] | None = None) -> list[Finished]:
    """End the runs that have nothing pending any more, and sum up their totals.

    Args:
        connection: in autocommit, and after the caller's own commit; or in a transaction that has the run's row
            locked and has left it nothing pending (cancel.py).
        run_ids: which to look at; None: all that are running.
    """
    if run_ids is None:
        rows = connection.execute(_DRAINED_ANY).fetchall()
    else:
        rows = connection.execute(_DRAINED_THESE, {"run_ids": list(run_ids)}, prepare=True).fetchall()
    if not rows:
        return []
    with connection.cursor(row_factory=class_row(Finished)) as cursor:
        return cursor.execute(_FINISH, {"run_ids": [id_ for (id_,) in rows]}).fetchall()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come. Totals are those of its closed batches until it has finished."""

    run_id: UUID
    kind: str
    work: str
    source: str
    status: str
    dry_run: bool
    slot: datetime | None
    users_selected: int
    users_done: int
    users_refreshed: int
    users_held: int
    users_skipped: int
    users_failed: int
    credits_granted: int
    batches_total: int
    batches_done: int
    seconds: float
    error: str | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {**asdict(self), "run_id": str(self.run_id), "seconds": round(self.seconds, 3)}


# A query over the batches, because a counter that each batch updates would make the workers queue for its row.
_PROGRESS = """
SELECT
    r.id AS run_id, r.kind, r.work, r.source, r.status, r.dry_run, r.slot, r.users_selected,
    coalesce(sum(t.done), 0)::bigint AS users_done,
    coalesce(sum(b.users_refreshed), 0)::bigint AS users_refreshed,
    coalesce(sum(b.users_held), 0)::bigint AS users_held,
    coalesce(sum(b.users_skipped), 0)::bigint AS users_skipped,
    coalesce(sum(t.failed), 0)::bigint AS users_failed,
    greatest(least(coalesce(sum(b.credits_granted), 0), 9223372036854775807), -9223372036854775807)::bigint
        AS credits_granted,
    count(b.id)::integer AS batches_total,
    (count(b.id) FILTER (WHERE b.status <> 'pending'))::integer AS batches_done,
    extract(epoch FROM coalesce(r.finished_at, clock_timestamp()) - r.started_at)::float AS seconds,
    min(b.error) AS error
FROM credit_refresh_runs AS r
LEFT JOIN credit_refresh_batches AS b ON b.run_id = r.id
LEFT JOIN LATERAL (
    SELECT
        CASE WHEN b.status IN ('done', 'failed') THEN cardinality(b.user_ids) - b.users_deferred ELSE 0 END AS done,
        CASE b.status WHEN 'failed' THEN cardinality(b.user_ids) ELSE b.users_failed END AS failed
) AS t ON true
WHERE r.id = %(run_id)s
GROUP BY r.id
"""


def read_progress(connection: psycopg.Connection[Any], run_id: UUID) -> Progress:
    """How far a run has come.

    Raises:
        RefusedError: there is no such run.
    """
    with connection.cursor(row_factory=class_row(Progress)) as cursor:
        progress = cursor.execute(_PROGRESS, {"run_id": run_id}).fetchone()
    if progress is None:
        raise RefusedError(f"there is no run {run_id}")
    return progress
