"""Cancelling: batches that a worker has are finished, the others are never begun, and the run has ended.

What was granted stays granted (`rollback` takes it back), and whoever was not refreshed is due as before. A run that a
rollback is to take back has to have ended: the rollback cancels it here, in its own transaction.

Locks. The run's row first, so that of two who cancel, or of one who cancels and a worker who ends the run, one waits
for the other; then its pending batches, for as long as their workers take, which the database bounds
(`statement_timeout`). Nobody who has a batch waits for anything of ours: workers and upkeep take batches SKIP LOCKED, a
new batch's foreign key wants no more than KEY SHARE on the run, and a run is ended by a statement that holds no batch.
So there is no circle to be caught in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from db import one
from refresh import totals
from refresh.errors import NotFoundError, RefusedError

if TYPE_CHECKING:
    from uuid import UUID

    import psycopg


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A run that was running, and is not any more.

    Attributes:
        ended: its totals; with the status `cancelled`, or another where workers had taken the last batches already, and
            so the run has ended by itself.
        work: what its batches did.
        batches: how many were cancelled; their users were left as they are.
        users: how many those are.
    """

    ended: totals.Finished
    work: str
    batches: int
    users: int

    @property
    def status(self) -> str:
        """How the run ended."""
        return self.ended.status

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "runId": str(self.ended.run_id),
            "kind": self.ended.kind,
            "work": self.work,
            "dryRun": self.ended.dry_run,
            "status": self.ended.status,
            "batchesCancelled": self.batches,
            "usersCancelled": self.users,
            "usersSelected": self.ended.users_selected,
            "usersRefreshed": self.ended.users_refreshed,
            "usersHeld": self.ended.users_held,
            "usersSkipped": self.ended.users_skipped,
            "usersFailed": self.ended.users_failed,
            "creditsGranted": self.ended.credits_granted,
        }


_RUN = "SELECT status, work FROM credit_refresh_runs WHERE id = %(run_id)s FOR NO KEY UPDATE"

# Without SKIP LOCKED: a batch that a worker has is waited for, and is no longer pending when its worker commits.
_CANCEL = """
WITH stopped AS (
    UPDATE credit_refresh_batches AS b SET
        status = 'cancelled', finished_at = clock_timestamp(), next_attempt_at = NULL
    WHERE b.run_id = %(run_id)s AND b.status = 'pending'
    RETURNING cardinality(b.user_ids) AS users
)
SELECT count(*), coalesce(sum(users), 0)::bigint FROM stopped
"""
# A worker that was waited for may have put users off to a new batch, which the statement above could not see.
_LEFT = "SELECT EXISTS (SELECT FROM credit_refresh_batches WHERE run_id = %(run_id)s AND status = 'pending')"

_NOTE = """
WITH noted AS (
    UPDATE credit_refresh_runs
    SET metadata = metadata || jsonb_build_object('cancelledBy', %(actor)s::text, 'cancelReason', %(reason)s::text)
    WHERE id = %(run_id)s
)
INSERT INTO credit_audit_logs (actor, action, run_id, credits, detail)
VALUES (%(actor)s, 'run_cancelled', %(run_id)s, 0, %(detail)s)
"""


def cancel_run(connection: psycopg.Connection[Any], run_id: UUID, *, actor: str, reason: str) -> Cancelled:
    """Let the batches that workers have finish, begin no others, and end the run.

    Args:
        connection: in a transaction that waits up to `runs.OPENING_LOCK_TIMEOUT` for locks.
        run_id: of any kind; a dry run, too. The service may be paused.
        actor: who asks.
        reason: why, for the run and the audit log.

    Returns:
        How it ended, and how many users were left.

    Raises:
        RefusedError: there is no such run, or it had ended already.
    """
    row = connection.execute(_RUN, {"run_id": run_id}).fetchone()
    if row is None:
        raise NotFoundError(f"there is no run {run_id}")
    status, work = row
    if status != "running":
        raise RefusedError(f"run {run_id} had ended already: {status}")
    batches = users = 0
    left = True
    while left:
        stopped = one(connection.execute(_CANCEL, {"run_id": run_id}))
        batches, users = batches + stopped[0], users + stopped[1]
        (left,) = one(connection.execute(_LEFT, {"run_id": run_id}))
    (ended,) = totals.finish_runs(connection, [run_id])
    if ended.status == "cancelled":
        detail = Jsonb({"reason": reason, "batchesCancelled": batches, "usersCancelled": users})
        connection.execute(_NOTE, {"run_id": run_id, "actor": actor, "reason": reason, "detail": detail})
    return Cancelled(ended, work, batches, users)
