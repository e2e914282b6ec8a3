"""How much a request may send: a body is read before anybody knows whose it is."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """The framework's own answers in plain text, past the correlation id; this one raises where the body is read.

    Args:
        app: what is inside.
        bytes_max: of a body.
        more: for paths that take more.
    """

    def __init__(self, app: ASGIApp, bytes_max: int, more: Mapping[str, int]) -> None:
        self._app = app
        self._bytes_max = bytes_max
        self._more = more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; its body ends with an error when there is too much of it."""
        bytes_max = self._more.get(scope.get("path", ""), self._bytes_max)
        came = 0

        async def receive_so_much() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > bytes_max:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return message

        await self._app(scope, receive_so_much, send)
