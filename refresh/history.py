"""A user's own history: what was decided for them, the newest first. What dry runs planned is nobody's history."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - the same

from psycopg.rows import class_row

from refresh.errors import NotFoundError

if TYPE_CHECKING:
    import psycopg


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision over a user. Credits and balances are exact; `credits_added` of a reversal is negative.

    Attributes:
        status: refreshed, held, skipped, failed, or reversed: the row that takes a grant back.
        source: run, insert, function or trigger; with it run_id, of a run alone.
        first_missed_at: the first of the windows that this one stands for; with it windows_passed.
        target: the amount aimed at.
        shortfall: of a reversal, what had been spent and was not taken; of a grant, by how much it lowered the target.
        reversed_by_run_id: the rollback that took this grant back.
    """

    id: int
    created_at: datetime
    status: str
    source: str
    run_id: UUID | None
    window_start: datetime
    window_end: datetime | None
    first_missed_at: datetime | None
    windows_passed: int
    plan_code: str | None
    grant_mode: str | None
    target: int | None
    old_balance: int
    credits_added: int
    new_balance: int
    shortfall: int
    reason: str | None
    error: str | None
    reversed_by_run_id: UUID | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "id": self.id,
            "createdAt": self.created_at.isoformat(),
            "status": self.status,
            "source": self.source,
            "runId": str(self.run_id) if self.run_id else None,
            "windowStart": self.window_start.isoformat(),
            "windowEnd": _iso(self.window_end),
            "firstMissedAt": _iso(self.first_missed_at),
            "windowsPassed": self.windows_passed,
            "planCode": self.plan_code,
            "grantMode": self.grant_mode,
            "target": self.target,
            "oldBalance": self.old_balance,
            "creditsAdded": self.credits_added,
            "newBalance": self.new_balance,
            "shortfall": self.shortfall,
            "reason": self.reason,
            "error": self.error,
            "reversedByRunId": str(self.reversed_by_run_id) if self.reversed_by_run_id else None,
        }


# Each branch has the predicate of an index, the three of them have every row but plans, and none has a row of another.
# A user's rows are few, a dozen a year: they are sorted by time, which no index knows.
_ROWS = """
rows AS (
    SELECT * FROM credit_refresh_histories
    WHERE user_id = %(user_id)s AND status = 'refreshed' AND reversed_by_run_id IS NULL
    UNION ALL
    SELECT * FROM credit_refresh_histories
    WHERE user_id = %(user_id)s AND status = 'held' AND reversed_by_run_id IS NULL
    UNION ALL
    SELECT * FROM credit_refresh_histories
    WHERE user_id = %(user_id)s AND status <> 'planned'
        AND (status IN ('failed', 'skipped', 'reversed') OR reversed_by_run_id IS NOT NULL)
)
"""
HISTORY = f"""
WITH {_ROWS}
SELECT
    id, created_at, status, source, run_id, window_start, window_end, first_missed_at, windows_passed, plan_code,
    grant_mode, target, old_balance, credits_added, new_balance, shortfall, reason, error, reversed_by_run_id
FROM rows
WHERE (%(before_at)s::timestamptz IS NULL OR created_at < %(before_at)s)
    AND (
        %(before_id)s::bigint IS NULL
        OR (created_at, id) < (SELECT created_at, id FROM rows WHERE id = %(before_id)s)
    )
ORDER BY created_at DESC, id DESC
LIMIT %(limit)s
"""  # noqa: S608 - two constants
_HAS = f"WITH {_ROWS} SELECT EXISTS (SELECT FROM rows WHERE id = %(before_id)s)"  # noqa: S608 - two constants


def user_history(
    connection: psycopg.Connection[Any], external_id: str, *, limit: int, before: int | datetime | None = None
) -> tuple[list[Entry], bool]:
    """A user's history, the newest first.

    Args:
        connection: anything.
        external_id: whose; the host app's own id.
        limit: how many entries at most.
        before: older than this entry's id, or than this instant; None: from the newest on.

    Returns:
        The entries, and whether there are more.

    Raises:
        NotFoundError: no such user, or the entry is none of theirs.
    """
    user = connection.execute("SELECT id FROM users WHERE external_id = %s", (external_id,)).fetchone()
    if user is None:
        raise NotFoundError(f"there is no user {external_id!r}")
    parameters = {
        "user_id": user[0],
        "before_id": before if isinstance(before, int) else None,
        "before_at": None if isinstance(before, int) else before,
        "limit": limit + 1,
    }
    if isinstance(before, int) and connection.execute(_HAS, parameters).fetchone() != (True,):
        raise NotFoundError(f"{external_id} has no entry {before}")
    with connection.cursor(row_factory=class_row(Entry)) as cursor:
        found = cursor.execute(HISTORY, parameters).fetchall()
    return found[:limit], len(found) > limit


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
