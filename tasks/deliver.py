"""The task that tells webhook endpoints: a round over the outbox, and another message where more is due."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import structlog

import logs
from celeryconfig import QueueNames, TaskNames
from refresh.webhook_outbox import anything_due
from tasks.app import app, config, database
from tasks.publish import REFUSED, messages_waiting

if TYPE_CHECKING:
    import psycopg

    from refresh.webhook_post import Sender

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.webhooks")


@app.task(name=TaskNames.DELIVER)
def deliver() -> None:
    """Send what is due, for 25 s at most; then it is the next one's turn."""
    # Imported by whoever sends: an HTTP client and its certificates are nothing that a batch needs.
    from refresh.webhook_post import deliver_round  # noqa: PLC0415

    with database().statements() as connection:
        done = deliver_round(connection, _sender())
        for endpoint_id in done.switched_off:
            log.error(f"{logs.PREFIX} A webhook endpoint was switched off: it says that it is gone", id=endpoint_id)
        if done.tried:
            say = log.warning if done.counts["failed"] else log.info
            say(f"{logs.PREFIX} Webhooks sent", **{name.replace(" ", "_"): n for name, n in done.counts.items()})
            ring_for_webhooks(connection)


@cache
def _sender() -> Sender:
    from refresh.webhook_post import Sender  # noqa: PLC0415

    return Sender(allow_private=config.webhooks_allow_private)


def ring_for_webhooks(connection: psycopg.Connection[Any]) -> None:
    """Publish a message where something is due; upkeep comes by every minute, so a broker that refuses costs that.

    One message is enough, however much is due and however many ask: nobody may take them for days.
    """
    try:
        if anything_due(connection) and messages_waiting(QueueNames.WEBHOOKS) == 0:
            deliver.delay()
    except REFUSED as error:
        log.warning(f"{logs.PREFIX} The broker did not take the webhooks' message; upkeep rings", error=str(error))
