"""The broker as health checks and metrics see it: Redis here, RabbitMQ in tests/acceptance/test_rabbitmq.py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from celeryconfig import QueueNames
from tasks import broker
from tasks.app import app, use_broker
from tasks.publish import publish_queue

if TYPE_CHECKING:
    from collections.abc import Iterator

    import embedded
    from tests.integration.world import World


@pytest.fixture
def redis(servers: embedded.Servers) -> Iterator[Any]:
    """Other tests leave their messages in the same one."""
    use_broker(servers.redis_url)
    app.control.purge()
    with app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        yield channel.client
    app.control.purge()


def test_queues_are_counted_and_what_is_not_acknowledged(world: World, redis: Any) -> None:
    broker.ping()
    dead = redis.llen(QueueNames.DEAD)
    waiting = {**dict.fromkeys(QueueNames.ALL, 0), QueueNames.DEAD: dead}
    assert broker.read_queues() == broker.Queues(waiting, unacked=0)
    world.users(3)
    world.scan(batch_size=1)
    publish_queue(world.database, QueueNames.BULK, max_attempts=5)
    redis.hset("unacked", "of another program", "taken")
    try:
        assert broker.read_queues() == broker.Queues({**waiting, QueueNames.BULK: 3}, unacked=1)
    finally:
        redis.delete("unacked")


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "amqp://127.0.0.1:1//", None])
def test_a_broker_that_is_not_there_is_not_waited_for(url: str | None) -> None:
    before = app.conf.broker_url
    use_broker(url)
    try:
        for ask in (broker.ping, broker.read_queues):
            began = time.monotonic()
            with pytest.raises(Exception, match=r"refused|no broker is configured"):
                ask()
            assert time.monotonic() - began < broker.TIMEOUT_SECONDS
    finally:
        use_broker(before)
