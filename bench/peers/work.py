"""What a worker of every peer does with a message: the product's own batch statement, on connections that are kept.

Peers are spared what our own worker does besides: asking which of a message's batches are pending, and whether the
run has ended.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psycopg

import settings
from bench.worlds import libpq_url
from db import Database
from refresh.batch import GRANT_MANY
from refresh.closing import DEFERRED_BACKOFF_SECONDS, FEW_USERS, close_batch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

NAME = "peer"
"""What `pg_stat_activity` shows of a worker's connections."""

CONNECTIONS_VARIABLE = "PEER_CONNECTIONS"
CONNECTIONS = int(settings.environment().get(CONNECTIONS_VARIABLE, "2"))
"""Of a worker process, where it can do several messages at a time."""

_OPTIONS = "-c search_path=credits -c timezone=UTC -c jit=off"  # as db.py sets them
_kept = threading.local()
_open = ExitStack()


def database_url() -> str:
    """SQLAlchemy's URL of the database."""
    return settings.load().database_url or ""


def redis_url() -> str:
    """The broker's URL as redis-py reads it, which knows sockets by another name than kombu."""
    url = settings.load().redis_url or ""
    return url.replace("redis+socket://", "unix://").replace("virtual_host=", "db=")


def connect() -> None:
    """Open this thread's connection."""
    _kept.connection = _open.enter_context(Database(database_url(), "credits", name=NAME).statements())


def refresh_batches(batch_ids: list[int]) -> None:
    """Refresh batches, each in a transaction of its own, on this thread's connection."""
    for batch_id in batch_ids:
        close_batch(_kept.connection, batch_id, GRANT_MANY)


async def connect_async() -> Callable[[list[int]], Awaitable[None]]:
    """Open `CONNECTIONS` for an event loop; returns what refreshes batches on whichever is free."""
    free: asyncio.Queue[psycopg.AsyncConnection] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        connection = await psycopg.AsyncConnection.connect(
            libpq_url(database_url()), autocommit=True, options=_OPTIONS, application_name=NAME
        )
        free.put_nowait(connection)

    async def refresh(batch_ids: list[int]) -> None:
        connection = await free.get()
        try:
            for batch_id in batch_ids:
                values = {"batch_id": batch_id, "backoff_seconds": DEFERRED_BACKOFF_SECONDS, "few": FEW_USERS}
                await (await connection.execute(GRANT_MANY, values, prepare=True)).fetchone()
        finally:
            free.put_nowait(connection)

    return refresh
