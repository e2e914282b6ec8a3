"""Dead letters: messages that are none of ours, kept where somebody can look at them.

They lie in a queue of the broker that no worker takes from, the last `DEAD_LETTERS_MAX` of them, each with the
beginning of what it held. Nothing is owed for them: what has to be done is a row in PostgreSQL.
"""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import structlog

import logs
from celeryconfig import DEAD_LETTERS_MAX, DEAD_QUEUE, QueueNames
from tasks.app import app
from tasks.broker import is_amqp
from tasks.publish import REFUSED, messages_waiting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kombu import Connection

CONTENT_MAX_CHARACTERS = 4_096
"""Of a letter's body, and of its headers: a message may be as large as the broker admits."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.refused")


def bury(queue: str, reason: str, *, headers: object, body: object) -> None:
    """Keep a message that was refused, and say so in one line, which has nothing of what it held.

    A broker that does not take it costs the letter alone.

    Args:
        queue: where it was.
        reason: why it was refused.
        headers: its headers; None where it had none.
        body: what it held.
    """
    letter = {
        "refusedAt": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "queue": queue,
        "reason": reason,
        "headers": None if headers is None else _beginning(headers),
        "body": _beginning(body),
    }
    try:
        with app.connection_for_write() as connection:
            _keep(connection, letter)
    except REFUSED as error:
        log.error(  # noqa: TRY400 - one line, without the traceback
            f"{logs.PREFIX} Refused a message, and could not keep it", queue=queue, reason=reason, error=str(error)
        )
        return
    log.error(f"{logs.PREFIX} Refused a message: `credits dead-letters` shows it", queue=queue, reason=reason)


def waiting() -> int:
    """How many there are."""
    return messages_waiting(QueueNames.DEAD)


def letters() -> list[dict[str, Any]]:
    """All of them, the oldest first; they stay where they are."""
    if not waiting():
        return []
    with app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        if is_amqp(connection):
            # Not acknowledged, they are in their places again once the connection is closed.
            return [_letter(message.body) for message in islice(_taken(channel), DEAD_LETTERS_MAX)]
        return [_letter(_unpacked(raw)) for raw in reversed(channel.client.lrange(QueueNames.DEAD, 0, -1))]


def drop() -> int:
    """Delete all of them; returns how many there were."""
    if not waiting():
        return 0
    with app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        return int(channel.queue_purge(QueueNames.DEAD))


def _keep(connection: Connection, letter: dict[str, str | None]) -> None:
    producer: Any = connection.Producer(serializer="json")
    producer.publish(letter, routing_key=QueueNames.DEAD, declare=[DEAD_QUEUE])
    if not is_amqp(connection):  # RabbitMQ's queue says itself how long it may be
        producer.channel.client.ltrim(QueueNames.DEAD, 0, DEAD_LETTERS_MAX - 1)


def _taken(channel: Any) -> Iterator[Any]:
    queue: Any = DEAD_QUEUE(channel)
    while (message := queue.get(no_ack=False)) is not None:
        yield message


def _unpacked(raw: bytes) -> bytes:
    """What kombu has put into a message on Redis; all of it, where somebody else has."""
    try:
        return base64.b64decode(json.loads(raw)["body"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return raw


def _letter(body: bytes) -> dict[str, Any]:
    try:
        letter = json.loads(body)
    except (ValueError, RecursionError):
        letter = None
    if isinstance(letter, dict) and letter.keys() == {"refusedAt", "queue", "reason", "headers", "body"}:
        return letter
    foreign = "was put among the dead letters by somebody else"
    return {"refusedAt": None, "queue": QueueNames.DEAD, "reason": foreign, "headers": None, "body": _beginning(body)}


def _beginning(content: object) -> str:
    if isinstance(content, bytes):
        content = content[:CONTENT_MAX_CHARACTERS].decode(errors="backslashreplace")
    text = content if isinstance(content, str) else repr(content)
    return text[:CONTENT_MAX_CHARACTERS]
