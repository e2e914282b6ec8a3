"""The outbox: which messages are to be sent now, and what becomes of them.

    claim (a lease, committed) → send, outside of any transaction (webhook_post.py) → settle, a statement each

A row says when it is next to be tried. Whoever claims it moves that on by a lease, so that nobody else takes it, and a
sender that dies leaves it to be taken again: at least once, with the same message id. An endpoint that does not answer
is tried with one message at a time, and less and less often, and costs the others nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - the same

from psycopg.rows import class_row

if TYPE_CHECKING:
    from collections.abc import Iterable

    import psycopg

RETRY_SECONDS = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""After the first attempt, the second, …: what Standard Webhooks recommends, ten attempts within three days."""
ATTEMPTS_MAX = len(RETRY_SECONDS) + 1
JITTER = 0.2
"""Messages that failed together are not tried again together."""
RETRY_AFTER_MAX_SECONDS = 21_600
"""An endpoint that asks for more time than that is tried all the same."""

LEASE_SECONDS = 60
"""Longer than a round takes (webhook_post.py); a sender that died in it has its messages sent again after that."""
CLAIM_MAX = 100
"""Messages of one endpoint in a round."""
BACKOFF_SECONDS = 5
BACKOFF_MAX_SECONDS = 300
"""An endpoint that fails is tried after 5 s, 10 s, 20 s, …, at most five minutes."""

# An endpoint that is failing is asked with one message. Each endpoint's messages are found by the index over pending
# ones, however many others there are.
_CLAIM = """
WITH due AS (
    SELECT d.id, d.next_attempt_at, e.url, e.secret, e.format
    FROM webhook_endpoints AS e
    CROSS JOIN LATERAL (
        SELECT id, next_attempt_at FROM webhook_deliveries
        WHERE endpoint_id = e.id AND status = 'pending' AND next_attempt_at <= now()
        ORDER BY next_attempt_at
        LIMIT CASE WHEN e.failures > 0 THEN 1 ELSE %(most)s END
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS d
    WHERE e.active AND (e.resume_at <= now()) IS NOT FALSE
        AND (%(endpoint_id)s::uuid IS NULL OR e.id = %(endpoint_id)s)
)
UPDATE webhook_deliveries AS d SET
    attempts = d.attempts + 1, next_attempt_at = now() + make_interval(secs => %(lease)s)
FROM due
WHERE d.id = due.id
RETURNING d.id, d.message_id, d.endpoint_id, d.type, d.payload, d.created_at, d.attempts,
    due.next_attempt_at AS due_at, now() AS claimed_at, due.url, due.secret, due.format
"""


@dataclass(frozen=True, slots=True, repr=False)
class Message:
    """One message in the hands of whoever claimed it. It holds secrets, and so shows nothing of itself.

    Attributes:
        attempts: with this one.
        due_at: when it was to be sent.
        claimed_at: by the database's clock; what a signature carries.
    """

    id: int
    message_id: UUID
    endpoint_id: UUID
    type: str
    payload: dict[str, Any]
    created_at: datetime
    attempts: int
    due_at: datetime
    claimed_at: datetime
    url: str
    secret: str | None
    format: str


def claim(connection: psycopg.Connection[Any], *, endpoint_id: UUID | None = None) -> list[Message]:
    """Take what is due, up to `CLAIM_MAX` messages of each endpoint, for `LEASE_SECONDS`; the oldest first.

    Args:
        connection: in autocommit: nobody's transaction is open while messages are sent.
        endpoint_id: of this endpoint alone.
    """
    values = {"most": CLAIM_MAX, "lease": LEASE_SECONDS, "endpoint_id": endpoint_id}
    with connection.cursor(row_factory=class_row(Message)) as cursor:
        found = cursor.execute(_CLAIM, values).fetchall()
    return sorted(found, key=lambda message: (message.due_at, message.id))


_ANYTHING_DUE = """
SELECT EXISTS (
    SELECT FROM webhook_endpoints AS e
    WHERE e.active AND (e.resume_at <= now()) IS NOT FALSE AND (
        SELECT true FROM webhook_deliveries
        WHERE endpoint_id = e.id AND status = 'pending' AND next_attempt_at <= now()
        LIMIT 1
    )
)
"""


def anything_due(connection: psycopg.Connection[Any]) -> bool:
    """Whether there is a message that could be sent now."""
    return connection.execute(_ANYTHING_DUE).fetchone() == (True,)


# Whoever was too slow and lost the lease has delivered it all the same.
_DELIVERED = """
UPDATE webhook_deliveries SET
    status = 'delivered', finished_at = now(), next_attempt_at = NULL, last_status = %(status)s, last_error = NULL
WHERE id = %(id)s AND status = 'pending'
"""
_FAILED = """
UPDATE webhook_deliveries SET
    status = CASE WHEN %(dead)s THEN 'dead' ELSE 'pending' END,
    finished_at = CASE WHEN %(dead)s THEN now() END,
    next_attempt_at = CASE WHEN NOT %(dead)s THEN now() + make_interval(secs => %(seconds)s) END,
    last_status = %(status)s, last_error = %(error)s
WHERE id = %(id)s AND status = 'pending' AND attempts = %(attempts)s
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """How an attempt went.

    Attributes:
        status: what the endpoint answered; None: nothing.
        error: why that is a failure, for people; None: the message was taken.
        retry_after: seconds that the endpoint asked for.
        its_own: the failure is the endpoint's, and not the message's: another message would fare no better.
        gone: the endpoint says that it is gone for good.
    """

    status: int | None
    error: str | None = None
    retry_after: float = 0
    its_own: bool = False
    gone: bool = False


def record(connection: psycopg.Connection[Any], message: Message, answer: Answer) -> None:
    """Keep how an attempt went; after the last one, the message is dead.

    Args:
        connection: in autocommit.
        message: as it was claimed.
        answer: of the endpoint.
    """
    if answer.error is None:
        connection.execute(_DELIVERED, {"id": message.id, "status": answer.status})
        return
    dead = answer.gone or message.attempts >= ATTEMPTS_MAX
    seconds = 0.0 if dead else RETRY_SECONDS[message.attempts - 1] * random.uniform(1, 1 + JITTER)  # noqa: S311 - no secret
    values = {
        "id": message.id,
        "attempts": message.attempts,
        "status": answer.status,
        "error": answer.error,
        "dead": dead,
        "seconds": max(seconds, min(answer.retry_after, RETRY_AFTER_MAX_SECONDS)),
    }
    connection.execute(_FAILED, values)


_RELEASE = """
UPDATE webhook_deliveries AS d SET attempts = d.attempts - 1, next_attempt_at = c.due_at
FROM unnest(%(ids)s::bigint[], %(attempts)s::integer[], %(due_at)s::timestamptz[]) AS c (id, attempts, due_at)
WHERE d.id = c.id AND d.status = 'pending' AND d.attempts = c.attempts
"""


def release(connection: psycopg.Connection[Any], messages: Iterable[Message]) -> None:
    """Give back what was claimed and not tried: it was nobody's attempt."""
    left = list(messages)
    if left:
        values = {
            "ids": [message.id for message in left],
            "attempts": [message.attempts for message in left],
            "due_at": [message.due_at for message in left],
        }
        connection.execute(_RELEASE, values)


_HEALTHY = "UPDATE webhook_endpoints SET failures = 0, resume_at = NULL WHERE id = %(id)s AND failures > 0"
_FAILING = """
UPDATE webhook_endpoints SET
    failures = failures + 1,
    resume_at = now() + make_interval(secs => greatest(
        least(%(backoff)s * 2 ^ least(failures, 20), %(backoff_max)s), %(retry_after)s
    ))
WHERE id = %(id)s
"""
_GONE = """
WITH gone AS (
    UPDATE webhook_endpoints SET active = false, inactive_reason = %(reason)s WHERE id = %(id)s AND active RETURNING id
)
INSERT INTO credit_audit_logs (actor, action, detail)
SELECT 'webhooks', 'webhook_switched_off', jsonb_build_object('endpointId', id, 'reason', %(reason)s::text) FROM gone
"""
GONE = "it answered 410 Gone"


def record_health(
    connection: psycopg.Connection[Any], endpoint_id: UUID, *, healthy: bool, retry_after: float = 0
) -> None:
    """Keep whether an endpoint takes messages at all; while it does not, it is left alone for longer and longer."""
    values = {
        "id": endpoint_id,
        "backoff": BACKOFF_SECONDS,
        "backoff_max": BACKOFF_MAX_SECONDS,
        "retry_after": min(retry_after, RETRY_AFTER_MAX_SECONDS),
    }
    connection.execute(_HEALTHY if healthy else _FAILING, values)


def switch_off(connection: psycopg.Connection[Any], endpoint_id: UUID) -> None:
    """An endpoint has said that it is gone: nothing is written for it, or sent to it, until somebody switches it on."""
    connection.execute(_GONE, {"id": endpoint_id, "reason": GONE})
