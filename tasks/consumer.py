"""The worker's consumer: what is not a message of ours is refused and kept, and never ends a worker.

Celery's own logs the whole message with a traceback and drops it; and what kombu cannot unpack ends the process
(`worker_consumer` in celeryconfig.py names this one).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NoReturn

from celery.worker.consumer import Consumer as CeleryConsumer
from kombu import compression
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from celeryconfig import TaskNames
from tasks.dead_letters import bury

if TYPE_CHECKING:
    from collections.abc import Callable

    from kombu.message import Message

log = logging.getLogger("credits.refused")


def _refuse_compressed(_body: object) -> NoReturn:
    raise ValueError("no message of ours is compressed")


# A kilobyte may unpack to gigabytes, and kombu unpacks it before anybody can look at it.
for _method in compression.encoders():
    compression.register(_refuse_compressed, _refuse_compressed, _method)


class Consumer(CeleryConsumer):
    """Celery's, which hands on to the tasks what they understand, and buries everything else."""

    # Celery's own; its type stubs do not know them.
    connection_errors: tuple[type[BaseException], ...]
    channel_errors: tuple[type[BaseException], ...]
    task_consumer: Any

    def create_task_handler(self, *arguments: Any) -> Callable[[Message], object]:
        """What is done with a message; made anew for each connection to the broker."""
        receive = super().create_task_handler(*arguments)
        broker_errors = self.connection_errors + self.channel_errors
        _guard_redis(self.task_consumer.channel)

        def receive_ours(message: Message) -> None:
            try:
                reason = _unfit(message)
                if reason is None:
                    receive(message)
                    return
            except broker_errors:
                raise
            except Exception as error:  # noqa: BLE001 - nothing that a message holds may end a worker
                reason = _undecodable(error)
            self._refuse(message, reason)

        return receive_ours

    def on_unknown_message(self, body: object, message: Message) -> None:
        """It names no task."""
        del body
        self._refuse(message, "names no task")

    def on_unknown_task(self, body: object, message: Message, exc: Exception) -> None:
        """It names a task that is not ours."""
        del body, exc
        self._refuse(message, "names a task that is not ours")

    def on_invalid_task(self, body: object, message: Message, exc: Exception) -> None:
        """Celery does not find in it what a task needs."""
        del body
        self._refuse(message, _undecodable(exc))

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """It cannot be decoded."""
        self._refuse(message, _undecodable(exc))

    def _refuse(self, message: Message, reason: str) -> None:
        bury(_queue(message), reason, headers=message.headers, body=message.body)
        if not message.acknowledged:
            message.reject_log_error(log, self.connection_errors)


def _unfit(message: Message) -> str | None:
    """Why the task that a message names cannot be called with it; None: it can, or there is no such task."""
    name = message.headers.get("task")
    if not isinstance(name, str):
        return "names no task"
    if name not in TaskNames.ALL:
        return "names a task that is not ours"
    arguments, keywords, embedded = message.payload
    if not _are_arguments(name, arguments) or keywords != {}:
        return "has other arguments than the task takes"
    # A task that sets off others, now or later, is nothing that we publish.
    if any(embedded.values()) or message.headers.get("eta") or message.headers.get("expires"):
        return "asks for more than its task"
    return None


def _are_arguments(name: str, arguments: object) -> bool:
    if name != TaskNames.BATCH:
        return arguments == []
    # Exactly: to Python, true is an integer.
    return (
        isinstance(arguments, list)
        and len(arguments) == 1
        and isinstance(arguments[0], list)
        and all(type(batch_id) is int for batch_id in arguments[0])
    )


def _undecodable(error: Exception) -> str:
    """By the name of the error alone: its text repeats what the message holds."""
    return f"cannot be read ({type(error).__name__})"


def _queue(message: Message) -> str:
    info = message.delivery_info
    return str(info.get("routing_key")) if isinstance(info, dict) else "unknown"


def _guard_redis(channel: Any) -> None:
    """Look at what comes out of a list before kombu unpacks it there and then, with nobody to catch what it raises.

    Whoever speaks AMQP gets messages that are messages.
    """
    client = getattr(channel, "client", None)
    if client is None:
        return
    given = client.response_callbacks.get("BRPOP", lambda response: response)

    def only_messages(response: Any, **options: Any) -> Any:
        popped = given(response, **options)
        if popped:
            queue, raw = popped
            try:
                # As kombu does it a moment later.
                message = channel.Message(loads(bytes_to_str(raw)), channel=channel)
                hash(message.delivery_tag)
            except Exception as error:  # noqa: BLE001 - whatever kombu would have raised
                bury(queue.decode(errors="backslashreplace"), _undecodable(error), headers=None, body=raw)
                return None  # as when the list is empty
        return popped

    client.set_response_callback("BRPOP", only_messages)
