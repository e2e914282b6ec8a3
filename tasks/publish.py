"""Publishing: ring the doorbell for batches whose rows are committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

import logs
from celeryconfig import QueueNames, TaskNames
from refresh import delivery
from tasks.app import app

if TYPE_CHECKING:
    from uuid import UUID

    from kombu import Connection

    from db import Database

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.publish")


def publish_batches(database: Database, *, max_attempts: int, run_id: UUID | None = None) -> int:
    """Claim what has to be published, commit, then publish in bulk.

    A broker that does not answer costs a delay and nothing else: the claim is taken back, and the next upkeep tries
    again. A publish whose outcome is unknown may ring twice; the batch row admits one.

    Args:
        database: where the batches are.
        max_attempts: `CREDIT_REFRESH_MAX_ATTEMPTS`.
        run_id: a run that was just opened; None: whatever upkeep finds.

    Returns:
        The number of batches published.
    """
    with database.transaction() as connection:
        batch_ids = delivery.claim_batches(connection, max_attempts=max_attempts, run_id=run_id)
    if not batch_ids:
        return 0
    with app.connection_for_write() as broker:
        try:
            _send(broker, batch_ids)
        except broker.connection_errors + broker.channel_errors as error:
            log.warning(f"{logs.PREFIX} The broker did not take the batches; upkeep publishes them", error=str(error))
            with database.transaction() as connection:
                delivery.unclaim_batches(connection, batch_ids)
            return 0
    return len(batch_ids)


def _send(broker: Connection, batch_ids: list[int]) -> None:
    task = app.tasks[TaskNames.BATCH]
    producers: Any = app.amqp  # the type stubs do not know batch(), new in kombu 5.7
    with producers.Producer(broker) as producer, producer.batch():
        for ids in delivery.messages(batch_ids):
            task.apply_async((ids,), producer=producer)


def batches_waiting() -> int:
    """Messages in the batches queue that no worker has taken."""
    with app.connection_for_write() as broker:
        channel: Any = broker.default_channel
        try:
            return int(channel.queue_declare(QueueNames.BATCHES, passive=True).message_count)
        except broker.channel_errors:
            return 0  # Redis knows no empty list
