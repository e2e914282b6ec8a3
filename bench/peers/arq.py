"""arq: coroutines on its sorted set in Redis, without results."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from arq import create_pool, run_worker
from arq.connections import RedisSettings

from bench.peers import work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

JOBS_AT_ONCE = 20
"""Started at a look into the queue; more than there are connections, so that none of them waits for the next look."""
PUBLISHED_AT_ONCE = 50
"""Each holds a connection meanwhile, and the client's pool ends at a hundred."""


async def connect(context: dict[str, Any]) -> None:
    """As a worker process starts."""
    context["refresh"] = await work.connect_async()


async def refresh(context: dict[str, Any], batch_ids: list[int]) -> None:
    """A message."""
    await context["refresh"](batch_ids)


class WorkerSettings:
    """What `arq` reads."""

    functions = (refresh,)
    on_startup = connect
    redis_settings = RedisSettings.from_dsn(work.redis_url())
    keep_result = 0
    max_jobs = JOBS_AT_ONCE
    poll_delay = 0.01  # seconds; by default 0.5


@contextmanager
def publisher() -> Iterator[Callable[[list[list[int]]], None]]:
    """It has no way of publishing in bulk: one by one, several at once."""
    with asyncio.Runner() as runner:
        pool = runner.run(create_pool(WorkerSettings.redis_settings))

        async def publish(messages: list[list[int]]) -> None:
            for first in range(0, len(messages), PUBLISHED_AT_ONCE):
                together = messages[first : first + PUBLISHED_AT_ONCE]
                await asyncio.gather(*(pool.enqueue_job("refresh", batch_ids) for batch_ids in together))

        yield lambda messages: runner.run(publish(messages))
        runner.run(pool.aclose())


if __name__ == "__main__":
    # Not by its command, which would log two lines for each job.
    run_worker(WorkerSettings)
