"""The runs there are and were, and one run's progress as it happens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import anyio
import psycopg
import structlog
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api import answers
from api.callers import Reader
from api.context import Db
from api.examples import EVENTS_EXAMPLE
from api.problems import documented
from api.schema import Moment
from db import DatabaseError, one_line
from refresh.run_detail import read_run
from refresh.run_list import Wanted, list_runs, read_line

if TYPE_CHECKING:
    from refresh.run_list import RunLine

router = APIRouter(prefix="/api/admin/runs", tags=["runs"])

PAGE = 20
PAGE_MAX = 200
FAILURES_SHOWN = 100
POLL_SECONDS = 0.5
RECONNECT_MS = 1_000

RunId = Annotated[UUID, Path(alias="runId")]
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", description="Sent by whoever connects again: the `id` of the last event.")
]

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.api")


@router.get(
    "",
    response_model=answers.RunPage,
    summary="The runs, the newest first",
    responses=documented("not-found", "invalid-request"),
)
def list_of_runs(
    _caller: Reader,
    database: Db,
    status: answers.RunStatus | None = None,
    kind: answers.RunKind | None = None,
    source: answers.RunSource | None = None,
    dry_run: Annotated[bool | None, Query(alias="dryRun")] = None,
    since: Moment | None = None,
    before: Annotated[UUID | None, Query(description="Older than this run: `next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = PAGE,
) -> dict[str, Any]:
    """Pages are stable while new runs come in: `before` names the last one that was seen."""
    wanted = Wanted(status=status, kind=kind, source=source, dry_run=dry_run, since=since, before=before)
    with database.statements() as connection:
        if before is not None:
            read_line(connection, before)
        found, more = list_runs(connection, wanted, limit=limit)
    return {"runs": [line.facts() for line in found], "next": str(found[-1].run_id) if more else None}


@router.get(
    "/{runId}",
    response_model=answers.RunDetail,
    summary="One run",
    responses=documented("not-found", "invalid-request"),
)
def show_run(run_id: RunId, _caller: Reader, database: Db) -> dict[str, Any]:
    """What was asked for, how far it is, what failed, and the runs that apply, take back or retry it."""
    with database.statements() as connection:
        return read_run(connection, run_id, failures=FAILURES_SHOWN).facts()


def _line(run_id: RunId, _caller: Reader, database: Db, last_event_id: LastEventId = None) -> RunLine:
    """The run as it is, before the stream begins: what is wrong is then an answer, not an event."""
    line = _read(database, run_id)
    if _ended(line) and _state(line) == last_event_id:
        # What keeps a browser from connecting again for ever.
        raise HTTPException(HTTPStatus.NO_CONTENT)
    return line


@router.get(
    "/{runId}/events",
    response_class=EventSourceResponse,
    summary="A run's progress, by server-sent events",
    responses={
        **documented("not-found", "invalid-request"),
        200: {"content": {"text/event-stream": {"example": EVENTS_EXAMPLE}}},
        204: {"description": "The run has ended, and `Last-Event-ID` is that of its end"},
    },
)
async def run_events(
    line: Annotated[Any, Depends(_line)], database: Db, last_event_id: LastEventId = None
) -> AsyncIterator[ServerSentEvent]:
    """Events `progress`, each with the run as the list of runs shows it, and `end`, the last one.

    An event's id is the state that it tells. Whoever connects again with the last one they saw misses nothing: the
    next event is the first state that differs, which holds everything that happened meanwhile. A comment every 15
    seconds keeps the connection open while nothing happens.
    """
    seen = last_event_id
    while True:
        state = _state(line)
        if state != seen:
            seen = state
            event = "end" if _ended(line) else "progress"
            yield ServerSentEvent(data=answers.Run.wire(line.facts()), event=event, id=state, retry=RECONNECT_MS)
        if _ended(line):
            return
        await anyio.sleep(POLL_SECONDS)
        try:
            line = await run_sync(_read, database, line.run_id)
        except (DatabaseError, psycopg.OperationalError) as error:
            # A browser that is answered by an error once does not connect again by itself.
            log.warning("A run's progress cannot be read; it is tried again", error=one_line(error))


def _read(database: Db, run_id: UUID) -> RunLine:
    with database.statements() as connection:
        return read_line(connection, run_id)


def _ended(line: RunLine) -> bool:
    return line.status != "running"


def _state(line: RunLine) -> str:
    return f"{line.status}-{line.users_done}-{line.users_refreshed}-{line.users_failed}"
