"""Everything about one run: what was asked, where its batches stand, what failed, and what became of it since.

Several statements, each at its own instant: of a run that is being worked on, the numbers may be a batch apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID  # noqa: TC003 - the same

from refresh.errors import NotFoundError
from refresh.run_list import RunLine, exact, read_line

if TYPE_CHECKING:
    import psycopg

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the run was opened with, and the rest of its row."""

    as_of: datetime | None
    slot: datetime | None
    parent_run_id: UUID | None
    subject_run_id: UUID | None
    selection: dict[str, Any]
    force: bool
    keep_window: bool
    amount: int | None
    atomic: bool
    idempotency_key: str | None
    started_at: datetime | None
    finished_at: datetime | None
    cancelled_by: str | None
    cancel_reason: str | None
    error: str | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "asOf": _iso(self.as_of),
            "slot": _iso(self.slot),
            "parentRunId": _text(self.parent_run_id),
            "subjectRunId": _text(self.subject_run_id),
            "selection": self.selection,
            "force": self.force,
            "keepWindow": self.keep_window,
            "amount": self.amount,
            "atomic": self.atomic,
            "idempotencyKey": self.idempotency_key,
            "startedAt": _iso(self.started_at),
            "finishedAt": _iso(self.finished_at),
            "cancelledBy": self.cancelled_by,
            "cancelReason": self.cancel_reason,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Child:
    """A run that applies, takes back or retries this one."""

    run_id: UUID
    kind: str
    work: str
    status: str
    dry_run: bool
    created_at: datetime
    requested_by: str

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "runId": str(self.run_id),
            "kind": self.kind,
            "work": self.work,
            "status": self.status,
            "dryRun": self.dry_run,
            "createdAt": self.created_at.isoformat(),
            "requestedBy": self.requested_by,
        }


@dataclass(frozen=True, slots=True)
class Batches:
    """The run's batches of one status. `attempts` is the most that one of them took."""

    status: str
    batches: int
    users: int
    users_deferred: int
    attempts: int
    credits: int

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of them."""
        return {
            "status": self.status,
            "batches": self.batches,
            "users": self.users,
            "usersDeferred": self.users_deferred,
            "attempts": self.attempts,
            "credits": self.credits,
        }


@dataclass(frozen=True, slots=True)
class OneBatch:
    """A batch that did not get done: the oldest that is pending, or one that was given up."""

    batch_id: int
    seq: int
    users: int
    attempts: int
    published_at: datetime | None
    next_attempt_at: datetime | None
    error: str | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "batchId": self.batch_id,
            "seq": self.seq,
            "users": self.users,
            "attempts": self.attempts,
            "publishedAt": _iso(self.published_at),
            "nextAttemptAt": _iso(self.next_attempt_at),
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class FailedUser:
    """A user whose refresh failed. `external_id` is None when the host has deleted them since."""

    user_id: int
    external_id: str | None
    error: str | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of them."""
        return {"userId": self.external_id, "id": self.user_id, "error": self.error}


@dataclass(frozen=True, slots=True)
class Applied:
    """What the dry run had planned, and what its execution made of it."""

    users_planned: int
    credits_planned: int
    users_applied: int
    credits_applied: int
    users_drifted: int

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "usersPlanned": self.users_planned,
            "creditsPlanned": self.credits_planned,
            "usersApplied": self.users_applied,
            "creditsApplied": self.credits_applied,
            "usersDrifted": self.users_drifted,
        }


@dataclass(frozen=True, slots=True)
class TakenBack:
    """What a rollback took, what was spent already and so could not be taken, and whom it left alone.

    `users_refreshed_since` is 0 for a dry run, which writes no row for them: they are among its skipped users.
    """

    users_reversed: int
    credits_taken_back: int
    shortfall: int
    users_refreshed_since: int

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "usersReversed": self.users_reversed,
            "creditsTakenBack": self.credits_taken_back,
            "shortfall": self.shortfall,
            "usersRefreshedSince": self.users_refreshed_since,
        }


@dataclass(frozen=True, slots=True)
class RunDetail:
    """One run with all that belongs to it. `applied` and `taken_back` are there for runs that do that work."""

    line: RunLine
    asked: Asked
    children: list[Child]
    batches: list[Batches]
    oldest_pending: OneBatch | None
    failed_batches: list[OneBatch]
    failed_users: list[FailedUser]
    applied: Applied | None
    taken_back: TakenBack | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            **self.line.facts(),
            **self.asked.facts(),
            "children": [child.facts() for child in self.children],
            "batches": [group.facts() for group in self.batches],
            "oldestPending": self.oldest_pending.facts() if self.oldest_pending else None,
            "failedBatches": [batch.facts() for batch in self.failed_batches],
            "failedUsers": [user.facts() for user in self.failed_users],
            "apply": self.applied.facts() if self.applied else None,
            "rollback": self._rollback(),
        }

    def _rollback(self) -> dict[str, object] | None:
        if self.taken_back is None:
            return None
        return {**self.taken_back.facts(), **({"usersRefreshedSince": None} if self.line.dry_run else {})}


_ASKED = """
SELECT
    as_of, slot, parent_run_id, subject_run_id, selection, force, keep_window, amount, atomic, idempotency_key,
    started_at, finished_at,
    metadata ->> 'cancelledBy' AS cancelled_by, metadata ->> 'cancelReason' AS cancel_reason, error
FROM credit_refresh_runs
WHERE id = %(run_id)s
"""
# A retry of an apply is a child of the apply and of the dry run. Runs are few: an hour has one.
_CHILDREN = """
SELECT id AS run_id, kind, work, status, dry_run, created_at, requested_by
FROM credit_refresh_runs
WHERE parent_run_id = %(run_id)s OR subject_run_id = %(run_id)s
ORDER BY created_at, id
"""
_BATCHES = """
SELECT
    status, count(*) AS batches, sum(cardinality(user_ids)) AS users, sum(users_deferred) AS users_deferred,
    max(attempts) AS attempts, sum(credits_granted) AS credits
FROM credit_refresh_batches
WHERE run_id = %(run_id)s
GROUP BY status
ORDER BY status
"""
_ONE_BATCH = """
SELECT id AS batch_id, seq, cardinality(user_ids) AS users, attempts, published_at, next_attempt_at, error
FROM credit_refresh_batches
WHERE run_id = %(run_id)s AND status = '{status}'
ORDER BY id
LIMIT %(limit)s
"""
_PENDING = _ONE_BATCH.format(status="pending")
_FAILED = _ONE_BATCH.format(status="failed")

# Each with the predicate of the index by run, which holds everything but grants.
_FAILED_USERS = """
SELECT h.user_id, u.external_id, h.error
FROM credit_refresh_histories AS h LEFT JOIN users AS u ON u.id = h.user_id
WHERE h.run_id = %(run_id)s AND h.status = 'failed' AND h.status <> 'refreshed'
ORDER BY h.user_id
LIMIT %(limit)s
"""
_APPLIED = """
SELECT
    p.users AS users_planned, p.credits AS credits_planned, a.users AS users_applied, a.credits AS credits_applied,
    d.users AS users_drifted
FROM (
    SELECT coalesce(sum(users_refreshed), 0)::bigint AS users, coalesce(sum(credits_granted), 0) AS credits
    FROM credit_refresh_batches WHERE run_id = %(subject_run_id)s
) AS p
CROSS JOIN (
    SELECT coalesce(sum(users_refreshed), 0)::bigint AS users, coalesce(sum(credits_granted), 0) AS credits
    FROM credit_refresh_batches WHERE run_id = %(run_id)s
) AS a
CROSS JOIN (
    SELECT count(*) AS users FROM credit_refresh_histories
    WHERE run_id = %(run_id)s AND status = 'skipped' AND status <> 'refreshed' AND reason = 'drifted'
) AS d
"""
# A dry rollback plans what a live one reverses.
_TAKEN_BACK = """
SELECT
    count(*) FILTER (WHERE status <> 'skipped') AS users_reversed,
    coalesce(-sum(credits_added) FILTER (WHERE status <> 'skipped'), 0) AS credits_taken_back,
    coalesce(sum(shortfall) FILTER (WHERE status <> 'skipped'), 0) AS shortfall,
    count(*) FILTER (WHERE status = 'skipped' AND reason = 'refreshed_since') AS users_refreshed_since
FROM credit_refresh_histories
WHERE run_id = %(run_id)s AND status IN ('reversed', 'planned', 'skipped') AND status <> 'refreshed'
"""


def read_run(connection: psycopg.Connection[Any], run_id: UUID, *, failures: int) -> RunDetail:
    """Everything about one run.

    Args:
        connection: anything.
        run_id: whose.
        failures: how many failed users, and failed batches, at most.

    Raises:
        NotFoundError: there is no such run.
    """
    line = read_line(connection, run_id)
    asked = _fetch(connection, Asked, _ASKED, run_id=run_id)
    if not asked:
        raise NotFoundError(f"there is no run {run_id}")
    applies, takes_back = line.work == "apply", line.work == "rollback"
    applied = (
        _fetch(connection, Applied, _APPLIED, run_id=run_id, subject_run_id=asked[0].subject_run_id) if applies else []
    )
    taken_back = _fetch(connection, TakenBack, _TAKEN_BACK, run_id=run_id) if takes_back else []
    pending = _fetch(connection, OneBatch, _PENDING, run_id=run_id, limit=1)
    return RunDetail(
        line=line,
        asked=asked[0],
        children=_fetch(connection, Child, _CHILDREN, run_id=run_id),
        batches=_fetch(connection, Batches, _BATCHES, run_id=run_id),
        oldest_pending=pending[0] if pending else None,
        failed_batches=_fetch(connection, OneBatch, _FAILED, run_id=run_id, limit=failures),
        failed_users=_fetch(connection, FailedUser, _FAILED_USERS, run_id=run_id, limit=failures),
        applied=applied[0] if applied else None,
        taken_back=taken_back[0] if taken_back else None,
    )


def _fetch(connection: psycopg.Connection[Any], made: type[Row], statement: str, **parameters: object) -> list[Row]:
    with connection.cursor(row_factory=exact(made)) as cursor:
        return cursor.execute(statement, parameters).fetchall()


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None


def _text(value: UUID | None) -> str | None:
    return str(value) if value is not None else None
