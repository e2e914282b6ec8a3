"""One user, for support: their verdict, history and settings, and a refresh there and then."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Header, Path, Query, Response
from pydantic import Field, model_validator

from api import answers
from api.callers import Reader, Support
from api.context import Config, Db, this_request
from api.keys import IdempotencyKey, first_answer, in_progress
from api.opening import request_of
from api.problems import InvalidRequestError, Problem, documented, not_opened
from api.schema import Amount, Body, Flag, Moment, Number, Text
from db import transaction
from refresh import replay, runs
from refresh.at_once import LOCK_ATTEMPTS, do_at_once
from refresh.history import user_history
from refresh.import_columns import MAX_KEY_CHARACTERS
from refresh.selection import Selection
from refresh.single import open_single, read_single
from refresh.user_settings import HOLD, UserSettings, change_settings, read_settings
from refresh.verdict import explain_user

# `:path`, because an app's ids may hold a slash, which comes as %2F and is one again by then.
router = APIRouter(prefix="/api/admin/users/{userId:path}", tags=["users"])

TEXT_MAX = 1_000
PAGE = 50
PAGE_MAX = 500
DEFAULT_REASON = "HTTP API"

UserId = Annotated[
    Text,
    Path(alias="userId", min_length=1, max_length=MAX_KEY_CHARACTERS, description="Your app's own id of the user."),
]
Before = Annotated[str | None, Query(pattern=r"^[1-9][0-9]{0,17}$", description="Older than this entry: `next`.")]
Limit = Annotated[int, Query(ge=1, le=PAGE_MAX)]


class RefreshBody(Body):
    """How to refresh one user."""

    reason: Text = Field(DEFAULT_REASON, min_length=1, max_length=TEXT_MAX, description="For whoever asks why.")
    amount: Amount | None = Field(None, description="Aim at so many credits, under the plan's mode.")
    force: Flag = Field(default=False, description="Even if not due, without a date, or refreshed by a webhook.")
    keep_window: Flag = Field(default=False, description="With `force`: leave the next date where it is.")
    dry_run: Flag = Field(default=False, description="Record what would be granted, and change nothing.")

    @model_validator(mode="after")
    def _keeps_what_is_forced(self) -> Self:
        if self.keep_window and not self.force:
            raise ValueError("keepWindow is for force: any other refresh ends at its window's end")
        return self


@router.post(
    "/refresh-credits",
    response_model=answers.Refreshed,
    summary="Refresh one user, there and then",
    responses=documented(
        "not-found", "not-granted", "paused", "refused", "in-progress", "idempotency-key-reused", "invalid-request"
    ),
)
def refresh_credits(
    user_id: UserId,
    caller: Support,
    config: Config,
    database: Db,
    response: Response,
    body: RefreshBody | None = None,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """It is a run of one user, done before the answer comes, without a worker.

    Whoever is not due is refused unless `force` is given; whoever is held, inactive or without a plan in any case.
    While your app has the user locked for seconds, the answer comes with `outcome` null, and a worker goes on.
    """
    asked = (body or RefreshBody()).model_dump()
    request = request_of(config, caller, idempotency_key=idempotency_key, **asked)
    with database.statements() as connection:
        with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
            # The user may have been deleted since.
            if kept := first_answer(connection, request, Selection(user=user_id).facts(force=request.force), response):
                return kept
            run = open_single(connection, request, explain_user(connection, user_id))
            if isinstance(run, runs.NotOpened):
                raise not_opened(run)
        # One that is there without an answer is either being done, or whoever opened it has died.
        left = do_at_once(connection, run.run_id, attempts=1 if run.existing else LOCK_ATTEMPTS)
        done = read_single(connection, run, user_id, left)
        if done.outcome is None:
            if run.existing and idempotency_key is not None:
                raise in_progress(idempotency_key)
            return done.facts()
        return replay.keep_answer(connection, run.run_id, {**done.facts(), "existing": False})


@router.get(
    "/refresh-history",
    response_model=answers.HistoryPage,
    summary="What a user was granted, and what not",
    responses=documented("not-found", "invalid-request"),
)
def refresh_history(
    user_id: UserId, _caller: Reader, database: Db, before: Before = None, limit: Limit = PAGE
) -> dict[str, Any]:
    """The newest first; what dry runs planned is nobody's history."""
    with database.statements() as connection:
        older_than = int(before) if before is not None else None
        entries, more = user_history(connection, user_id, limit=limit, before=older_than)
    return {"entries": [entry.facts() for entry in entries], "next": str(entries[-1].id) if more else None}


@router.get(
    "/refresh-verdict",
    response_model=answers.Verdict,
    summary="Why a user is, or is not, refreshed",
    responses=documented("not-found", "invalid-request"),
)
def refresh_verdict(user_id: UserId, _caller: Reader, database: Db) -> dict[str, Any]:
    """The rule's verdict, and everything that it rests on."""
    with database.statements() as connection:
        return explain_user(connection, user_id).facts()


class SettingsBody(Body):
    """What to change; what is not named stays as it is, and null takes the plan's."""

    credit_refresh_hold: Flag | None = Field(None, description="A hold needs a `holdReason`.")
    hold_reason: Text | None = Field(None, min_length=1, max_length=TEXT_MAX)
    hold_until: Moment | None = Field(None, description="The hold ends by itself then; null: when released.")
    credit_refresh_day: Number | None = Field(
        None, ge=1, le=31, description="Makes a rolling user monthly on this day."
    )
    custom_credit_amount: Amount | None = Field(None, description="In the place of the plan's amount.")
    timezone: Text | None = Field(None, max_length=64, description="An IANA name, in the place of the plan's.")

    def changes(self) -> dict[str, Any]:
        """What was named."""
        named = {name: getattr(self, name) for name in self.model_fields_set}
        if named.get("credit_refresh_hold", True) is None:
            raise InvalidRequestError("creditRefreshHold", "is true or false")
        return named


@router.get(
    "/refresh-settings",
    response_model=answers.Settings,
    summary="What is particular to a user",
    responses=documented("not-found", "invalid-request"),
)
def read_refresh_settings(user_id: UserId, _caller: Reader, database: Db, response: Response) -> dict[str, Any]:
    """`ETag` names the version, for `If-Match`."""
    with database.statements() as connection:
        return _settings(read_settings(connection, user_id), response)


@router.put(
    "/refresh-settings",
    response_model=answers.Settings,
    summary="Hold or release a user; set their day, amount and time zone",
    responses=documented("not-found", "precondition-failed", "refused", "invalid-request"),
)
def refresh_settings(
    user_id: UserId,
    body: SettingsBody,
    caller: Support,
    database: Db,
    response: Response,
    if_match: Annotated[
        str | None,
        Header(alias="If-Match", description="The `ETag` that was read: nothing changes if it is another by now."),
    ] = None,
) -> dict[str, Any]:
    """The scope `support` sets and ends holds; the day, the amount and the time zone are for `admin`."""
    changes = body.changes()
    if {*changes} - HOLD and not caller.may("admin"):
        raise Problem("forbidden", "this needs the scope 'admin': 'support' sets and ends holds alone")
    version = None if if_match in {None, "*"} else str(if_match).removeprefix("W/").strip('"')
    with database.transaction() as connection:
        settings = change_settings(
            connection, user_id, changes, actor=caller.name, version=version, correlation_id=this_request()
        )
    return _settings(settings, response)


def _settings(settings: UserSettings, response: Response) -> dict[str, Any]:
    response.headers["ETag"] = f'"{settings.version}"'
    return {
        "userId": settings.external_id,
        "creditRefreshHold": settings.credit_refresh_hold,
        "holdReason": settings.hold_reason,
        "holdUntil": settings.hold_until,
        "creditRefreshDay": settings.credit_refresh_day,
        "customCreditAmount": settings.custom_credit_amount,
        "timezone": settings.timezone,
        "nextRefreshAt": settings.next_refresh_at,
    }
