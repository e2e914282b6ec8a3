"""Pacing: a run that goes no faster than it was told to, however many workers there are.

Before each batch of a paced run its worker takes a turn, waits for it holding nothing, and does the batch. A turn lasts
as long as the pace gives its users, and the next one begins at its end: after a stall nobody catches up. A run without
a pace knows nothing of this, and none of its batches updates a row that they share (docs/adr/0009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

PACE_MAX = 2**31 - 1
TURNS_PER_SECOND = 10
"""A paced run is cut so small that there are as many turns a second, where it has as many users: waits stay short, and
a worker gets to its other queue in between."""
TURN_SECONDS_MAX = 5
"""What is all or none cannot be cut. Its turn is no longer than this: its transaction is one burst anyway, and a worker
that waits longer would keep its other messages waiting, too."""
AHEAD_SECONDS_MAX = 60
"""No turn begins later than this from now. Only where the database's clock was set back does the row say so: that costs
one burst of what the workers have in hand, instead of a sleep as long as the step."""


def batch_users(batch_size: int, max_users_per_second: int | None) -> int:
    """Users in a transaction of a run that goes at this pace; None: as fast as it can."""
    if max_users_per_second is None:
        return batch_size
    return min(batch_size, max(1, max_users_per_second // TURNS_PER_SECOND))


_SECONDS = "least(cardinality(b.user_ids)::double precision / r.max_users_per_second, %(seconds_max)s)"

# A statement of its own, whose row lock ends with it. Who waited for the lock reckons from the row and the clock as
# they are then. Its commit waits for no disk: it precedes the batch in the log, so a batch that survives a crash has
# its turn on record.
_TURN = f"""
UPDATE credit_refresh_runs AS r SET
    paced_until = make_interval(secs => {_SECONDS}) + least(
        greatest(r.paced_until, clock_timestamp()), clock_timestamp() + make_interval(secs => %(ahead_seconds_max)s)
    )
FROM credit_refresh_batches AS b
WHERE b.id = %(batch_id)s AND b.status IS NOT DISTINCT FROM 'pending' AND r.id = b.run_id AND r.status = 'running'
    AND r.max_users_per_second IS NOT NULL AND (SELECT enabled FROM settings)
RETURNING
    greatest(0, extract(epoch FROM r.paced_until - clock_timestamp())::double precision - {_SECONDS}),
    set_config('synchronous_commit', 'off', true)
"""  # noqa: S608 - texts of this module alone


def take_turn(connection: psycopg.Connection[Any], batch_id: int) -> float | None:
    """Take the next turn of a batch's run.

    Args:
        connection: in autocommit.
        batch_id: of a run that has a pace.

    Returns:
        The seconds to wait before the batch is done; None when there is nothing to do: somebody else has done it, its
        run has ended, or the service is paused.

    Raises:
        psycopg.errors.LockNotAvailable: somebody has the run's row, to cancel it or to end it; no turn was taken.
    """
    parameters = {
        "batch_id": batch_id,
        "seconds_max": TURN_SECONDS_MAX,
        "ahead_seconds_max": AHEAD_SECONDS_MAX,
    }
    row = connection.execute(_TURN, parameters, prepare=True).fetchone()
    return row[0] if row else None
