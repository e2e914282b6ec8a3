"""The runs there are and were, and one run's progress as it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api import answers
from api.callers import Reader
from api.context import Db
from api.problems import documented
from api.schema import Instant, to_wire
from refresh.run_detail import read_run
from refresh.run_list import Wanted, list_runs, read_line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from refresh.run_list import RunLine

router = APIRouter(prefix="/api/admin/runs", tags=["runs"])

PAGE = 20
PAGE_MAX = 200
FAILURES_SHOWN = 100
POLL_SECONDS = 0.5
RECONNECT_MS = 1_000

RunId = Annotated[UUID, Path(alias="runId")]


@router.get("", response_model=answers.RunPage, summary="The runs, the newest first", responses=documented("not-found"))
def list_of_runs(
    _caller: Reader,
    database: Db,
    status: answers.RunStatus | None = None,
    kind: answers.RunKind | None = None,
    source: answers.RunSource | None = None,
    dry_run: Annotated[bool | None, Query(alias="dryRun")] = None,
    since: Instant | None = None,
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


@router.get("/{runId}", response_model=answers.RunDetail, summary="One run", responses=documented("not-found"))
def show_run(run_id: RunId, _caller: Reader, database: Db) -> dict[str, Any]:
    """What was asked for, how far it is, what failed, and the runs that apply, take back or retry it."""
    with database.statements() as connection:
        return read_run(connection, run_id, failures=FAILURES_SHOWN).facts()


def _line(run_id: RunId, _caller: Reader, database: Db) -> RunLine:
    """The run as it is, before the stream begins: what is wrong is then an answer, not an event."""
    with database.statements() as connection:
        return read_line(connection, run_id)


@router.get(
    "/{runId}/events",
    response_class=EventSourceResponse,
    summary="A run's progress, by server-sent events",
    responses={**documented("not-found"), 204: {"description": "The run has ended, and its end was received."}},
)
async def run_events(
    line: Annotated[Any, Depends(_line)],
    database: Db,
    last_event_id: Annotated[str | None, Header(description="Sent by whoever connects again.")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Events `progress`, each with the run as `GET …/{runId}` of the list says it, and `end`, the last one.

    An event's id is the state that it tells. Whoever connects again with the last one they saw misses nothing: the
    next event is the first state that differs, which holds everything that happened meanwhile.
    """
    seen = last_event_id
    while True:
        ended = line.status != "running"
        state = f"{line.status}-{line.users_done}-{line.users_refreshed}-{line.users_failed}"
        if state != seen:
            seen = state
            event = "end" if ended else "progress"
            yield ServerSentEvent(data=to_wire(line.facts()), event=event, id=state, retry=RECONNECT_MS)
        if ended:
            return
        await anyio.sleep(POLL_SECONDS)
        line = await run_sync(_read, database, line.run_id)


def _read(database: Db, run_id: UUID) -> RunLine:
    with database.statements() as connection:
        return read_line(connection, run_id)
