"""One line for each request, and the request's correlation id for every line that is logged meanwhile.

What nobody has foreseen is answered here: further out, an answer would not carry the id.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog
from asgi_correlation_id import correlation_id
from fastapi import Request

from api.problems import defect

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.api")


class AccessLog:
    """The path alone, without its query, and no header: nothing that could be a secret."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; say how it was answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with structlog.contextvars.bound_contextvars(correlation_id=correlation_id.get()):
            try:
                await self._app(scope, receive, note_status)
            except Exception as error:
                if status:  # the answer had begun
                    raise
                await defect(Request(scope), error)(scope, receive, note_status)
            finally:
                log.info(
                    "Request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    ms=round((time.perf_counter() - began) * 1000, 1),
                )
