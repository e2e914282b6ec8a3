"""Apply: execute what a dry run planned, exactly that, for nobody else, and once.

    open: the dry run's planned rows, of users who were in its batches → batches      (the door of runs.py)
    per batch, one transaction: lock → on rows read after the locks were taken: decide anew, compare with the planned
    row, grant → close

A planned row says who, for which window, by which verdict, plan and mode, up to which target; its digest says that it
still does. Whoever would not get exactly that any more has drifted and is left alone. What they spent since is no
drift: the credits are computed anew, under the target that was planned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - the same

from psycopg.rows import class_row

from db import one, transaction
from refresh import runs
from refresh.batch import COUNT, DECIDE, DIGEST, GRANT, TAKE
from refresh.closing import (
    CLOSE,
    DEFER,
    DEFERRED_BACKOFF_SECONDS,
    FEW_USERS,
    LOCK_ALL,
    LOCK_SKIPPING,
    LOCK_WAITING,
    Outcome,
)
from refresh.errors import NotFoundError, RefusedError
from refresh.partitions import GONE_AS_OF, gone_text
from refresh.selection import Chosen
from refresh.webhook_events import TELL_USERS

if TYPE_CHECKING:
    import psycopg

    from refresh.work import Pending

TAMPERED = "the planned row was changed after the dry run"
"""The error of users whose planned row does not match its digest, or is there no more."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """A run to be applied.

    Attributes:
        work: what its batches did.
        looks_ahead: it was decided as of an instant that has not come.
        users_planned: how many planned rows it wrote; with their credits.
        rows_left: how many there are now.
        gone: it, or the instant it decided as of, is older than the books.
        age_seconds: since it was opened.
        applied_by: the run that applied it, None if none did.
    """

    run_id: UUID
    work: str
    dry_run: bool
    status: str
    created_at: datetime
    as_of: datetime | None
    looks_ahead: bool
    force: bool
    keep_window: bool
    amount: int | None
    atomic: bool
    max_users_per_second: int | None
    users_planned: int
    credits_planned: int
    rows_left: int
    age_seconds: float
    applied_by: UUID | None
    applied_status: str | None
    gone: bool


_PLANNED = "h.status = 'planned' AND h.status <> 'refreshed'"  # with the predicate of the index over runs

_DRY_RUN = f"""
SELECT
    r.id AS run_id, r.work, r.dry_run, r.status, r.created_at, r.as_of, coalesce(r.as_of > now(), false) AS looks_ahead,
    r.force, r.keep_window, r.amount, r.atomic, r.max_users_per_second, r.users_refreshed AS users_planned,
    r.credits_granted AS credits_planned,
    (SELECT count(*) FROM credit_refresh_histories AS h WHERE h.run_id = r.id AND {_PLANNED}) AS rows_left,
    extract(epoch FROM now() - r.created_at)::float AS age_seconds,
    a.id AS applied_by, a.status AS applied_status, {GONE_AS_OF}
FROM credit_refresh_runs AS r
LEFT JOIN credit_refresh_runs AS a ON a.parent_run_id = r.id AND a.kind = 'apply' AND NOT a.dry_run
WHERE r.id = %(run_id)s
"""  # noqa: S608 - texts of this module alone


def read_dry_run(connection: psycopg.Connection[Any], run_id: UUID) -> DryRun:
    """The run that is to be applied, whether or not it can be.

    Raises:
        RefusedError: there is no such run.
    """
    with connection.cursor(row_factory=class_row(DryRun)) as cursor:
        found = cursor.execute(_DRY_RUN, {"run_id": run_id}).fetchone()
    if found is None:
        raise NotFoundError(f"there is no run {run_id}")
    return found


def require_appliable(dry_run: DryRun) -> None:
    """Check that a run can be applied as it is.

    Raises:
        RefusedError: it is no dry run, or not one of a refresh; it has not ended, was cancelled or failed; it was
            applied already; it planned nothing, or for an instant that has not come; or not all of its rows are left.
    """
    reason = _refusal(dry_run)
    if reason is not None:
        raise RefusedError(reason)


def _refusal(dry_run: DryRun) -> str | None:  # noqa: C901, PLR0911 - one for each
    name = f"run {dry_run.run_id}"
    if not dry_run.dry_run:
        return f"{name} is no dry run: only what a dry run planned can be applied"
    if dry_run.work != "refresh":
        return f"{name} is the dry run of a {dry_run.work}: only dry runs of refreshes can be applied"
    if dry_run.applied_by is not None:
        return f"{name} was applied already, by run {dry_run.applied_by} ({dry_run.applied_status})"
    if dry_run.status == "running":
        return f"{name} is still running: apply it when it has ended"
    if dry_run.status in {"cancelled", "failed"}:
        return f"{name} {'was cancelled' if dry_run.status == 'cancelled' else 'failed'}: make a new dry run"
    if dry_run.users_planned == 0:
        return f"{name} planned nothing"
    if dry_run.looks_ahead and dry_run.as_of is not None:
        return f"{name} was decided as of {dry_run.as_of.isoformat()}, which has not come: apply it after that"
    if dry_run.gone:
        return gone_text(dry_run.run_id)
    if not dry_run.rows_left:
        return f"the rows that {name} planned are gone, as retention leaves them in time: make a new dry run"
    if dry_run.rows_left != dry_run.users_planned:
        return _rows_differ(dry_run, dry_run.rows_left)
    return None


def _rows_differ(dry_run: DryRun, rows: int) -> str:
    return (
        f"{dry_run.users_planned:,} users were planned by run {dry_run.run_id} and rows of {rows:,} of them are left: "
        "make a new dry run"
    )


# Users whom the dry run refreshes all or none are so again. Nobody is touched who was not in the dry run.
_SELECTED = f"""
selected AS (
    SELECT p.user_id AS id, min(d.whole) AS whole
    FROM (
        SELECT DISTINCT h.user_id FROM credit_refresh_histories AS h WHERE h.run_id = %(subject)s AND {_PLANNED}
    ) AS p
    JOIN (
        SELECT unnest(user_ids) AS user_id, CASE WHEN atomic THEN seq::text END AS whole
        FROM credit_refresh_batches WHERE run_id = %(subject)s
    ) AS d ON d.user_id = p.user_id
    GROUP BY p.user_id
)
"""  # noqa: S608 - texts of this module alone


def open_apply(
    connection: psycopg.Connection[Any], run_id: UUID, request: runs.Request
) -> runs.Opened | runs.NotOpened:
    """Open the run that applies a dry run.

    The caller's transaction should wait up to `OPENING_LOCK_TIMEOUT` for locks, and publish after its commit.

    Args:
        connection: in a transaction.
        run_id: the dry run.
        request: who asks, why and by which key, and a pace, if another one; what the dry run was asked for is taken
            from it.

    Raises:
        RefusedError: there is no such run, or `require_appliable()` says why it cannot be applied; its planned rows
            are not those of its users; every run is dry; or the idempotency key belongs to another request.
    """
    runs.lock_door(connection)
    dry_run = read_dry_run(connection, run_id)
    request = replace(
        request,
        as_of=dry_run.as_of,
        force=dry_run.force,
        keep_window=dry_run.keep_window,
        amount=dry_run.amount,
        atomic=dry_run.atomic,
        max_users_per_second=request.max_users_per_second or dry_run.max_users_per_second,
        kind="apply",
        work="apply",
        parent_run_id=run_id,
        subject_run_id=run_id,
    )
    chosen = Chosen(_SELECTED, {"subject": run_id}, {"dryRun": str(run_id)})
    if existing := runs.find_opened(connection, request, chosen.facts):
        return existing
    require_appliable(dry_run)
    enabled, all_dry = one(connection.execute("SELECT enabled, dry_run FROM settings"))
    if not enabled:
        return runs.NotOpened("paused")
    if all_dry:
        raise RefusedError("every run is a dry one at present (settings.dry_run): nothing can be applied")
    opened = runs.cut(connection, request, chosen)
    users = opened.users_selected if opened else 0
    if opened is None or users != dry_run.users_planned:
        raise RefusedError(_rows_differ(dry_run, users))
    return opened


# The first statement locks. Its snapshot is older than its locks, so the second one reads and decides.
_LOCK = """
mine AS (SELECT array(SELECT id FROM locked) AS ids)
SELECT mine.ids FROM batch CROSS JOIN mine
"""

# Several rows of one user are the work of somebody else. Whom another run has refreshed since, with a window of its
# own, as a forced one does, has had their credits.
_COMPARE = """
anew AS MATERIALIZED ({decide}),
planned AS MATERIALIZED (
    SELECT DISTINCT ON (h.user_id)
        h.user_id, h.window_start, h.window_end, h.plan_code, h.grant_mode, h.target, r.created_at AS since,
        count(*) OVER (PARTITION BY h.user_id) = 1 AND h.digest = {digest} AS intact
    FROM batch AS b
    JOIN credit_refresh_runs AS r ON r.id = b.subject_run_id
    JOIN credit_refresh_histories AS h ON h.run_id = b.subject_run_id
    WHERE h.user_id = ANY (%(locked)s::bigint[]) AND {planned}
    ORDER BY h.user_id
),
decided AS MATERIALIZED (
    SELECT
        a.user_id, a.plan_code, a.credit_balance, a.last_credit_refresh, a.next_refresh_at, a.refresh_shortfall,
        a.grant_mode, a.window_start, a.window_end, a.first_missed_at, a.windows_passed, a.target, a.credits_added,
        p.window_start AS planned_start, p.window_end AS planned_end, p.plan_code AS planned_plan,
        p.grant_mode AS planned_mode, p.target AS planned_target,
        CASE WHEN p.intact IS NOT TRUE THEN 'tampered' WHEN cardinality(c.drifted) > 0 THEN 'drifted' ELSE 'due' END
            AS verdict,
        -- The hold of somebody who was not held is drift, and the next scan's to note.
        false AS newly_held,
        c.drifted, a.verdict AS verdict_now
    FROM anew AS a
    LEFT JOIN planned AS p ON p.user_id = a.user_id
    CROSS JOIN LATERAL (
        SELECT array_remove(ARRAY[
            -- Only who is due has a window.
            CASE
                WHEN a.verdict <> 'due' THEN 'verdict'
                WHEN (a.window_start, a.window_end) IS DISTINCT FROM (p.window_start, p.window_end) THEN 'window'
            END,
            CASE WHEN a.plan_code IS DISTINCT FROM p.plan_code THEN 'plan' END,
            CASE WHEN a.grant_mode IS DISTINCT FROM p.grant_mode THEN 'mode' END,
            CASE WHEN a.target IS DISTINCT FROM p.target THEN 'target' END,
            CASE WHEN p.window_end <= now() THEN 'ended' END,
            CASE WHEN EXISTS (
                SELECT FROM credit_refresh_histories AS g
                WHERE g.user_id = a.user_id AND g.window_start > p.window_start AND g.created_at > p.since
                    AND g.status = 'refreshed' AND g.reversed_by_run_id IS NULL
            ) THEN 'refreshed' END
        ], NULL) AS drifted
        OFFSET 0 -- or it would be looked up wherever it is named
    ) AS c
),
"""

_LEAVE = """
left_alone AS MATERIALIZED (
    SELECT
        d.*, CASE d.verdict WHEN 'tampered' THEN 'failed' ELSE 'skipped' END AS status,
        -- Refused by the key.
        CASE d.verdict WHEN 'due' THEN ARRAY['refreshed'] ELSE d.drifted END AS causes
    FROM decided AS d
    WHERE NOT EXISTS (SELECT FROM history AS h WHERE h.user_id = d.user_id)
),
noted AS (
    INSERT INTO credit_refresh_histories (
        run_id, user_id, status, window_start, window_end, plan_code, grant_mode, target, old_balance, credits_added,
        new_balance, previous_next_refresh_at, previous_last_refresh, reason, error
    )
    SELECT
        b.run_id, l.user_id, l.status, coalesce(l.planned_start, b.as_of), l.planned_end, l.planned_plan,
        l.planned_mode, l.planned_target, l.credit_balance, 0, l.credit_balance, l.next_refresh_at,
        l.last_credit_refresh, CASE l.status WHEN 'skipped' THEN 'drifted' ELSE b.reason END,
        CASE l.status WHEN 'failed' THEN %(tampered)s END
    FROM left_alone AS l CROSS JOIN batch AS b
),
noted_too AS (
    INSERT INTO credit_audit_logs (
        actor, action, user_id, run_id, balance_before, balance_after, credits, correlation_id, detail
    )
    SELECT
        b.requested_by, CASE l.status WHEN 'failed' THEN 'refresh_failed' ELSE 'skipped' END, l.user_id, b.run_id,
        l.credit_balance, l.credit_balance, 0, b.correlation_id,
        CASE l.status
            WHEN 'failed' THEN b.detail
            ELSE b.detail || jsonb_build_object('drifted', l.causes, 'verdict', l.verdict_now)
        END
    FROM left_alone AS l CROSS JOIN batch AS b
),
"""


def _take(lock: str) -> str:
    return TAKE.format(work="apply", dry_run="false", lock=lock)


_LOCK_MANY, _LOCK_ONE, _LOCK_ATOMIC = (_take(lock) + _LOCK for lock in (LOCK_SKIPPING, LOCK_WAITING, LOCK_ALL))


def _applying(*, tell: str = "") -> str:
    return (
        _take("AND u.id = ANY (%(locked)s::bigint[])")
        + _COMPARE.format(decide=DECIDE, digest=DIGEST.format(row="h"), planned=_PLANNED)
        + GRANT
        + tell
        + _LEAVE
        + DEFER
        + COUNT.format(failed="tampered")
        + CLOSE
    )


_APPLY, _APPLY_TELLING = _applying(), _applying(tell=TELL_USERS)


def apply_batch(connection: psycopg.Connection[Any], pending: Pending) -> Outcome | None:
    """Grant a batch's users what was planned for them, in a transaction that is committed when this returns.

    Args:
        connection: in autocommit.
        pending: a batch of a run whose work is 'apply'.

    Returns:
        What became of the users; None when somebody else has the batch or had it, or the service is paused.

    Raises:
        psycopg.Error: nothing was changed.
    """
    lock = _LOCK_ATOMIC if pending.atomic else _LOCK_ONE if pending.lone else _LOCK_MANY
    with transaction(connection):
        row = connection.execute(lock, {"batch_id": pending.id}, prepare=True).fetchone()
        if row is None:
            return None
        parameters = {
            "batch_id": pending.id,
            "locked": row[0],
            "tampered": TAMPERED,
            "backoff_seconds": DEFERRED_BACKOFF_SECONDS,
            "few": FEW_USERS,
        }
        with connection.cursor(row_factory=class_row(Outcome)) as cursor:
            statement = _APPLY_TELLING if pending.tells else _APPLY
            return cursor.execute(statement, parameters, prepare=True).fetchone()


_COUNT_TAMPERED = """
SELECT count(*) FROM credit_refresh_histories
WHERE run_id = %(run_id)s AND status = 'failed' AND status <> 'refreshed' AND error = %(tampered)s
"""


def count_tampered(connection: psycopg.Connection[Any], run_id: UUID) -> int:
    """Of how many users a run that applies has found that the planned row was changed."""
    (users,) = one(connection.execute(_COUNT_TAMPERED, {"run_id": run_id, "tampered": TAMPERED}))
    return int(users)
