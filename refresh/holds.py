"""Holds: set, changed and released by a command.

The audit rows are a trigger's (audit_hold), so that a host's plain UPDATE of the flag leaves them too; here the trigger
is told who asks. What a hold means is the rule's business, and when it ends by itself the batch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row

from db import one
from refresh.errors import NotFoundError, RefusedError

if TYPE_CHECKING:
    from datetime import datetime

    import psycopg


@dataclass(frozen=True, slots=True)
class Held:
    """What a hold changed.

    Attributes:
        was_held: whether another hold was in force.
        changed: whether anything is different now.
    """

    was_held: bool
    changed: bool


# For the transaction alone: audit_hold reads it.
ACTOR = "SELECT set_config('credits.actor', %(actor)s, true)"
_PASSED = "SELECT %(until)s::timestamptz <= now()"

_HOLD = """
WITH before AS (
    SELECT
        id, coalesce(credit_refresh_hold AND (hold_until IS NULL OR hold_until > now()), false) AS was_held,
        credit_refresh_hold
            AND (hold_reason, hold_until) IS NOT DISTINCT FROM (%(reason)s::text, %(until)s::timestamptz) AS same
    FROM users
    WHERE external_id = %(external_id)s
    FOR NO KEY UPDATE
)
UPDATE users AS u SET
    credit_refresh_hold = true, hold_reason = %(reason)s, hold_until = %(until)s::timestamptz,
    updated_at = CASE WHEN b.same THEN u.updated_at ELSE now() END
FROM before AS b
WHERE u.id = b.id
RETURNING b.was_held, NOT b.same AS changed
"""
_RELEASE = """
WITH before AS (SELECT id, credit_refresh_hold FROM users WHERE external_id = %(external_id)s FOR NO KEY UPDATE),
released AS (
    UPDATE users AS u SET credit_refresh_hold = false, hold_reason = NULL, hold_until = NULL, updated_at = now()
    FROM before AS b
    WHERE u.id = b.id AND b.credit_refresh_hold
)
SELECT credit_refresh_hold FROM before
"""


def hold(
    connection: psycopg.Connection[Any], external_id: str, *, reason: str, until: datetime | None, actor: str
) -> Held:
    """Hold a user; of one who is held already, replace the reason and the end.

    Args:
        connection: in a transaction.
        external_id: the host app's id.
        reason: for people; lands in the audit log.
        until: when the hold ends by itself; None: when it is released.
        actor: who asks, for the audit log.

    Raises:
        RefusedError: no such user, no reason, or an end that has passed.
    """
    if not reason.strip():
        raise RefusedError("a hold needs a reason: whoever asks why gets it to read")
    if until is not None and one(connection.execute(_PASSED, {"until": until}))[0]:
        raise RefusedError(f"{until.isoformat()} has passed: a hold ends in the future")
    connection.execute(ACTOR, {"actor": actor})
    parameters = {"external_id": external_id, "reason": reason.strip(), "until": until}
    with connection.cursor(row_factory=class_row(Held)) as cursor:
        held = cursor.execute(_HOLD, parameters).fetchone()
    if held is None:
        raise NotFoundError(f"there is no user {external_id!r}")
    return held


def release(connection: psycopg.Connection[Any], external_id: str, *, actor: str) -> bool:
    """End a user's hold; the next scan refreshes them if they are due.

    Returns:
        Whether the user was held.

    Raises:
        NotFoundError: no such user.
    """
    connection.execute(ACTOR, {"actor": actor})
    row = connection.execute(_RELEASE, {"external_id": external_id}).fetchone()
    if row is None:
        raise NotFoundError(f"there is no user {external_id!r}")
    return bool(row[0])
