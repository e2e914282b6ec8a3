"""Deliveries as people see them: listed, sent again, and cleared away when they are old."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID  # noqa: TC003 - the same

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from refresh.errors import NotFoundError, RefusedError

if TYPE_CHECKING:
    import psycopg

Status = Literal["pending", "delivered", "dead"]
STATUSES: tuple[Status, ...] = ("pending", "delivered", "dead")

EXPIRE_DAYS = 3
"""A message that was due for so long and not even tried, because its endpoint failed or was inactive, is dead."""
DELIVERED_DAYS = 7
DEAD_DAYS = 30
"""How long delivered messages and dead ones are kept."""
PIECE_ROWS = 10_000
"""Rows changed in one statement: a tenth of a second."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as people see it."""

    id: int
    message_id: UUID
    endpoint_id: UUID
    type: str
    status: Status
    attempts: int
    next_attempt_at: datetime | None
    last_status: int | None
    last_error: str | None
    created_at: datetime
    finished_at: datetime | None
    payload: dict[str, Any] | None = None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it; `data`, where it was read with what it tells."""
        return {
            "id": self.id,
            "messageId": str(self.message_id),
            "endpointId": str(self.endpoint_id),
            "type": self.type,
            "status": self.status,
            "attempts": self.attempts,
            "nextAttemptAt": self.next_attempt_at.isoformat() if self.next_attempt_at else None,
            "lastStatus": self.last_status,
            "lastError": self.last_error,
            "createdAt": self.created_at.isoformat(),
            "finishedAt": self.finished_at.isoformat() if self.finished_at else None,
            **({"data": self.payload} if self.payload is not None else {}),
        }


_COLUMNS = """
id, message_id, endpoint_id, type, status, attempts, next_attempt_at, last_status, last_error, created_at, finished_at
"""
_LIST = f"""
SELECT {_COLUMNS} FROM webhook_deliveries
WHERE (%(status)s::text IS NULL OR status = %(status)s)
    AND (%(endpoint_id)s::uuid IS NULL OR endpoint_id = %(endpoint_id)s)
    AND (%(before)s::bigint IS NULL OR id < %(before)s)
ORDER BY id DESC
LIMIT %(limit)s
"""  # noqa: S608 - a text of this module alone
_ONE = f"SELECT {_COLUMNS}, payload FROM webhook_deliveries WHERE id = %(id)s"  # noqa: S608 - the same


def list_deliveries(
    connection: psycopg.Connection[Any],
    *,
    limit: int,
    status: str | None = None,
    endpoint_id: UUID | None = None,
    before: int | None = None,
) -> tuple[list[Delivery], bool]:
    """Messages, the newest first; at most `limit`, and whether there are more.

    Args:
        connection: anything.
        limit: how many at most.
        status: of this status alone.
        endpoint_id: to this endpoint alone.
        before: older than this one.
    """
    values = {"status": status, "endpoint_id": endpoint_id, "before": before, "limit": limit + 1}
    with connection.cursor(row_factory=class_row(Delivery)) as cursor:
        found = cursor.execute(_LIST, values).fetchall()
    return found[:limit], len(found) > limit


def read_delivery(connection: psycopg.Connection[Any], delivery_id: int) -> Delivery:
    """One message, with what it tells.

    Raises:
        NotFoundError: there is none.
    """
    with connection.cursor(row_factory=class_row(Delivery)) as cursor:
        found = cursor.execute(_ONE, {"id": delivery_id}).fetchone()
    if found is None:
        raise NotFoundError(f"there is no webhook delivery {delivery_id}")
    return found


# Its attempts begin anew.
_RETRY = """
UPDATE webhook_deliveries AS d SET status = 'pending', attempts = 0, next_attempt_at = now(), finished_at = NULL
WHERE d.id IN (
    SELECT id FROM webhook_deliveries
    WHERE status = 'dead' AND (%(id)s::bigint IS NULL OR id = %(id)s)
        AND (%(endpoint_id)s::uuid IS NULL OR endpoint_id = %(endpoint_id)s)
        AND endpoint_id IN (SELECT id FROM webhook_endpoints WHERE active)
    ORDER BY id LIMIT %(rows)s
    FOR NO KEY UPDATE
) AND d.status = 'dead'
"""
_AUDIT = "INSERT INTO credit_audit_logs (actor, action, detail) VALUES (%(actor)s, 'webhooks_retried', %(detail)s)"


def retry_delivery(connection: psycopg.Connection[Any], delivery_id: int, *, actor: str) -> Delivery:
    """Send a dead message again.

    Args:
        connection: in a transaction.
        delivery_id: which.
        actor: who asks.

    Raises:
        NotFoundError: there is none.
        RefusedError: it is not dead, or its endpoint is gone or inactive.
    """
    if retry_dead(connection, actor=actor, delivery_id=delivery_id) == 0:
        found = read_delivery(connection, delivery_id)
        if found.status == "dead":
            raise RefusedError(
                f"webhook delivery {delivery_id} has no active endpoint any more: {found.endpoint_id} was removed, or "
                "has to be switched on first"
            )
        raise RefusedError(f"webhook delivery {delivery_id} is {found.status}: only a dead one is sent again")
    return read_delivery(connection, delivery_id)


def retry_dead(
    connection: psycopg.Connection[Any],
    *,
    actor: str,
    endpoint_id: UUID | None = None,
    delivery_id: int | None = None,
) -> int:
    """Send all dead messages again, `PIECE_ROWS` at a time: those of active endpoints.

    Args:
        connection: in a transaction.
        actor: who asks.
        endpoint_id: of this endpoint alone.
        delivery_id: this one alone.

    Returns:
        How many.
    """
    values = {"id": delivery_id, "endpoint_id": endpoint_id, "rows": PIECE_ROWS}
    retried = connection.execute(_RETRY, values).rowcount
    if retried:
        detail = {"deliveries": retried, "deliveryId": delivery_id, "endpointId": endpoint_id and str(endpoint_id)}
        connection.execute(_AUDIT, {"actor": actor, "detail": Jsonb(detail)})
    return retried


_EXPIRE = """
UPDATE webhook_deliveries SET
    status = 'dead', finished_at = now(), next_attempt_at = NULL, last_error = %(error)s
WHERE id IN (
    SELECT id FROM webhook_deliveries
    WHERE status = 'pending' AND next_attempt_at < now() - make_interval(days => %(expire)s)
    LIMIT %(rows)s
    FOR NO KEY UPDATE SKIP LOCKED
)
"""
_DELETE = """
DELETE FROM webhook_deliveries
WHERE id IN (
    SELECT d.id FROM webhook_deliveries AS d
    WHERE (d.status = 'delivered' AND d.finished_at < now() - make_interval(days => %(delivered)s))
        OR (d.status = 'dead' AND d.finished_at < now() - make_interval(days => %(dead)s))
        OR NOT EXISTS (SELECT FROM webhook_endpoints AS e WHERE e.id = d.endpoint_id)
    LIMIT %(rows)s
)
"""


def tidy(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Let messages die that wait in vain, and delete old ones and those of endpoints that were removed.

    Args:
        connection: in autocommit: each piece is a transaction.

    Returns:
        How many were declared dead, and how many deleted.
    """
    error = f"it waited for {EXPIRE_DAYS} days: its endpoint failed, or was inactive"
    values = {
        "rows": PIECE_ROWS,
        "error": error,
        "expire": EXPIRE_DAYS,
        "delivered": DELIVERED_DAYS,
        "dead": DEAD_DAYS,
    }
    changed = []
    for statement in (_EXPIRE, _DELETE):
        total, rows = 0, PIECE_ROWS
        while rows == PIECE_ROWS:
            rows = connection.execute(statement, values).rowcount
            total += rows
        changed.append(total)
    expired, deleted = changed
    return expired, deleted
