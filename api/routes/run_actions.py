"""What can be done with a run: apply, roll back, retry, cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response
from pydantic import Field

from api import answers
from api.callers import Admin
from api.context import Config, Db
from api.keys import RequiredKey
from api.opening import open_and_publish, request_of
from api.problems import documented
from api.routes.runs import RunId
from api.routes.users import DEFAULT_REASON, TEXT_MAX
from api.schema import Body, Flag, Number, Text
from refresh import apply as applying
from refresh import rollback as taking_back
from refresh import runs
from refresh.cancel import cancel_run
from refresh.retry import open_retry

if TYPE_CHECKING:
    import psycopg

router = APIRouter(prefix="/api/admin/runs/{runId}", tags=["runs"])

_OPENS = documented(
    "not-found",
    "idempotency-key-missing",
    "idempotency-key-reused",
    "in-progress",
    "paused",
    "refused",
    "invalid-request",
)


class ActionBody(Body):
    """Why, and how fast."""

    reason: Text = Field(DEFAULT_REASON, min_length=1, max_length=TEXT_MAX, description="For whoever asks why.")
    max_users_per_second: Number | None = Field(None, ge=1, le=2**31 - 1, description="Go no faster than that.")


class RollbackBody(ActionBody):
    """What to take back, and how."""

    reopen: Flag = Field(default=False, description="Give the windows back as well: the users are due again.")
    allow_negative: Flag = Field(default=False, description="Take all of it, also below zero.")
    dry_run: Flag = Field(default=False, description="Record what would be taken back, and change no user.")


@router.post(
    "/apply", status_code=202, response_model=answers.Opened, summary="Do what a dry run planned", responses=_OPENS
)
def apply(
    run_id: RunId,
    caller: Admin,
    config: Config,
    database: Db,
    response: Response,
    key: RequiredKey,
    body: ActionBody | None = None,
) -> dict[str, Any]:
    """Exactly that, for nobody else, and once; users for whom the rule would decide otherwise by now are left alone."""
    request = request_of(config, caller, idempotency_key=key, **(body or ActionBody()).model_dump())

    def opens(connection: psycopg.Connection[Any]) -> runs.Opened | runs.NotOpened:
        return applying.open_apply(connection, run_id, request)

    return open_and_publish(database, config, key, opens, response)


@router.post("/rollback", status_code=202, response_model=answers.Opened, summary="Take a run back", responses=_OPENS)
def rollback(
    run_id: RunId,
    caller: Admin,
    config: Config,
    database: Db,
    response: Response,
    key: RequiredKey,
    body: RollbackBody | None = None,
) -> dict[str, Any]:
    """What the run granted is taken back as far as it is still there; a run that still runs is cancelled first."""
    said = body or RollbackBody()
    asked = taking_back.Asked(run_id=run_id, reopen=said.reopen, allow_negative=said.allow_negative)
    how = said.model_dump(include={"reason", "max_users_per_second", "dry_run"})
    request = asked.request(request_of(config, caller, idempotency_key=key, **how))

    def opens(connection: psycopg.Connection[Any]) -> runs.Opened | runs.NotOpened:
        return taking_back.open_rollback(connection, request, asked)

    return open_and_publish(database, config, key, opens, response)


@router.post("/retry", status_code=202, response_model=answers.Opened, summary="Take up who failed", responses=_OPENS)
def retry(
    run_id: RunId,
    caller: Admin,
    config: Config,
    database: Db,
    response: Response,
    key: RequiredKey,
    body: ActionBody | None = None,
) -> dict[str, Any]:
    """The run's failed users, as a new run; of a cancelled one, also those whose batch was never begun."""
    request = request_of(config, caller, idempotency_key=key, **(body or ActionBody()).model_dump())

    def opens(connection: psycopg.Connection[Any]) -> runs.Opened | runs.NotOpened:
        return open_retry(connection, run_id, request)

    return open_and_publish(database, config, key, opens, response)


class CancelBody(Body):
    """Why."""

    reason: Text = Field(DEFAULT_REASON, min_length=1, max_length=TEXT_MAX, description="For whoever asks why.")


@router.post(
    "/cancel",
    response_model=answers.Cancelled,
    summary="Stop a run",
    responses=documented("not-found", "refused", "invalid-request"),
)
def cancel(run_id: RunId, caller: Admin, database: Db, body: CancelBody | None = None) -> dict[str, Any]:
    """Batches that a worker has are finished, the others are not begun. Nothing is taken back."""
    reason = (body or CancelBody()).reason
    with database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        return cancel_run(connection, run_id, actor=caller.name, reason=reason).facts()
