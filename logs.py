"""Structured logs on stderr: one line an event, with the run's id where there is a run.

The texts that begin with `[CreditRefresh]` are those that operators of the first deployment look for.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from structlog.typing import Processor

PREFIX = "[CreditRefresh]"


def configure(level: str, log_format: str) -> None:
    """Send the records of the standard library and of structlog the same way.

    Args:
        level: `LOG_LEVEL`.
        log_format: `json` for machines, `console` for people.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Two lines for each message that say nothing our own do not; at 600 messages a second they cost a tenth. And
    # an HTTP client that logs whole addresses, of which a chat's is a secret.
    for chatty in ("celery.app.trace", "celery.worker.strategy", "httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
