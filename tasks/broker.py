"""The broker as it looks from outside, for health checks and metrics: does it answer, and what waits in it?"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from amqp.exceptions import ChannelError

from celeryconfig import QueueNames
from tasks.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kombu import Connection

TIMEOUT_SECONDS = 1.5
"""Of each step: whoever asks for health waits for two seconds in all."""


@dataclass(frozen=True, slots=True)
class Queues:
    """What lies in the broker.

    Attributes:
        waiting: messages that no worker has taken, by queue; the dead letters among them.
        unacked: messages that were taken and not acknowledged, as Redis has them; None: RabbitMQ does not say.
    """

    waiting: dict[str, int]
    unacked: int | None


def ping() -> None:
    """Make sure that the broker answers, without waiting for it to come back.

    Raises:
        Exception: it does not; what kombu and its libraries raise then has no common base.
    """
    with _briefly() as connection:
        channel: Any = connection.default_channel
        if not is_amqp(connection):
            channel.client.ping()


def read_queues() -> Queues:
    """How much waits.

    Raises:
        Exception: as `ping()`.
    """
    with _briefly() as connection:
        waiting = {name: queue_length(connection, name) for name in (*QueueNames.ALL, QueueNames.DEAD)}
        channel: Any = connection.default_channel
        unacked = None if is_amqp(connection) else int(channel.client.hlen(channel.unacked_key))
        return Queues(waiting, unacked)


def queue_length(connection: Connection, queue: str) -> int:
    """Messages in a queue that no worker has taken."""
    channel: Any = connection.default_channel
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except ChannelError as error:
        # Redis knows no empty list, RabbitMQ no queue before its first use. Any other answer is not a length, and
        # must not pass for an empty queue.
        if int(error.reply_code or 0) != HTTPStatus.NOT_FOUND:
            raise
        return 0


def is_amqp(connection: Connection) -> bool:
    """Whether it is RabbitMQ, rather than Redis."""
    return bool(connection.transport.driver_type == "amqp")


@contextmanager
def _briefly() -> Iterator[Connection]:
    url = app.conf.broker_write_url
    if url is None:
        raise ConnectionError("no broker is configured: set REDIS_URL")
    timeouts = ("socket_timeout", "socket_connect_timeout")
    if url.startswith("amqp"):
        timeouts = ("read_timeout", "write_timeout")
    options = dict.fromkeys(timeouts, TIMEOUT_SECONDS)
    kombu: Any = app  # its type stubs know few of the options
    with kombu.connection_for_write(connect_timeout=TIMEOUT_SECONDS, transport_options=options) as connection:
        connection.ensure_connection(max_retries=0, reraise_as_library_errors=False)
        yield connection
