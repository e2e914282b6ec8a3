"""What the routes that open a run have in common: who asks, the first answer, and the workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import psycopg

from api.context import this_request
from api.keys import accepted, claim, replayed
from api.problems import not_opened
from refresh import replay, runs
from refresh.run_list import read_line
from tasks.publish import publish_asked

if TYPE_CHECKING:
    from fastapi import Response

    from api.callers import Caller
    from db import Database
    from settings import Settings

Opens = Callable[[psycopg.Connection[Any]], runs.Opened | runs.NotOpened]


def request_of(
    config: Settings, caller: Caller, *, source: Literal["api", "cron"] = "api", **asked: Any
) -> runs.Request:
    """A run's request, with everything that follows from who asks and how.

    Raises:
        Problem: this process may not grant anything.
    """
    if not config.credit_refresh_enabled:
        raise not_opened(runs.NotOpened("disabled"))
    asked["dry_run"] = asked.get("dry_run", False) or config.credit_refresh_dry_run
    size = config.credit_refresh_batch_size
    return runs.Request(source, caller.name, size, correlation_id=this_request(), **asked)


def open_and_publish(  # noqa: PLR0913 - the request, its answer, and what is between them
    database: Database,
    config: Settings,
    key: str | None,
    opens: Opens,
    response: Response,
    *,
    also: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Open a run, keep the answer with it in one transaction, publish it.

    Args:
        database: where it is.
        config: the settings.
        key: of the request.
        opens: opens it, in the transaction.
        response: gets the headers.
        also: what the answer says besides, as `opens` leaves it.

    Raises:
        Problem: nothing is granted at present, or somebody is at work on the key.
        RefusedError: what `opens` raises.
    """
    with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        claim(connection, key)
        run = opens(connection)
        if isinstance(run, runs.NotOpened):
            raise not_opened(run)
        accepted(response, run)
        if run.existing and (kept := replayed(connection, run.run_id, response)):
            return kept
        answer = {**read_line(connection, run.run_id).facts(), "existing": run.existing, **(also or {})}
        answer = replay.keep_answer(connection, run.run_id, answer)
    if not run.existing:
        publish_asked(database, run.run_id, max_attempts=config.credit_refresh_max_attempts)
    return answer
