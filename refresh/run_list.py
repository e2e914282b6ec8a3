"""Runs to look at: the newest first, and one by the beginning of its id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from psycopg.rows import kwargs_row

from refresh.errors import NotFoundError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

Row = TypeVar("Row")

STATUSES = ("running", "succeeded", "partial", "failed", "cancelled")
KINDS = ("refresh", "apply", "rollback", "retry", "regrid")
SOURCES = ("beat", "cli", "api", "cron", "stripe")

PREFIX_MIN = 4
"""Characters of a run's id that name it, if no other run's begins with them."""
_UUID_DIGITS = 32
_NAMED_MAX = 5

# As a range of the primary key. One more than is shown, to tell "several" from "and more".
_FIND = """
SELECT id FROM credit_refresh_runs WHERE id BETWEEN %(first)s::uuid AND %(last)s::uuid ORDER BY id LIMIT %(limit)s
"""


def find_run(connection: psycopg.Connection[Any], text: str) -> UUID:
    """The run that an id, or the beginning of one, names.

    Args:
        connection: anything.
        text: a UUID, with or without its dashes, or at least its first `PREFIX_MIN` characters.

    Raises:
        RefusedError: no run's id begins like that, or several do.
    """
    digits = text.strip().lower().replace("-", "")
    if not re.fullmatch(f"[0-9a-f]{{{PREFIX_MIN},{_UUID_DIGITS}}}", digits):
        raise RefusedError(f"{text!r} is not the id of a run: give all of it, or its first {PREFIX_MIN} characters")
    bounds = {"first": UUID(digits.ljust(_UUID_DIGITS, "0")), "last": UUID(digits.ljust(_UUID_DIGITS, "f"))}
    found = [id_ for (id_,) in connection.execute(_FIND, {**bounds, "limit": _NAMED_MAX + 1})]
    if not found:
        raise NotFoundError(f"there is no run {text}")
    if len(found) > 1:
        named = ", ".join(str(id_) for id_ in found[:_NAMED_MAX]) + (", …" if len(found) > _NAMED_MAX else "")
        raise RefusedError(f"{text} is the beginning of several runs' ids: {named}")
    return UUID(str(found[0]))


def exact(made: Callable[..., Row]) -> psycopg.rows.BaseRowFactory[Row]:
    """A row factory as psycopg's `class_row`, for sums of credits: numeric in PostgreSQL, integers of any size here."""
    return kwargs_row(
        lambda **row: made(**{key: int(value) if isinstance(value, Decimal) else value for key, value in row.items()})
    )


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run and how far it is. Seconds run from its opening to its end, or to now; credits are the sum of its grants.

    Attributes:
        work: what its batches do; its kind, but for a retry.
        users_done: of the users selected, those whose batch is closed.
    """

    run_id: UUID
    created_at: datetime
    kind: str
    work: str
    source: str
    status: str
    dry_run: bool
    users_selected: int
    users_done: int
    users_refreshed: int
    users_held: int
    users_skipped: int
    users_failed: int
    credits_granted: int
    seconds: float
    requested_by: str
    reason: str | None
    max_users_per_second: int | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "runId": str(self.run_id),
            "createdAt": self.created_at.isoformat(),
            "kind": self.kind,
            "work": self.work,
            "source": self.source,
            "status": self.status,
            "dryRun": self.dry_run,
            "usersSelected": self.users_selected,
            "usersDone": self.users_done,
            "usersRefreshed": self.users_refreshed,
            "usersHeld": self.users_held,
            "usersSkipped": self.users_skipped,
            "usersFailed": self.users_failed,
            "creditsGranted": self.credits_granted,
            "seconds": round(self.seconds, 3),
            "requestedBy": self.requested_by,
            "reason": self.reason,
            "maxUsersPerSecond": self.max_users_per_second,
        }


# A run that has ended carries its totals. Those of one that runs are in its batches, and so are those of one that was
# cancelled while workers still had some.
_LINES = """
WITH page AS MATERIALIZED ({page})
SELECT
    r.id AS run_id, r.created_at, r.kind, r.work, r.source, r.status, r.dry_run, r.users_selected,
    t.refreshed + t.held + t.skipped + t.failed AS users_done,
    t.refreshed AS users_refreshed, t.held AS users_held, t.skipped AS users_skipped, t.failed AS users_failed,
    t.credits AS credits_granted,
    extract(epoch FROM coalesce(r.finished_at, clock_timestamp()) - coalesce(r.started_at, r.created_at))::float
        AS seconds,
    r.requested_by, r.reason, r.max_users_per_second
FROM page AS r
CROSS JOIN LATERAL (
    SELECT
        r.users_refreshed AS refreshed, r.users_held AS held, r.users_skipped AS skipped, r.users_failed AS failed,
        r.credits_granted::numeric AS credits
    WHERE r.status NOT IN ('running', 'cancelled')
    UNION ALL
    SELECT
        coalesce(sum(b.users_refreshed), 0)::bigint, coalesce(sum(b.users_held), 0)::bigint,
        coalesce(sum(b.users_skipped), 0)::bigint,
        coalesce(sum(CASE b.status WHEN 'failed' THEN cardinality(b.user_ids) ELSE b.users_failed END), 0)::bigint,
        coalesce(sum(b.credits_granted), 0)
    FROM credit_refresh_batches AS b
    WHERE b.run_id = r.id AND r.status IN ('running', 'cancelled')
    HAVING r.status IN ('running', 'cancelled')
) AS t
ORDER BY r.created_at DESC, r.id DESC
"""
_LIST = _LINES.format(
    page="""
    SELECT * FROM credit_refresh_runs
    WHERE (%(status)s::text IS NULL OR status = %(status)s) AND (%(kind)s::text IS NULL OR kind = %(kind)s)
        AND (%(source)s::text IS NULL OR source = %(source)s)
        AND (%(dry_run)s::boolean IS NULL OR dry_run = %(dry_run)s)
        AND (%(of_one)s::boolean IS NULL OR selection ? 'user' = %(of_one)s)
        AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
        AND (
            %(before)s::uuid IS NULL
            OR (created_at, id) < (SELECT created_at, id FROM credit_refresh_runs WHERE id = %(before)s)
        )
    ORDER BY created_at DESC, id DESC
    LIMIT %(limit)s
    """
)
_ONE = _LINES.format(page="SELECT * FROM credit_refresh_runs WHERE id = %(run_id)s")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which runs to list; None everywhere: any.

    Attributes:
        dry_run: dry runs alone, or live ones alone.
        of_one: runs that were asked for one user alone, or all others alone.
        since: opened then or later.
        before: older than this run.
    """

    status: str | None = None
    kind: str | None = None
    source: str | None = None
    dry_run: bool | None = None
    of_one: bool | None = None
    since: datetime | None = None
    before: UUID | None = None


def list_runs(connection: psycopg.Connection[Any], wanted: Wanted, *, limit: int) -> tuple[list[RunLine], bool]:
    """The runs that are wanted, newest first; at most `limit`, and whether there are more."""
    parameters = {
        "status": wanted.status,
        "kind": wanted.kind,
        "source": wanted.source,
        "dry_run": wanted.dry_run,
        "of_one": wanted.of_one,
        "since": wanted.since,
        "before": wanted.before,
        "limit": limit + 1,
    }
    with connection.cursor(row_factory=exact(RunLine)) as cursor:
        found = cursor.execute(_LIST, parameters).fetchall()
    return found[:limit], len(found) > limit


def read_line(connection: psycopg.Connection[Any], run_id: UUID) -> RunLine:
    """One run as the list shows it.

    Raises:
        NotFoundError: there is no such run.
    """
    with connection.cursor(row_factory=exact(RunLine)) as cursor:
        line = cursor.execute(_ONE, {"run_id": run_id}).fetchone()
    if line is None:
        raise NotFoundError(f"there is no run {run_id}")
    return line
