"""The routes of the systems before: the cron job's, and the manual reset with its status.

Both open a run over all who are due, as beat does every hour. So they are safe to call at any time, and as often as
somebody likes: whoever is refreshed is not due any more.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from pydantic import Field

from api import answers
from api.asking import Asker
from api.callers import Admin, Cron, Reader
from api.context import Config, Db
from api.keys import IdempotencyKey, require
from api.opening import open_and_publish, request_of
from api.problems import documented
from api.routes.users import TEXT_MAX
from api.schema import Body, Flag, Text
from refresh import runs
from refresh.doctor import scheduled_run
from refresh.errors import NobodyError
from refresh.reset_status import read_date, read_status
from refresh.selection import Selection
from tasks.app import app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import psycopg

    from db import Database
    from settings import Settings

CRON = "/api/admin/reset-monthly-tokens"
PING_SECONDS = 1.0
WORKERS_SECONDS = 2.0
"""For the ping and the way to the broker. One that hangs would hold a thread of the requests for ten."""
_PAUSED = documented("paused")


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    workers = Asker("workers", _workers)
    yield {"workers": workers}
    workers.close()


router = APIRouter(tags=["reset"], lifespan=_lifespan)


@router.post(
    CRON, response_model=answers.Reset, summary="A cron job's call: refresh all who are due", responses=_PAUSED
)
def reset_monthly_tokens(caller: Cron, config: Config, database: Db, response: Response) -> dict[str, Any]:
    """Idempotent, and safe to call every minute: while nobody is due, no run is opened. Workers do it."""
    request = request_of(config, caller, source="cron", reason=runs.SCHEDULED)
    return _refresh_due(config, database, response, request)


@router.get(CRON, response_model=answers.Reset, summary="The same, as hosted cron services send it", responses=_PAUSED)
def reset_monthly_tokens_by_get(caller: Cron, config: Config, database: Db, response: Response) -> dict[str, Any]:
    """See the POST."""
    response.headers["Cache-Control"] = "no-store"
    return reset_monthly_tokens(caller, config, database, response)


def _refresh_due(
    config: Settings,
    database: Database,
    response: Response,
    request: runs.Request,
    asked: Selection | None = None,
) -> dict[str, Any]:
    def opens(connection: psycopg.Connection[Any]) -> runs.Opened | runs.NotOpened:
        # With a key, a run for nobody is a run: it keeps the answer that is given again.
        return runs.open_run(connection, request, asked, even_empty=request.idempotency_key is not None)

    try:
        run = open_and_publish(database, config, request.idempotency_key, opens, response)
    except NobodyError:
        with database.statements() as connection:
            return {"success": True, "resetCount": 0, "date": read_date(connection), "run": None}
    del response.headers["Retry-After"]
    opened_on = run["createdAt"].partition("T")[0]  # sessions are in UTC
    return {"success": True, "resetCount": run["usersSelected"], "date": opened_on, "run": run}


class ManualBody(Body):
    """How to reset."""

    bypass: Flag = Field(  # a forced refresh: its windows begin now
        default=False, description="All users, due or not: windows that begin now, on top of those that are running."
    )
    dry_run: Flag = Field(default=False, description="Record what would be granted, and change no user.")
    reason: Text = Field("manual reset", min_length=1, max_length=TEXT_MAX, description="For whoever asks why.")


@router.post(
    "/api/reset/manual",
    response_model=answers.Reset,
    summary="Reset by hand",
    responses=documented(
        "paused", "in-progress", "idempotency-key-missing", "idempotency-key-reused", "invalid-request"
    ),
)
def manual_reset(
    caller: Admin,
    config: Config,
    database: Db,
    response: Response,
    body: ManualBody | None = None,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Refresh all who are due; with `bypass`, everybody. Without need and without `bypass`, nothing happens.

    `bypass` has to come with an Idempotency-Key: sent twice, it would grant everybody twice.
    """
    said = body or ManualBody()
    if said.bypass:
        require(idempotency_key)
    request = request_of(
        config,
        caller,
        reason=said.reason,
        force=said.bypass,
        dry_run=said.dry_run,
        idempotency_key=idempotency_key,
    )
    return _refresh_due(config, database, response, request, Selection() if said.bypass else None)


def _status(_caller: Reader, config: Config, database: Db) -> dict[str, Any]:
    with database.statements() as connection:
        status = read_status(connection, interval=config.interval, cron=config.credit_refresh_cron).facts()
        on_time = scheduled_run(connection, config)
    return {
        **status,
        "timetable": config.credit_refresh_cron or f"every {config.interval}",
        "beatAlive": {"ok": True, "wrong": False}.get(on_time.state),
        "beat": on_time.sentence,
    }


def _workers() -> list[str]:
    replies = app.control.ping(timeout=PING_SECONDS) or []
    return sorted(name for reply in replies for name in reply)


@router.get("/api/reset/status", response_model=answers.ResetStatus, summary="Where the periodic refresh stands")
async def reset_status(status: Annotated[dict[str, Any], Depends(_status)], request: Request) -> dict[str, Any]:
    """The last runs, the last success, the next run, and whether beat and workers are alive.

    Refreshes of single users are left out. Workers are asked, and have a second to answer; one that is at work on a
    batch answers after it. Beat answers nobody: it is alive if the present slot has its run.
    """
    workers: Asker[list[str]] = request.state.workers
    names = await workers.answer(WORKERS_SECONDS) or []
    return {**status, "workersAlive": bool(names), "workers": names}
