"""Rollback: a run that takes back what another has granted, as far as users still have it.

    check the run → cancel it, if it is still running → the users with a live grant of it → batches (reversal.py)

A run is rolled back once. Single users (`--users`) may be taken back before and after that, and so may those whom a
cancelled rollback did not reach: no grant is taken back twice, because it knows who did (`reversed_by_run_id`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID  # noqa: TC003 - asdict() and the tests read the annotations

from db import one
from refresh import runs
from refresh.cancel import cancel_run
from refresh.errors import NotFoundError, RefusedError
from refresh.partitions import GONE, gone_text
from refresh.reversal import FITS, LIVE, MONEY
from refresh.runs import NotOpened, Opened
from refresh.selection import LISTED, Chosen

if TYPE_CHECKING:
    import psycopg


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be taken back, and how.

    Attributes:
        run_id: the run whose grants.
        reopen: give the windows back as well, so that the users are due again.
        allow_negative: take all of it, below zero where it was spent.
        listed: only the users of the file that was loaded (`Listed.content()`); None: all of the run's.
    """

    run_id: UUID
    reopen: bool = False
    allow_negative: bool = False
    listed: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """What the rollback's row keeps of it; its batches read it there."""
        return {
            "run": str(self.run_id),
            "reopen": self.reopen,
            "allowNegative": self.allow_negative,
            **({"users": self.listed} if self.listed is not None else {}),
        }

    def request(self, base: runs.Request) -> runs.Request:
        """The request for it: who asks, why and under which key are the base's."""
        run_id = self.run_id
        return replace(base, kind="rollback", work="rollback", parent_run_id=run_id, subject_run_id=run_id)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a rollback would do if it was opened now.

    Attributes:
        users: who would be taken back.
        credits_taken: from them, in sum; negative where grants had lowered balances.
        shortfall: what they have spent of the grants and would keep; with `reopen`, what the next ones are lowered by.
        refreshed_since: users who would be left alone.
        deleted: users whom the host has deleted.
        failing: users whose balance would not fit 64 bits.
        running: the run is still running, and would be cancelled.
    """

    users: int
    credits_taken: int
    shortfall: int
    refreshed_since: int
    deleted: int
    failing: int
    running: bool

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "users": self.users,
            "creditsTaken": self.credits_taken,
            "shortfall": self.shortfall,
            "refreshedSince": self.refreshed_since,
            "deleted": self.deleted,
            "failing": self.failing,
            "running": self.running,
        }


class _Subject(NamedTuple):
    work: str
    status: str
    dry_run: bool
    gone: bool


# Locked, the run ends before this or after it, and is cancelled in between or not at all.
_SUBJECT = f"SELECT work, status, dry_run, {GONE} FROM credit_refresh_runs AS r WHERE id = %(run_id)s"  # noqa: S608 - texts
_SUBJECT_LOCKED = f"{_SUBJECT} FOR NO KEY UPDATE"
# In the form of the unique index.
_ROLLED_BACK = """
SELECT id FROM credit_refresh_runs
WHERE parent_run_id = %(run_id)s AND kind = 'rollback' AND NOT dry_run
    AND NOT (kind = 'rollback' AND (status = 'cancelled' OR selection -> 'users' IS NOT NULL))
"""
_SETTINGS = "SELECT enabled, dry_run FROM settings"

# A run's grants are found by its users: grants pay for no index by run (docs/adr/0006).
_GRANTS = f"""
grants AS MATERIALIZED (
    SELECT DISTINCT ON (g.user_id) g.id, g.user_id, g.credits_added, g.grant_mode, g.old_balance, g.shortfall
    FROM (
        SELECT DISTINCT unnest(user_ids) AS id FROM credit_refresh_batches WHERE run_id = %(subject_run_id)s::uuid
    ) AS t
    JOIN credit_refresh_histories AS g ON g.user_id = t.id
    WHERE g.run_id = %(subject_run_id)s::uuid AND {LIVE.format(grant="g")} {{listed}}
    ORDER BY g.user_id, g.id DESC
)
"""  # noqa: S608 - texts of this module alone
_ONLY_LISTED = f"AND t.id IN (SELECT user_id FROM pg_temp.{LISTED})"  # noqa: S608 - the same
_OF_ALL, _OF_LISTED = _GRANTS.format(listed=""), _GRANTS.format(listed=_ONLY_LISTED)

_SELECTED = "{grants}, selected AS (SELECT user_id AS id, NULL::text AS whole FROM grants)"

_EXPECT = f"""
WITH {{grants}},
asked AS (SELECT %(reopen)s::boolean AS reopen, %(allow_negative)s::boolean AS allow_negative),
newest AS (
    SELECT h.user_id, max(h.id) AS id
    FROM credit_refresh_histories AS h
    WHERE h.user_id IN (SELECT user_id FROM grants) AND {LIVE.format(grant="h")}
    GROUP BY h.user_id
),
outlook AS (
    SELECT
        m.take, m.shortfall,
        CASE
            WHEN u.id IS NULL THEN 'deleted'
            WHEN n.id > g.id THEN 'refreshed_since'
            WHEN {FITS} THEN 'reversed'
            ELSE 'overflow'
        END AS verdict
    FROM grants AS g
    JOIN newest AS n ON n.user_id = g.user_id
    CROSS JOIN asked AS a
    LEFT JOIN users AS u ON u.id = g.user_id
    CROSS JOIN {MONEY} AS m
)
SELECT
    count(*) FILTER (WHERE verdict = 'reversed') AS users,
    coalesce(sum(take) FILTER (WHERE verdict = 'reversed'), 0)::text AS credits_taken,
    coalesce(sum(shortfall) FILTER (WHERE verdict = 'reversed'), 0)::text AS shortfall,
    count(*) FILTER (WHERE verdict = 'refreshed_since') AS refreshed_since,
    count(*) FILTER (WHERE verdict = 'deleted') AS deleted,
    count(*) FILTER (WHERE verdict = 'overflow') AS failing
FROM outlook
"""  # noqa: S608 - texts of this module alone


def expect(connection: psycopg.Connection[Any], asked: Asked) -> Expected:
    """What a rollback would do; nobody is locked, and what is spent meanwhile makes a difference.

    Args:
        connection: anything with a `statement_timeout` for so many users; with a file's users, one that has their
            table.
        asked: for what.

    Raises:
        RefusedError: the run cannot be rolled back, or has granted nothing that could be taken back.
    """
    subject = _check(connection, asked, _SUBJECT)
    parameters = {**asdict(asked), "subject_run_id": asked.run_id}
    grants = _OF_LISTED if asked.listed is not None else _OF_ALL
    found = one(connection.execute(_EXPECT.format(grants=grants), parameters))
    users, credits_taken, shortfall, refreshed_since, deleted, failing = found
    running = subject.status == "running"
    if not running and users + refreshed_since + deleted + failing == 0:
        raise _nothing(asked)
    return Expected(users, int(credits_taken), int(shortfall), refreshed_since, deleted, failing, running)


def admit(
    connection: psycopg.Connection[Any], request: runs.Request, asked: Asked
) -> runs.Request | Opened | NotOpened:
    """Whether there is anything to open: for whoever wants to know before they ask, and behind the door for certain.

    Returns:
        The request as it will be carried out, which is a dry one where all runs are; or the run that it has opened
        before; or why none is opened.

    Raises:
        RefusedError: the idempotency key belongs to another request.
    """
    enabled, all_dry = one(connection.execute(_SETTINGS))
    request = request.as_things_are(all_dry=all_dry)
    if existing := runs.find_opened(connection, request, asked.facts()):
        return existing
    return request if enabled else NotOpened("paused")


def open_rollback(connection: psycopg.Connection[Any], request: runs.Request, asked: Asked) -> Opened | NotOpened:
    """Open the run that takes back another's grants. Where that one is still running, it is cancelled first.

    A dry run cancels nothing, and looks at what has been granted so far.

    Args:
        connection: in a transaction that waits up to `runs.OPENING_LOCK_TIMEOUT` for locks; publish after its commit.
            With a file's users, one that has their table.
        request: `asked.request(…)`.
        asked: what is to be taken back.

    Raises:
        RefusedError: there is no such run, it is a dry run, a rollback or a regrid, it was rolled back already, or has
            granted nothing that could be taken back; or the idempotency key belongs to another request.
    """
    runs.lock_door(connection)
    admitted = admit(connection, request, asked)
    if not isinstance(admitted, runs.Request):
        return admitted
    subject = _check(connection, asked, _SUBJECT_LOCKED)
    stops = subject.status == "running" and not admitted.dry_run
    if stops:
        because = f"rolled back: {admitted.reason}" if admitted.reason else "rolled back"
        cancel_run(connection, asked.run_id, actor=admitted.requested_by, reason=because)
    text = _SELECTED.format(grants=_OF_LISTED if asked.listed is not None else _OF_ALL)
    # A run that was stopped before it had granted anything stays stopped.
    opened = runs.cut(connection, admitted, Chosen(text, {}, asked.facts()), even_empty=stops)
    if opened is None:
        raise _nothing(asked)
    return opened


def _check(connection: psycopg.Connection[Any], asked: Asked, statement: str) -> _Subject:
    """The run to be rolled back.

    Raises:
        RefusedError: there is none, or it cannot be.
    """
    row = connection.execute(statement, {"run_id": asked.run_id}).fetchone()
    if row is None:
        raise NotFoundError(f"there is no run {asked.run_id}")
    subject = _Subject(*row)
    if subject.work == "rollback":
        raise RefusedError(
            f"a rollback cannot be rolled back: run {asked.run_id} took credits back; `credits refresh` or "
            "`credits bulk-refresh` with --force gives some"
        )
    if subject.work == "regrid":
        raise RefusedError(f"run {asked.run_id} moved dates to a plan's new grid and granted nothing to take back")
    if subject.dry_run:
        raise RefusedError(f"run {asked.run_id} was a dry run: there is nothing to take back")
    if subject.gone:
        raise RefusedError(gone_text(asked.run_id))
    if asked.listed is None:
        by = connection.execute(_ROLLED_BACK, {"run_id": asked.run_id}).fetchone()
        if by is not None:
            raise RefusedError(f"run {asked.run_id} was rolled back already, by run {by[0]}")
    return subject


def _nothing(asked: Asked) -> RefusedError:
    whose = "the users in the file have" if asked.listed is not None else "it has"
    return RefusedError(f"run {asked.run_id}: {whose} no grant of it that could be taken back")
