"""Is it alive, is it ready, and how does it go: for load balancers, orchestrators and Prometheus."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import Field

from api.asking import Asker
from api.callers import Reader
from api.metrics import exposition
from api.problems import GUARDED
from api.schema import Answer
from db import REVISION, Database, DatabaseError
from refresh.metrics import Reader as MetricsReader
from refresh.metrics import Snapshot
from tasks.broker import Queues, ping, read_queues

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

READY_SECONDS = 2.0
METRICS_SECONDS = 8.0
"""For the database; Prometheus waits for ten by default, and the broker is given as long as for readiness."""


class Check(Answer):
    """One thing that has to be right. What exactly is wrong is in the service's log."""

    status: Literal["ok", "failed", "unasked"]
    detail: str


class Checks(Answer):
    """What requests need."""

    database: Check
    migrations: Check
    broker: Check


class Readiness(Answer):
    """Whether requests can be served."""

    status: Literal["ready", "unready"]
    checks: Checks


class Alive(Answer):
    """The process answers."""

    status: Literal["alive"] = Field("alive", examples=["alive"])


EXAMPLE = """# HELP credits_users_due Users who are due.
# TYPE credits_users_due gauge
credits_users_due 12.0
"""


@dataclass(frozen=True, slots=True)
class _Servers:
    """Who is asked, each in a thread of its own."""

    tables: Asker[bool]
    broker: Asker[bool]
    snapshot: Asker[Snapshot]
    queues: Asker[Queues]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    database: Database = app.state.database
    reader = MetricsReader()
    servers = _Servers(
        Asker("database", lambda: _tables_are_ours(database)),
        Asker("broker", _broker_answers),
        Asker("metrics", lambda: reader.read(database)),
        Asker("queues", read_queues),
    )
    yield {"servers": servers}
    for asker in (servers.tables, servers.broker, servers.snapshot, servers.queues):
        asker.close()


async def _servers(request: Request) -> _Servers:
    servers: _Servers = request.state.servers
    return servers


Servers = Annotated[_Servers, Depends(_servers)]
router = APIRouter(tags=["health"], lifespan=_lifespan)


@router.get("/healthz", response_model=Alive, summary="Is the process alive?")
async def healthz() -> Alive:
    """Asks nobody else: a process is not to be restarted because the database is down."""
    return Alive(status="alive")


@router.get(
    "/readyz",
    response_model=Readiness,
    summary="Can requests be served?",
    responses={503: {"model": Readiness, "description": "Not ready: `checks` says what is missing"}},
)
async def readyz(servers: Servers, response: Response) -> Readiness:
    """The database answers, its tables are this release's, the broker answers; asked side by side, within 2 seconds."""
    tables, broker_answers = await asyncio.gather(
        servers.tables.answer(READY_SECONDS), servers.broker.answer(READY_SECONDS)
    )
    checks = Checks(
        database=_check(ok=tables is not None),
        migrations=_migrations(ours=tables),
        broker=_check(ok=broker_answers is not None),
    )
    if any(check.status != "ok" for check in (checks.database, checks.migrations, checks.broker)):
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return Readiness(status="unready", checks=checks)
    return Readiness(status="ready", checks=checks)


@router.get(
    "/metrics",
    response_class=Response,
    summary="Metrics for Prometheus",
    responses={
        **GUARDED,
        200: {
            "description": "Prometheus' text format",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": EXAMPLE}},
        },
    },
)
async def metrics(_caller: Reader, servers: Servers) -> Response:
    """From the database and the broker. Where one does not answer, `credits_database_up` or `credits_broker_up` is 0.

    Of several processes, each gives the same: scrape one.
    """
    snapshot, queues = await asyncio.gather(
        servers.snapshot.answer(METRICS_SECONDS), servers.queues.answer(READY_SECONDS)
    )
    return Response(exposition(snapshot, queues), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _tables_are_ours(database: Database) -> bool:
    """Whether they are this release's; raises where the database does not answer."""
    with database.statements() as connection:
        connection.execute("SELECT 1")
    try:
        database.require_migrated()
    except DatabaseError:
        return False
    return True


def _broker_answers() -> bool:
    ping()
    return True


def _check(*, ok: bool) -> Check:
    return Check(status="ok", detail="answers") if ok else Check(status="failed", detail="does not answer")


def _migrations(*, ours: bool | None) -> Check:
    if ours is None:
        return Check(status="unasked", detail="not asked before the database answers")
    if not ours:
        return Check(status="failed", detail=f"the tables are not at migration {REVISION}: run `credits db upgrade`")
    return Check(status="ok", detail=f"the tables are at migration {REVISION}")
