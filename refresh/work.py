"""What a worker does with a batch: each kind of work in its own module, under one set of promises.

Doing a batch again, at the same time or a day later, changes nothing: whoever comes second finds its row locked, or no
longer pending. A batch that raises has changed nothing. Where it raised because of its users, it is done without those
whom the database refuses (isolation.py), or not at all where it is all of them or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID  # noqa: TC003 - psycopg's row factory builds the class at run time

import psycopg
from psycopg.rows import class_row

from refresh import isolation
from refresh.apply import apply_batch
from refresh.batch import GRANT_ALL, GRANT_MANY, GRANT_ONE, PLAN, TELL_ALL, TELL_MANY, TELL_ONE
from refresh.closing import Outcome, close_batch
from refresh.regrid import REGRID_MANY, REGRID_ONE
from refresh.reversal import reverse_batch
from refresh.webhook_events import TELLS


@dataclass(frozen=True, slots=True)
class Pending:
    """A batch that is still to be done.

    Attributes:
        work: what is to be done with its users.
        lone: it has one user, and may wait for a lock.
        atomic: all of its users or none.
        paced: its run has a pace, so whoever does it waits for its turn before (pacing.py).
        tells: a webhook endpoint wants to know of users.
        far_from_end: so many later batches of its run are pending that whoever does it need not look whether the run
            has ended.
        correlation_id: of the request that opened its run.
    """

    id: int
    run_id: UUID
    work: str
    dry_run: bool
    lone: bool
    atomic: bool
    paced: bool
    tells: bool
    far_from_end: bool
    correlation_id: str | None


FAR_MESSAGES = 100
"""A batch is far from its run's end while the last pending one comes more messages later. Should a worker stand still
for as long as others take for all of these, upkeep ends the run."""

# One round trip a message. What is done already is not asked again.
_PENDING = f"""
SELECT b.id, b.run_id, r.work, r.dry_run, cardinality(b.user_ids) = 1 AS lone, b.atomic,
    r.max_users_per_second IS NOT NULL AS paced, {TELLS} AS tells,
    b.id + %(far)s < (
        SELECT p.id FROM credit_refresh_batches AS p WHERE p.run_id = b.run_id AND p.status = 'pending'
        ORDER BY p.id DESC LIMIT 1
    ) AS far_from_end,
    r.metadata ->> 'correlationId' AS correlation_id
FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE b.id = ANY (%(ids)s) AND b.status IS NOT DISTINCT FROM 'pending' -- not `=`: see TAKE
ORDER BY b.id
"""  # noqa: S608 - a constant


def pending_batches(connection: psycopg.Connection[Any], batch_ids: list[int]) -> list[Pending]:
    """The batches among `batch_ids` that are still to be done."""
    with connection.cursor(row_factory=class_row(Pending)) as cursor:
        # `or ()`: a message that is not ours may carry anything.
        parameters = {"ids": batch_ids, "far": FAR_MESSAGES * len(batch_ids or ())}
        return cursor.execute(_PENDING, parameters, prepare=True).fetchall()


def do_batch(connection: psycopg.Connection[Any], pending: Pending) -> Outcome | None:
    """Do one batch, in a transaction that is committed when this returns.

    Args:
        connection: in autocommit (`Database.statements()`).
        pending: what `pending_batches()` found.

    Returns:
        What became of the users; None when somebody else has the batch or had it, or the service is paused.

    Raises:
        psycopg.Error: nothing was changed; upkeep tries again.
    """
    try:
        return do_whole(connection, pending)
    except psycopg.Error as error:
        if not isolation.is_poison(error):
            raise
        if pending.atomic:
            return isolation.fail_all(connection, pending.id, error)
        return isolation.isolate(connection, pending, error, do_whole)


def do_whole(connection: psycopg.Connection[Any], pending: Pending) -> Outcome | None:
    """Do a batch by its kind of work, and all of it or nothing: in autocommit, a transaction or a savepoint."""
    if pending.work == "apply":
        return apply_batch(connection, pending)
    if pending.work == "rollback":
        return reverse_batch(connection, pending.id, dry_run=pending.dry_run, lone=pending.lone)
    return close_batch(connection, pending.id, _statement(pending))


def _statement(pending: Pending) -> str:
    if pending.work == "regrid":
        return REGRID_ONE if pending.lone else REGRID_MANY
    if pending.dry_run:
        return PLAN
    if pending.atomic:
        return TELL_ALL if pending.tells else GRANT_ALL
    if pending.lone:
        return TELL_ONE if pending.tells else GRANT_ONE
    return TELL_MANY if pending.tells else GRANT_MANY
