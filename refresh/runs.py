"""Runs: the one door through which every refresh comes in, and how a run ends.

Beat, the command line and whatever comes later open a run here: one advisory lock, then one statement that finds all
due users and cuts them into batches, however many they are. No user id passes through Python.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db import one
from refresh.partitions import ensure_partitions
from refresh.schedule import slot_at

if TYPE_CHECKING:
    from datetime import datetime

    import psycopg

SCHEDULED = "scheduled"
"""The reason that beat's runs carry. The unique index over planned windows names it (models/history.py)."""

OPENING_LOCK_TIMEOUT = timedelta(minutes=5)
"""How long one opening waits for another. Cutting a million users into batches takes about a second."""


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asks a run for.

    Attributes:
        source: which way it came in.
        requested_by: who asked; the actor of the audit rows.
        batch_size: users in a transaction.
        dry_run: decide and record, change no user.
        as_of: decide at this instant instead of each batch's own now(); in the future for dry runs alone.
        slot: the slot that a scheduled run stands for; None for a run that somebody asked for.
        reason: lands in the run and in its history rows.
    """

    source: Literal["beat", "cli"]
    requested_by: str
    batch_size: int
    dry_run: bool = False
    as_of: datetime | None = None
    slot: datetime | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """A run that was opened. One that found nobody due is finished already."""

    run_id: UUID
    dry_run: bool
    users_selected: int
    batches_total: int

    def facts(self) -> dict[str, object]:
        """What a log line or a JSON answer says of it."""
        return {**asdict(self), "run_id": str(self.run_id)}


@dataclass(frozen=True, slots=True)
class NotOpened:
    """No run was opened, and no slot taken."""

    why: Literal["disabled", "paused", "slot_taken"]

    @property
    def text(self) -> str:
        """The reason, for people."""
        return {
            "disabled": "CREDIT_REFRESH_ENABLED is false",
            "paused": "the service is paused (`credits resume` ends that)",
            "slot_taken": "this slot's scan has run already",
        }[self.why]


class RefusedError(ValueError):
    """The request cannot be carried out. The text is one line for people."""


# In a statement of its own: the scan's snapshot must be younger than the lock, or it would not see the batches of the
# run that it waited for.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || '.open_run', 0))"

_SITUATION = """
SELECT
    s.enabled, s.dry_run, now() AS now,
    -- Each in the form of its unique index.
    CASE
        WHEN %(dry_run)s OR s.dry_run
            THEN EXISTS (SELECT FROM credit_refresh_runs WHERE slot = %(slot)s::timestamptz AND dry_run)
        ELSE EXISTS (SELECT FROM credit_refresh_runs WHERE slot = %(slot)s::timestamptz AND NOT dry_run)
    END
        AS slot_taken
FROM settings AS s
"""

# Whom not to batch again: users whose unfinished batch will decide anyway. Dry runs take nobody and plan anybody, but
# beat's dry runs meet the same due users each hour and plan each window once. A regrid grants nothing.
_TAKEN = """
SELECT unnest(b.user_ids) AS user_id
FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE b.status = 'pending' AND r.status = 'running' AND NOT r.dry_run AND r.kind <> 'regrid'
"""
_PLANNED = """
SELECT h.user_id
FROM credit_refresh_histories AS h JOIN users AS u ON u.id = h.user_id
WHERE h.status = 'planned' AND h.reason = 'scheduled' AND h.window_start >= u.next_refresh_at AND h.window_end > now()
"""

_DUE = """
taken AS MATERIALIZED ({taken}),
selected AS (
    SELECT u.id
    FROM users AS u
    WHERE u.wake_at <= coalesce(%(as_of)s::timestamptz, now())
        AND EXISTS (SELECT FROM plans AS p WHERE p.code = u.plan_code AND p.active AND p.cadence <> 'external')
        AND NOT EXISTS (SELECT FROM taken AS t WHERE t.user_id = u.id)
)
"""

# The run's row comes last because it carries the counts; its batches' foreign key is checked at the statement's end.
_OPEN = """
WITH {selected},
-- By id: a batch's users lie together on disk.
numbered AS (SELECT id, (row_number() OVER (ORDER BY id) - 1) / %(batch_size)s AS seq FROM selected),
batches AS (
    INSERT INTO credit_refresh_batches (run_id, seq, user_ids)
    SELECT %(run_id)s::uuid, seq, array_agg(id) FROM numbered GROUP BY seq ORDER BY seq
    RETURNING cardinality(user_ids) AS users
),
cut AS (SELECT count(*) AS batches, coalesce(sum(users), 0) AS users FROM batches)
INSERT INTO credit_refresh_runs (
    id, kind, source, status, dry_run, as_of, slot, selection, reason, requested_by, users_selected, batches_total,
    started_at, finished_at
)
SELECT
    %(run_id)s::uuid, %(kind)s, %(source)s, CASE WHEN cut.batches = 0 THEN 'succeeded' ELSE 'running' END,
    %(dry_run)s, %(as_of)s::timestamptz, %(slot)s::timestamptz, %(selection)s, %(reason)s, %(requested_by)s, cut.users,
    cut.batches, now(),
    CASE WHEN cut.batches = 0 THEN clock_timestamp() END
FROM cut
WHERE cut.batches > 0 OR %(even_empty)s
RETURNING id AS run_id, dry_run, users_selected, batches_total
"""


def opening(selected: str) -> str:
    """The statement that cuts users into batches and writes their run, for `selected`: CTEs that end in that one."""
    return _OPEN.format(selected=selected)


SCAN = opening(_DUE.format(taken=_TAKEN))
SCAN_DRY = opening(_DUE.format(taken="SELECT NULL::bigint AS user_id WHERE false"))
SCAN_DRY_SCHEDULED = opening(_DUE.format(taken=_PLANNED))


def lock_door(connection: psycopg.Connection[Any]) -> None:
    """Wait until nobody else opens a run; they wait for this transaction's end."""
    connection.execute(_LOCK)


def open_run(connection: psycopg.Connection[Any], request: Request) -> Opened | NotOpened:
    """Open a run over all due users: find them, cut them into batches, write the run.

    The caller's transaction should wait up to `OPENING_LOCK_TIMEOUT` for locks, and publish after its commit.

    Raises:
        RefusedError: `as_of` lies in the future and the run is not dry.
    """
    lock_door(connection)
    situation = connection.execute(_SITUATION, {"slot": request.slot, "dry_run": request.dry_run})
    enabled, all_dry, now, slot_taken = one(situation)
    if not enabled:
        return NotOpened("paused")
    if slot_taken:
        return NotOpened("slot_taken")
    dry_run = request.dry_run or all_dry
    if request.as_of is not None and request.as_of > now and not dry_run:
        raise RefusedError(f"{request.as_of.isoformat()} lies in the future: only a dry run may look ahead")
    if request.as_of is not None:
        ensure_partitions(connection, until=request.as_of)
    scheduled = request.slot is not None
    scan = (SCAN_DRY_SCHEDULED if scheduled else SCAN_DRY) if dry_run else SCAN
    with connection.cursor(row_factory=class_row(Opened)) as cursor:
        return one(
            cursor.execute(
                scan,
                {
                    "run_id": uuid4(),
                    "kind": "refresh",
                    "source": request.source,
                    "dry_run": dry_run,
                    "as_of": request.as_of,
                    "slot": request.slot,
                    "selection": Jsonb({"due": True}),
                    "reason": SCHEDULED if scheduled else request.reason,
                    "requested_by": request.requested_by,
                    "batch_size": request.batch_size,
                    "even_empty": True,
                },
            )
        )


def open_scheduled_run(
    connection: psycopg.Connection[Any], *, interval: timedelta, cron: str | None, batch_size: int, dry_run: bool
) -> Opened | NotOpened:
    """Open the run of the slot that the database's clock is in, unless that slot has its run.

    Args:
        connection: in a transaction, as for `open_run()`.
        interval: the width of a slot.
        cron: a timetable in UTC that takes the interval's place.
        batch_size: users in a transaction.
        dry_run: `CREDIT_REFRESH_DRY_RUN`.
    """
    (now,) = one(connection.execute("SELECT now()"))
    slot = slot_at(now, interval, cron)
    return open_run(connection, Request("beat", "beat", batch_size, dry_run=dry_run, slot=slot))
