"""Runs: the one door through which every refresh comes in.

Beat, the command line and whatever comes later open a run here: one advisory lock, then one statement that finds the
users and cuts them into batches, however many they are. No user id passes through Python.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db import one
from refresh import selection
from refresh.errors import KeyReusedError, NobodyError, RefusedError
from refresh.pacing import batch_users
from refresh.partitions import ensure_partitions
from refresh.schedule import slot_at
from refresh.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    import psycopg

    from refresh.selection import Chosen

SCHEDULED = "scheduled"
"""The reason that runs of beat and of cron services carry. The unique index over planned windows names it
(models/history.py): however often they come, a window is planned once by dry ones."""

STRIPE_KEYS = "stripe:"
"""How the idempotency keys of billing periods begin (stripe_periods.py), and nobody else's."""

OPENING_LOCK_TIMEOUT = timedelta(minutes=5)
"""How long one opening waits for another. Cutting a million users into batches takes about a second."""

AHEAD_MAX = timedelta(days=3_653)  # of a dry run: each month until then is given partitions, which stay
ATOMIC_USERS_MAX = 20_000
"""Users that are refreshed all or none: one statement, which holds all of their rows until it commits, and a host that
spends waits as long. Measured on two cores with fsync: 0.06 s for 1,000 users, 0.35 s for 10,000, 0.8 s for 20,000,
2.0 s for 50,000, 4.8 s for 100,000. The rows are locked in place: the server's lock table has 100 entries more for any
number of users, for tables, indexes and partitions."""


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody asks a run for.

    Attributes:
        source: which way it came in.
        requested_by: who asked; the actor of the audit rows.
        batch_size: users in a transaction, at most.
        dry_run: decide and record, change no user.
        as_of: decide at this instant instead of each batch's own now(); in the future for dry runs alone.
        window_end: where what a forced run grants ends, with `as_of` where it begins: a billing period. None: as the
            rule says.
        slot: the slot that a scheduled run stands for; None for a run that somebody asked for.
        reason: lands in the run, in its history rows and in its audit rows.
        force: refresh those too who are not due, unscheduled or external.
        keep_window: a forced refresh leaves the user's date where it is.
        amount: the target instead of the user's or the plan's; None: theirs.
        atomic: all of the users or none.
        max_users_per_second: go no faster than that; None: as fast as the workers can.
        idempotency_key: asked again with the same key, the request finds the run that it opened before.
        kind: what the run is called.
        work: what its batches do; the kind, but for a retry.
        parent_run_id: the run that it applies, reverses or retries.
        subject_run_id: the dry run whose rows it applies, or the run whose grants it takes back.
        made_dry: it was not asked for as a dry run, but every run is one now.
        correlation_id: of the HTTP request, for the workers' logs and the audit log.

    Raises:
        RefusedError: it is atomic, and has a pace; or its reason or idempotency key is kept for others.
    """

    source: Literal["beat", "cli", "api", "cron", "stripe"]
    requested_by: str
    batch_size: int
    dry_run: bool = False
    as_of: datetime | None = None
    window_end: datetime | None = None
    slot: datetime | None = None
    reason: str | None = None
    force: bool = False
    keep_window: bool = False
    amount: int | None = None
    atomic: bool = False
    max_users_per_second: int | None = None
    idempotency_key: str | None = None
    kind: Literal["refresh", "apply", "rollback", "retry", "regrid"] = "refresh"
    work: Literal["refresh", "apply", "rollback", "regrid"] = "refresh"
    parent_run_id: UUID | None = None
    subject_run_id: UUID | None = None
    made_dry: bool = False
    correlation_id: str | None = None

    def __post_init__(self) -> None:
        """What is one transaction has no pace; nobody passes for Stripe's periods, nor for beat's dry runs."""
        if self.reason == SCHEDULED and self.source not in {"beat", "cron"}:
            raise RefusedError(f"the reason {SCHEDULED!r} is that of beat's runs: give another")
        if self.atomic and self.max_users_per_second is not None:
            raise RefusedError("all of them or none is one transaction: it cannot be paced")
        if self.source != "stripe" and (self.idempotency_key or "").startswith(STRIPE_KEYS):
            raise RefusedError(f"idempotency keys beginning with {STRIPE_KEYS!r} are those of Stripe's billing periods")

    def as_things_are(self, *, all_dry: bool) -> Request:
        """The request as it will be carried out: a dry one where every run is."""
        return replace(self, dry_run=True, made_dry=True) if all_dry and not self.dry_run else self

    def fingerprint(self, selected: Mapping[str, Any]) -> str:
        """Of everything that makes it this request and no other; who sent it, when, and how fast it goes does not."""
        content = {**asdict(self), "dry_run": self.dry_run and not self.made_dry, "selected": selected}
        how = ("batch_size", "max_users_per_second")
        for name in ("source", "requested_by", "idempotency_key", "slot", "made_dry", "correlation_id", *how):
            del content[name]
        if self.window_end is None:  # as of requests that were sent before there was one
            del content["window_end"]
        return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Opened:
    """A run that was opened. One that found nobody is finished already.

    Attributes:
        existing: it was there: the request came with the key of one that had opened it.
    """

    run_id: UUID
    dry_run: bool
    users_selected: int
    batches_total: int
    existing: bool = False

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


# In a statement of its own: the scan's snapshot must be younger than the lock, or it would not see the batches of the
# run that it waited for.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || '.open_run', 0))"

_SITUATION = """
SELECT
    s.enabled, s.dry_run, s.books_since, now() AS now,
    -- Each in the form of its unique index.
    CASE
        WHEN %(dry_run)s OR s.dry_run
            THEN EXISTS (SELECT FROM credit_refresh_runs WHERE slot = %(slot)s::timestamptz AND dry_run)
        ELSE EXISTS (SELECT FROM credit_refresh_runs WHERE slot = %(slot)s::timestamptz AND NOT dry_run)
    END
        AS slot_taken
FROM settings AS s
"""

_BY_KEY = """
SELECT id, dry_run, users_selected, batches_total, metadata ->> 'fingerprint' FROM credit_refresh_runs
WHERE idempotency_key = %(key)s
"""

# The run's row comes last because it carries the counts; its batches' foreign key is checked at the statement's end.
# A forced run's instant is fixed: its grants' windows begin there, so that a second delivery collides.
_CUT = """
WITH {selected},
-- By id: a batch's users lie together on disk.
numbered AS (
    SELECT
        id, whole, (row_number() OVER (PARTITION BY whole ORDER BY id) - 1)
            / CASE WHEN whole IS NULL THEN %(batch_size)s ELSE %(atomic_users_max)s END AS part
    FROM selected
),
batches AS (
    INSERT INTO credit_refresh_batches (run_id, seq, user_ids, atomic)
    SELECT %(run_id)s::uuid, row_number() OVER (ORDER BY whole NULLS FIRST, part) - 1, ids, whole IS NOT NULL
    -- Fenced, and in no order within a part: so the parts are sorted, and not everybody a second time.
    FROM (SELECT whole, part, array_agg(id) AS ids FROM numbered GROUP BY whole, part OFFSET 0) AS parts
    ORDER BY whole NULLS FIRST, part
    RETURNING cardinality(user_ids) AS users
),
cut AS (SELECT count(*) AS batches, coalesce(sum(users), 0) AS users FROM batches)
INSERT INTO credit_refresh_runs (
    id, kind, work, source, status, dry_run, as_of, window_end, slot, parent_run_id, subject_run_id, selection, force,
    keep_window, amount, atomic, reason, requested_by, max_users_per_second, idempotency_key, metadata, users_selected,
    batches_total, started_at, finished_at
)
SELECT
    %(run_id)s::uuid, %(kind)s, %(work)s, %(source)s, CASE WHEN cut.batches = 0 THEN 'succeeded' ELSE 'running' END,
    %(dry_run)s, coalesce(%(as_of)s::timestamptz, CASE WHEN %(force)s THEN now() END),
    %(window_end)s::timestamptz, %(slot)s::timestamptz,
    %(parent_run_id)s::uuid, %(subject_run_id)s::uuid, %(selection)s, %(force)s, %(keep_window)s, %(amount)s::bigint,
    %(atomic)s, %(reason)s, %(requested_by)s, %(max_users_per_second)s::integer, %(idempotency_key)s, %(metadata)s,
    cut.users, cut.batches, now(),
    CASE WHEN cut.batches = 0 THEN clock_timestamp() END
FROM cut
WHERE cut.batches > 0 OR %(even_empty)s
RETURNING id AS run_id, dry_run, users_selected, batches_total
"""


def lock_door(connection: psycopg.Connection[Any]) -> None:
    """Wait until nobody else opens a run; they wait for this transaction's end."""
    connection.execute(_LOCK)


def cut(
    connection: psycopg.Connection[Any], request: Request, chosen: Chosen, *, even_empty: bool = False
) -> Opened | None:
    """Cut users into batches and write their run: one statement, whatever their number.

    Args:
        connection: in a transaction that holds the door.
        request: what was asked for.
        chosen: for whom.
        even_empty: whether a run that finds nobody is a run.

    Returns:
        The run; None when nobody was found.
    """
    metadata = {"fingerprint": request.fingerprint(chosen.facts)} if request.idempotency_key else {}
    metadata |= {"correlationId": request.correlation_id} if request.correlation_id else {}
    values = {
        **chosen.parameters,
        **asdict(request),
        "batch_size": batch_users(request.batch_size, request.max_users_per_second),
        "run_id": uuid4(),
        "selection": Jsonb(dict(chosen.facts)),
        "metadata": Jsonb(metadata),
        "atomic_users_max": ATOMIC_USERS_MAX,
        "even_empty": even_empty,
    }
    with connection.cursor(row_factory=class_row(Opened)) as cursor:
        return cursor.execute(_CUT.format(selected=chosen.text), values).fetchone()


def find_opened(connection: psycopg.Connection[Any], request: Request, facts: Mapping[str, Any]) -> Opened | None:
    """The run that a request with the same key has opened before.

    Raises:
        KeyReusedError: that was another request.
    """
    if request.idempotency_key is None:
        return None
    row = connection.execute(_BY_KEY, {"key": request.idempotency_key}).fetchone()
    if row is None:
        return None
    run_id, dry_run, users_selected, batches_total, fingerprint = row
    if fingerprint != request.fingerprint(facts):
        raise KeyReusedError(
            f"the idempotency key {request.idempotency_key!r} belongs to run {run_id}, which was asked for something "
            "else: take a new key"
        )
    return Opened(run_id, dry_run, users_selected, batches_total, existing=True)


def admit(
    connection: psycopg.Connection[Any], request: Request, asked: Selection | None = None
) -> Request | Opened | NotOpened:
    """Whether there is anything to open: for whoever wants to know before they ask, and behind the door for certain.

    Returns:
        The request as it will be carried out, which is a dry one where all runs are; or the run that it has opened
        before; or why none is opened.

    Raises:
        RefusedError: `as_of` lies in the future and the run is not dry, or before the books; the idempotency key
            belongs to another request.
    """
    situation = connection.execute(_SITUATION, {"slot": request.slot, "dry_run": request.dry_run})
    enabled, all_dry, books_since, now, slot_taken = one(situation)
    request = request.as_things_are(all_dry=all_dry)
    if existing := find_opened(connection, request, (asked or Selection()).facts(force=request.force)):
        return existing
    if not enabled:
        return NotOpened("paused")
    if slot_taken:
        return NotOpened("slot_taken")
    if request.as_of is not None and request.as_of > now and not request.dry_run:
        raise RefusedError(f"{request.as_of.isoformat()} lies in the future: only a dry run may look ahead")
    if request.as_of is not None and request.as_of > now + AHEAD_MAX:
        raise RefusedError(f"{request.as_of.isoformat()} lies more than ten years ahead: a dry run looks no further")
    if request.as_of is not None and books_since is not None and request.as_of < books_since:
        raise RefusedError(
            f"{request.as_of.isoformat()} lies before the books, which begin at {books_since.isoformat()}"
        )
    return request


def open_run(
    connection: psycopg.Connection[Any], request: Request, asked: Selection | None = None, *, even_empty: bool = True
) -> Opened | NotOpened:
    """Open a run that refreshes users: find them, cut them into batches, write the run.

    The caller's transaction should wait up to `OPENING_LOCK_TIMEOUT` for locks, and publish after its commit.

    Args:
        connection: in a transaction; with a file's users, one that has their table.
        request: what is asked for.
        asked: of whom; None: of all who are due.
        even_empty: whether a run of all who are due is a run when nobody is.

    Raises:
        NobodyError: nobody was found for a request that names them, or wants somebody.
        RefusedError: `as_of` lies in the future and the run is not dry; the idempotency key belongs to another request;
            or too many users for one that is atomic.
    """
    lock_door(connection)
    admitted = admit(connection, request, asked)
    if not isinstance(admitted, Request):
        return admitted
    request = admitted
    if request.as_of is not None:
        ensure_partitions(connection, until=request.as_of)
    chosen = selection.choose(
        connection,
        asked,
        as_of=request.as_of,
        force=request.force,
        dry_run=request.dry_run,
        unplanned=request.dry_run and request.reason == SCHEDULED,
    )
    opened = cut(connection, request, chosen, even_empty=asked is None and even_empty)
    if opened is None:
        raise NobodyError("nobody matches: no run was opened")
    if request.atomic and opened.users_selected > ATOMIC_USERS_MAX:
        raise RefusedError(
            f"{opened.users_selected:,} users are too many for all or nothing, which locks all of them at once: "
            f"{ATOMIC_USERS_MAX:,} at most; no run was opened"
        )
    return opened


def open_scheduled_run(  # noqa: PLR0913 - one for each setting
    connection: psycopg.Connection[Any],
    *,
    interval: timedelta,
    cron: str | None,
    batch_size: int,
    dry_run: bool,
    max_users_per_second: int | None = None,
) -> Opened | NotOpened:
    """Open the run of the slot that the database's clock is in, unless that slot has its run.

    Args:
        connection: in a transaction, as for `open_run()`.
        interval: the width of a slot.
        cron: a timetable in UTC that takes the interval's place.
        batch_size: users in a transaction, at most.
        dry_run: `CREDIT_REFRESH_DRY_RUN`.
        max_users_per_second: `CREDIT_REFRESH_MAX_USERS_PER_SECOND`; None: as fast as the workers can.
    """
    (now,) = one(connection.execute("SELECT now()"))
    slot = slot_at(now, interval, cron)
    request = Request(
        "beat",
        "beat",
        batch_size,
        dry_run=dry_run,
        slot=slot,
        reason=SCHEDULED,
        max_users_per_second=max_users_per_second,
    )
    return open_run(connection, request)
