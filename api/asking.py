"""Questions to servers that may hang, answered in time whatever they do."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog

from db import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = TypeVar("Answer")

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.api")


class Asker(Generic[Answer]):
    """Asks in a thread of its own, one question at a time: whoever asks meanwhile gets the same answer.

    So a server that hangs holds up this thread, and none of those that requests need, however often it is asked.

    Args:
        what: is asked, for the log.
        question: raises whatever it likes where there is no answer.
    """

    def __init__(self, what: str, question: Callable[[], Answer]) -> None:
        self._what = what
        self._question = question
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"asks-{what}")
        self._asked: Future[Answer | None] | None = None

    async def answer(self, seconds: float) -> Answer | None:
        """What the server says; None when it says nothing, or not in that time."""
        if self._asked is None or self._asked.done():
            self._asked = self._thread.submit(self._ask)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._asked), seconds)
        except TimeoutError:
            log.warning("There is no answer in time", asked=self._what, seconds=seconds)
            return None

    def _ask(self) -> Answer | None:
        try:
            return self._question()
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no answer
            log.warning("There is no answer", asked=self._what, error=one_line(error))
            return None

    def close(self) -> None:
        """Ask no more; what is asked already ends by its own timeouts."""
        self._thread.shutdown(wait=False, cancel_futures=True)
