"""taskiq: the list broker of taskiq-redis, without acknowledgements and without results."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from taskiq import TaskiqEvents, TaskiqState
from taskiq_redis import ListQueueBroker

from bench.peers import work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PUBLISHING_CONNECTIONS = 10

# redis-py 8 ends a read after 5 seconds by default, and with it a worker that waits that long for its first message.
broker = ListQueueBroker(work.redis_url(), max_connection_pool_size=PUBLISHING_CONNECTIONS, socket_timeout=None)


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def connect(state: TaskiqState) -> None:
    """As a worker process starts."""
    state.refresh = await work.connect_async()


@broker.task
async def refresh(batch_ids: list[int]) -> None:
    """A message."""
    await broker.state.refresh(batch_ids)


@contextmanager
def publisher() -> Iterator[Callable[[list[list[int]]], None]]:
    """It has no way of publishing in bulk: one by one, several at once."""
    with asyncio.Runner() as runner:
        runner.run(broker.startup())

        async def publish(messages: list[list[int]]) -> None:
            await asyncio.gather(*(refresh.kiq(batch_ids) for batch_ids in messages))

        yield lambda messages: runner.run(publish(messages))
        runner.run(broker.shutdown())
