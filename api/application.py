"""The application: its routes, what every request passes through, and what it shares."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio.to_thread
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi.routing import APIRoute

import logs
import settings
from api import docs_page, problems
from api.access_log import AccessLog
from api.body_limit import BodyLimit
from api.document import Documented
from api.limits import Limiter
from api.routes import bulk, health, me, reports, reset, run_actions, runs, stripe, users, webhooks
from api.tokens import Tokens
from db import CONNECTIONS_MAX, Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

DESCRIPTION = """
Gives every user their periodic credits, exactly once per window.

**Who may what.** `Authorization: Bearer …` with the admin token, an API key (`credits keys create`), or a user's own
token, which is for `/api/user` alone. **Credits** are exact: JSON numbers up to 9,007,199,254,740,991, and decimal
strings beyond, which JavaScript cannot hold as numbers. **Errors** are `application/problem+json` (RFC 9457), each
`type` explained under the address that it names. **Idempotency-Key** makes a POST that moves credits safe to repeat.
"""

BODY_BYTES_MAX = 2**20
"""Of a request's body; a bulk refresh that names users takes more."""

THREADS = CONNECTIONS_MAX
"""Requests that wait for the database at once, each with a connection."""


def create_app(config: settings.Settings) -> FastAPI:
    """The application on given settings.

    Args:
        config: with a `database_url`; routes whose secret is not set are closed.
    """
    assert config.database_url is not None  # noqa: S101 - from_environment() has seen to it
    database = Database(config.database_url, config.database_schema, name="credits-api", pool=THREADS)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        database.close()

    app = Documented(
        title="Credit refresh",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.config = config
    app.state.database = database
    app.state.tokens = Tokens(config)
    app.state.limiter = Limiter(config.api_rate_limit, config.broker_url)
    for guarded in (users, bulk, reports, runs, run_actions, reset, me, webhooks):
        app.include_router(guarded.router, responses=problems.GUARDED)
    for other in (stripe, health, problems, docs_page):
        app.include_router(other.router)
    problems.install(app)
    app.add_middleware(BodyLimit, bytes_max=BODY_BYTES_MAX, more={bulk.PATH: bulk.BODY_BYTES_MAX})
    app.add_middleware(AccessLog)
    # The outermost: whatever is logged or answered inside carries the id.
    app.add_middleware(CorrelationIdMiddleware, header_name="X-Correlation-ID", validator=_is_correlation_id)
    return app


def from_environment() -> FastAPI:
    """The application on the environment's settings.

    Raises:
        SystemExit: a setting is bad or missing; the text is one line for people.
    """
    try:
        config = settings.load()
    except settings.SettingsError as error:
        raise SystemExit(f"credits: {error}") from None
    if config.database_url is None:
        raise SystemExit("credits: DATABASE_URL is not set: set it, or let `credits up` start everything with servers.")
    logs.configure(config.log_level, config.log_format)
    return create_app(config)


def _operation_id(route: APIRoute) -> str:
    first, *rest = route.name.strip("_").split("_")
    return first + "".join(map(str.capitalize, rest))


def _is_correlation_id(value: str) -> bool:
    return 0 < len(value) <= 128 and value.isascii() and value.isprintable()  # noqa: PLR2004 - ample for any tracer's
