"""Dramatiq: actors on its Redis broker."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import Middleware

from bench.peers import work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Connect(Middleware):
    """Gives each worker thread its connection."""

    def after_worker_thread_boot(self, _broker: RedisBroker, _thread: object) -> None:
        """Called in the thread."""
        work.connect()


broker = RedisBroker(url=work.redis_url())
broker.add_middleware(Connect())
dramatiq.set_broker(broker)


@dramatiq.actor
def refresh(batch_ids: list[int]) -> None:
    """A message."""
    work.refresh_batches(batch_ids)


@contextmanager
def publisher() -> Iterator[Callable[[list[list[int]]], None]]:
    """It publishes one by one: neither `group` nor the broker know another way."""
    broker.client.ping()

    def publish(messages: list[list[int]]) -> None:
        for batch_ids in messages:
            refresh.send(batch_ids)

    yield publish
