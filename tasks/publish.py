"""Publishing: ring the doorbell for batches whose rows are committed."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import structlog
from amqp.exceptions import ChannelError
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

import logs
from celeryconfig import QueueNames, TaskNames
from refresh import delivery
from tasks.app import app

if TYPE_CHECKING:
    from uuid import UUID

    from db import Database

# What a broker that is gone, full or slow raises: kombu wraps some of it and passes on the rest.
_REFUSED = (KombuError, RedisError, OSError)

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.publish")


def publish_batches(
    database: Database, *, max_attempts: int, run_id: UUID | None = None, ring_again: bool = False
) -> int:
    """Claim what has to be published, commit, then publish in bulk.

    A broker that does not answer costs a delay and nothing else: the claim is taken back, and the next upkeep tries
    again. A publish whose outcome is unknown may ring twice; the batch row admits one.

    Args:
        database: where the batches are.
        max_attempts: `CREDIT_REFRESH_MAX_ATTEMPTS`.
        run_id: a run that was just opened; None: whatever upkeep finds.
        ring_again: whether to publish again what may still wait in a queue that is short.

    Returns:
        The number of batches published.
    """
    published = 0
    while batch_ids := _claim(database, max_attempts=max_attempts, run_id=run_id, ring_again=ring_again):
        try:
            _send(batch_ids)
        except _REFUSED as error:
            log.warning(f"{logs.PREFIX} The broker did not take the batches; upkeep publishes them", error=str(error))
            with database.transaction() as connection:
                delivery.unclaim_batches(connection, batch_ids)
            break
        published += len(batch_ids)
    return published


def _claim(database: Database, *, max_attempts: int, run_id: UUID | None, ring_again: bool) -> list[int]:
    with database.transaction() as connection:
        return delivery.claim_batches(connection, max_attempts=max_attempts, run_id=run_id, ring_again=ring_again)


def _send(batch_ids: list[int]) -> None:
    task = app.tasks[TaskNames.BATCH]
    producers: Any = app.amqp  # the type stubs do not know batch(), new in kombu 5.7
    with app.connection_for_write() as broker, producers.Producer(broker) as producer, producer.batch():
        for ids in delivery.messages(batch_ids):
            task.apply_async((ids,), producer=producer)


def batches_waiting() -> int:
    """Messages in the batches queue that no worker has taken."""
    with app.connection_for_write() as broker:
        channel: Any = broker.default_channel
        try:
            return int(channel.queue_declare(QueueNames.BATCHES, passive=True).message_count)
        except ChannelError as error:
            # Redis knows no empty list. Any other answer is not a length, and must not pass for an empty queue.
            if int(error.reply_code or 0) != HTTPStatus.NOT_FOUND:
                raise
            return 0
