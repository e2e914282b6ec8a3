"""Procrastinate: jobs in tables of the same PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from procrastinate import App, JobContext, PsycopgConnector

from bench.peers import work
from bench.worlds import libpq_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

app = App(connector=PsycopgConnector(conninfo=libpq_url(work.database_url())))


@app.task(name="refresh", pass_context=True)
async def refresh(context: JobContext, batch_ids: list[int]) -> None:
    """A job."""
    await context.additional_context["refresh"](batch_ids)


@contextmanager
def publisher() -> Iterator[Callable[[list[list[int]]], None]]:
    """All jobs in one statement."""
    with app.open():
        yield lambda messages: refresh.batch_defer(*({"batch_ids": batch_ids} for batch_ids in messages))


async def main() -> None:
    """A worker process."""
    async with app.open_async():
        context = {"refresh": await work.connect_async()}
        await app.run_worker_async(concurrency=work.CONNECTIONS, delete_jobs="successful", additional_context=context)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main())
