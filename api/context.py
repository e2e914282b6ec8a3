"""What endpoints are given: the settings, the database, and who asks."""

from __future__ import annotations

from typing import Annotated

from asgi_correlation_id import correlation_id
from fastapi import Depends, Request

from db import Database
from settings import Settings


# Coroutines, though they wait for nothing: a plain function would be given a thread each time.
async def _config(request: Request) -> Settings:
    config: Settings = request.app.state.config
    return config


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


Config = Annotated[Settings, Depends(_config)]
Db = Annotated[Database, Depends(_database)]


def this_request() -> str | None:
    """The request's correlation id."""
    return correlation_id.get()
