"""RQ: `SimpleWorker`, which its documentation recommends for jobs of milliseconds; no fork per job."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from redis import Redis
from rq import Queue, SimpleWorker

from bench.peers import work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

queue = Queue(connection=Redis.from_url(work.redis_url()))


@contextmanager
def publisher() -> Iterator[Callable[[list[list[int]]], None]]:
    """`enqueue_many`: all jobs in one pipeline. `result_ttl=0` keeps no results."""
    queue.connection.ping()

    def publish(messages: list[list[int]]) -> None:
        queue.enqueue_many(
            [Queue.prepare_data(work.refresh_batches, (batch_ids,), result_ttl=0) for batch_ids in messages]
        )

    yield publish


if __name__ == "__main__":
    work.connect()
    SimpleWorker([queue], connection=queue.connection, log_job_description=False).work(logging_level="WARNING")
