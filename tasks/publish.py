"""Publishing: ring the doorbell for batches whose rows are committed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

import logs
from celeryconfig import QueueNames, TaskNames
from refresh import delivery
from tasks.app import app
from tasks.broker import is_amqp, queue_length

if TYPE_CHECKING:
    from uuid import UUID

    from kombu import Connection

    from db import Database

# What a broker that is gone, full or slow raises: kombu wraps some of it and passes on the rest.
REFUSED = (KombuError, AMQPError, RedisError, OSError)

MESSAGES_AT_ONCE = 20
"""Messages that go to the broker together; workers begin with these while the next are made."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.publish")


def publish_asked(database: Database, run_id: UUID, *, max_attempts: int) -> int:
    """Publish a run that somebody asked for; see `publish_queue()`."""
    return publish_queue(database, QueueNames.BULK, max_attempts=max_attempts, run_id=run_id)


def publish_queue(
    database: Database, queue: str, *, max_attempts: int, run_id: UUID | None = None, ring_again: bool = False
) -> int:
    """Claim what has to be published, commit, then publish in bulk.

    While the queue is deep, the rest waits for upkeep. A broker that does not answer costs a delay and nothing else:
    the claim is taken back, and the next upkeep tries again. A publish whose outcome is unknown may ring twice; the
    batch row admits one.

    Args:
        database: where the batches are.
        queue: of beat's runs, or of those that somebody asked for.
        max_attempts: `CREDIT_REFRESH_MAX_ATTEMPTS`.
        run_id: a run that was just opened; None: whatever upkeep finds.
        ring_again: whether to publish again what may still wait in a queue that is short.

    Returns:
        The number of batches published.
    """
    claim = delivery.Claim(
        scheduled=queue == QueueNames.BATCHES, max_attempts=max_attempts, run_id=run_id, ring_again=ring_again
    )
    published = 0
    batch_ids: list[int] = []
    try:
        with app.connection_for_write() as broker:
            room = delivery.QUEUE_DEEP_MESSAGES - queue_length(broker, queue)
            for paced in (False, True):  # the quick ones first
                ids_max = delivery.message_ids_max(paced=paced)
                more = True
                while more and room > 0:
                    limit = min(delivery.CLAIM_LIMIT, room * ids_max)
                    batch_ids = _claim(database, replace(claim, paced=paced, limit=limit))
                    more = len(batch_ids) == limit
                    if batch_ids:
                        room -= _send(broker, queue, delivery.messages(batch_ids, paced=paced))
                        published += len(batch_ids)
    except REFUSED as error:
        log.warning(f"{logs.PREFIX} The broker did not take the batches; upkeep publishes them", error=str(error))
        with database.transaction() as connection:
            delivery.unclaim_batches(connection, batch_ids)
    return published


def _claim(database: Database, claim: delivery.Claim) -> list[int]:
    with database.transaction() as connection:
        return delivery.claim_batches(connection, claim)


def _send(broker: Connection, queue: str, messages: list[list[int]]) -> int:
    task: Any = app.tasks[TaskNames.BATCH]  # its type stubs know few of Celery's options
    producers: Any = app.amqp  # the type stubs do not know batch(), new in kombu 5.7
    with producers.Producer(broker) as producer, producer.batch(MESSAGES_AT_ONCE):
        amqp = is_amqp(broker)
        try:
            producer.maybe_declare(app.amqp.queues[queue])
            # Without these, Celery declares the queue again for each message, and looks for the arguments' text for
            # Flower in a general way: two fifths of what a message costs here.
            quick: dict[str, Any] = {"declare": (), "kwargsrepr": "{}"}
            for ids in messages:
                task.apply_async((ids,), queue=queue, producer=producer, argsrepr=str((ids,)), **quick)
            if amqp:
                # It answers what comes after the messages once it has read them; blocked, it says that instead.
                producer.channel.queue_declare(queue, passive=True)
        except REFUSED:
            if amqp:
                broker.collect()  # a blocked connection would wait for ever for its close to be answered
            raise
    return len(messages)


def messages_waiting(queue: str) -> int:
    """Messages in a queue that no worker has taken."""
    with app.connection_for_write() as broker:
        return queue_length(broker, queue)
