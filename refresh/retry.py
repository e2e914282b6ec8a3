"""Retrying: take up the users of a run who failed, as a new run of the same work.

Those are the users with a failed row, the users of batches that were given up, and, where the run was cancelled, those
whose batch was never begun. The work, what it is about and what was asked for are the first run's; whether a user is
still to be refreshed is decided anew by each batch, so that a run may be retried as often as somebody likes: whoever
was refreshed since is not due, and a forced grant keeps its instant, for which the unique key admits one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID  # noqa: TC003 - the same

from psycopg.rows import class_row

from db import one
from refresh import runs, selection
from refresh.errors import NotFoundError, RefusedError
from refresh.partitions import GONE, GONE_AS_OF, gone_text
from refresh.selection import Chosen

if TYPE_CHECKING:
    import psycopg


@dataclass(frozen=True, slots=True)
class Retriable:
    """A run that has users to retry.

    Attributes:
        work: what its batches did.
        users: how many a retry takes up.
        users_elsewhere: how many failed and are in an unfinished batch of another run, which decides over them.
        selection: what the run was opened with; regrids and rollbacks read theirs from it.
        gone: it, or the instant it decided as of, is older than the books.
        subject_gone: so is what it took back, or no row is left of the plan that it applied.
    """

    run_id: UUID
    kind: str
    work: Literal["refresh", "apply", "rollback", "regrid"]
    status: str
    dry_run: bool
    subject_run_id: UUID | None
    selection: dict[str, Any]
    force: bool
    keep_window: bool
    amount: int | None
    as_of: datetime | None
    window_end: datetime | None
    atomic: bool
    max_users_per_second: int | None
    enabled: bool
    all_dry: bool
    gone: bool
    subject_gone: bool
    users: int = 0
    users_elsewhere: int = 0


_RUN = f"""
SELECT
    r.id AS run_id, r.kind, r.work, r.status, r.dry_run, r.subject_run_id, r.selection, r.force, r.keep_window,
    r.amount, r.as_of, r.window_end, r.atomic, r.max_users_per_second, s.enabled, s.dry_run AS all_dry, {GONE_AS_OF},
    CASE r.work
        WHEN 'rollback' THEN (SELECT {GONE} FROM credit_refresh_runs AS r WHERE r.id = subject_id)
        WHEN 'apply' THEN NOT EXISTS (
            SELECT FROM credit_refresh_histories AS h
            WHERE h.run_id = subject_id AND h.status = 'planned' AND h.status <> 'refreshed'
        )
        ELSE false
    END AS subject_gone
FROM credit_refresh_runs AS r CROSS JOIN settings AS s CROSS JOIN LATERAL (SELECT r.subject_run_id AS subject_id) AS a
WHERE r.id = %(run_id)s
"""  # noqa: S608 - texts of this package alone

# Users who were all or none stay so. Batches are cancelled with their run alone. Whom the host has deleted nobody can
# refresh.
_FAILED = """
failed AS MATERIALIZED (
    SELECT x.user_id, min(x.whole) AS whole
    FROM (
        SELECT unnest(b.user_ids) AS user_id, CASE WHEN b.atomic THEN b.id::text END AS whole
        FROM credit_refresh_batches AS b
        WHERE b.run_id = %(parent_run_id)s AND b.status IN ('failed', 'cancelled')
        UNION ALL
        SELECT h.user_id, NULL
        FROM credit_refresh_histories AS h
        WHERE h.run_id = %(parent_run_id)s AND h.status = 'failed' AND h.status <> 'refreshed'
    ) AS x
    WHERE EXISTS (SELECT FROM users AS u WHERE u.id = x.user_id)
    GROUP BY x.user_id
),
taken AS MATERIALIZED ({taken}),
-- In an unfinished batch of another run, or all or none together with somebody who is.
sorted AS MATERIALIZED (
    SELECT f.user_id, f.whole, CASE
        WHEN f.whole IS NULL THEN t.user_id IS NOT NULL
        ELSE bool_or(t.user_id IS NOT NULL) OVER (PARTITION BY f.whole)
    END AS elsewhere
    FROM failed AS f LEFT JOIN (SELECT DISTINCT user_id FROM taken) AS t ON t.user_id = f.user_id
)
"""
_SELECTED = ", selected AS (SELECT user_id AS id, whole FROM sorted WHERE NOT elsewhere)"
_COUNT = """
SELECT count(*) FILTER (WHERE NOT elsewhere) AS users, count(*) FILTER (WHERE elsewhere) AS users_elsewhere
FROM sorted
"""


def read_retriable(connection: psycopg.Connection[Any], run_id: UUID) -> Retriable:
    """A run, and how many of its users a retry would take up.

    Raises:
        RefusedError: there is no such run, it has not ended, it was a dry one, nobody failed, everybody who failed is
            in an unfinished batch of another run; or the service is paused, or makes dry runs alone.
    """
    return _counted(connection, _read(connection, run_id))


def _read(connection: psycopg.Connection[Any], run_id: UUID) -> Retriable:
    with connection.cursor(row_factory=class_row(Retriable)) as cursor:
        run = cursor.execute(_RUN, {"run_id": run_id}).fetchone()
    if run is None:
        raise NotFoundError(f"there is no run {run_id}")
    return run


def _counted(connection: psycopg.Connection[Any], run: Retriable) -> Retriable:
    if reason := _refusal(run):
        raise RefusedError(reason)
    count = f"WITH {_failed(run)} {_COUNT}"
    users, users_elsewhere = one(connection.execute(count, {"parent_run_id": run.run_id}))
    if users_elsewhere and not users:
        raise RefusedError(f"all users of run {run.run_id} who failed are in unfinished batches of other runs")
    if not users:
        raise RefusedError(f"nobody failed in run {run.run_id}: there is nothing to retry")
    return replace(run, users=users, users_elsewhere=users_elsewhere)


def _refusal(run: Retriable) -> str | None:  # noqa: PLR0911 - one for each
    if run.dry_run:
        return f"run {run.run_id} is a dry run: make a new one"
    if run.status == "running":
        return f"run {run.run_id} is still running: retry it when it has ended (`credits runs watch` tells)"
    if run.gone:
        return gone_text(run.run_id)
    if run.subject_gone:
        return f"retention has dropped what run {run.run_id} was about: it cannot be retried any more"
    if not run.enabled:
        return f"nothing was opened: {runs.NotOpened('paused').text}"
    if run.all_dry:
        return "every run is a dry one at present (settings.dry_run): nothing can be retried"
    return None


def _failed(run: Retriable) -> str:
    # A regrid grants nothing, and does no harm beside a run that does.
    return _FAILED.format(taken=selection.NOBODY if run.work == "regrid" else selection.TAKEN)


def open_retry(connection: psycopg.Connection[Any], run_id: UUID, request: runs.Request) -> runs.Opened:
    """Open the run that takes up whom another one has failed.

    The caller's transaction should wait up to `runs.OPENING_LOCK_TIMEOUT` for locks, and publish after its commit.

    Args:
        connection: in a transaction.
        run_id: the run that failed them, of any kind, a retry among them.
        request: who asks, why and by which key, and a pace, if another one; what the run was asked for is taken from
            it.

    Raises:
        RefusedError: as `read_retriable()`; or the idempotency key belongs to another request.
    """
    runs.lock_door(connection)
    run = _read(connection, run_id)
    request = replace(
        request,
        # A refresh decides at each batch's now(), where the first one's instant was no part of its grants.
        as_of=run.as_of if run.force or run.work != "refresh" else None,
        window_end=run.window_end,
        force=run.force,
        keep_window=run.keep_window,
        amount=run.amount,
        atomic=run.atomic,
        max_users_per_second=request.max_users_per_second or run.max_users_per_second,
        kind="retry",
        work=run.work,
        parent_run_id=run_id,
        subject_run_id=run.subject_run_id,
    )
    if existing := runs.find_opened(connection, request, run.selection):
        return existing
    _counted(connection, run)
    opened = runs.cut(connection, request, Chosen(_failed(run) + _SELECTED, {}, run.selection))
    if opened is None:  # deleted by the host since they were counted
        raise RefusedError(f"nobody failed in run {run_id}: there is nothing to retry")
    return opened
