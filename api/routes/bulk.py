"""Many users at once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from fastapi import APIRouter, Response
from pydantic import Field, model_validator

from api import answers
from api.callers import Admin
from api.context import Config, Db
from api.keys import RequiredKey
from api.opening import open_and_publish, request_of
from api.problems import documented
from api.routes.users import DEFAULT_REASON, TEXT_MAX
from api.schema import Amount, Balance, Body, Flag, Moment, Number, Text
from refresh import runs
from refresh.errors import RefusedError
from refresh.import_columns import MAX_KEY_CHARACTERS
from refresh.preview import check_plan
from refresh.selection import Selection
from refresh.user_files import load_users

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

USERS_MAX = 100_000
"""Users named one by one in a request; `credits bulk-refresh --users` takes files of any length."""


PATH = "/api/admin/credits/bulk-refresh"
BODY_BYTES_MAX = 2**25
"""Room for as many ids of 300 characters."""

router = APIRouter(tags=["runs"])


class BulkBody(Body):
    """Whom to refresh, and how: `all`, `planCode` or `userIds`, and conditions, of which all have to hold."""

    all: Flag = Field(default=False, description="All who are due; with `force`, all users.")
    plan_code: Text | None = Field(None, min_length=1, max_length=255, description="The users of a plan.")
    user_ids: list[Text] | None = Field(
        None, min_length=1, max_length=USERS_MAX, description="These users, by your app's own ids."
    )
    next_refresh_before: Moment | None = Field(None, description="Whose date lies before it.")
    balance_below: Balance | None = Field(None, description="Who have fewer credits.")
    active: Flag | None = Field(None, description="Who are active, or are not.")
    force: Flag = Field(default=False, description="Those too who are not due, have no date, or wait for a webhook.")
    keep_window: Flag = Field(default=False, description="With `force`: leave everybody's next date where it is.")
    amount: Amount | None = Field(None, description="Aim at so many credits, under each plan's mode.")
    dry_run: Flag = Field(default=False, description="Record what would be granted, row by row, and change no user.")
    as_of: Moment | None = Field(None, description="Decide as of this instant; in the future for dry runs alone.")
    atomic: Flag = Field(default=False, description=f"All of them or none; {runs.ATOMIC_USERS_MAX:,} users at most.")
    max_users_per_second: Number | None = Field(None, ge=1, le=2**31 - 1, description="Go no faster than that.")
    reason: Text = Field(DEFAULT_REASON, min_length=1, max_length=TEXT_MAX, description="For whoever asks why.")

    @model_validator(mode="after")
    def _names_whom(self) -> Self:
        named = [self.all, self.plan_code is not None, self.user_ids is not None]
        narrowed = any(value is not None for value in (self.next_refresh_before, self.balance_below, self.active))
        if sum(named) > 1:
            raise ValueError("all, planCode and userIds exclude one another")
        if not any(named) and not narrowed:
            raise ValueError("say whom: all, planCode, userIds, or one condition at least")
        if self.all and narrowed:
            raise ValueError("all means everybody: leave it out, and the conditions alone select")
        if self.keep_window and not self.force:
            raise ValueError("keepWindow is for force: any other refresh ends at its window's end")
        if self.atomic and self.max_users_per_second is not None:
            raise ValueError("atomic is one transaction: it cannot be paced")
        return self

    def selection(self) -> Selection:
        """Whom it selects, `userIds` aside."""
        return Selection(
            plan=self.plan_code,
            next_refresh_before=self.next_refresh_before,
            balance_below=self.balance_below,
            active=self.active,
        )


class _Ids:
    """`userIds`, as `load_users()` reads a file."""

    name = "userIds"

    def __init__(self, ids: list[str]) -> None:
        self._ids = ids

    def ids(self) -> Iterator[tuple[int, str]]:
        """Each id with its place."""
        for place, id_ in enumerate(self._ids):
            text = id_.strip()
            if not text or len(text) > MAX_KEY_CHARACTERS or "\0" in text:
                raise RefusedError(f"userIds.{place} is no id: it has to have 1 to {MAX_KEY_CHARACTERS} characters")
            yield place, text


@router.post(
    PATH,
    status_code=202,
    response_model=answers.BulkOpened,
    summary="Refresh many users",
    responses=documented(
        "idempotency-key-missing", "idempotency-key-reused", "in-progress", "paused", "refused", "invalid-request"
    ),
)
def bulk_refresh(
    body: BulkBody, caller: Admin, config: Config, database: Db, response: Response, key: RequiredKey
) -> dict[str, Any]:
    """Whom the run is for is decided now; workers do it, and each batch decides again over each of its users.

    `Location` is where the run is, and `…/events` tells how far it has come. Nobody is refreshed who is held, inactive
    or without a plan; `unknownUsers` says how many of the `userIds` are nobody's. To see beforehand what would happen:
    `dryRun`, then `POST …/runs/{runId}/apply`.
    """
    how = {"force", "keep_window", "amount", "dry_run", "as_of", "atomic", "max_users_per_second", "reason"}
    request = request_of(config, caller, idempotency_key=key, **body.model_dump(include=how))
    unknown: dict[str, Any] = {"unknownUsers": 0, "unknownSample": []}

    def opens(connection: psycopg.Connection[Any]) -> runs.Opened | runs.NotOpened:
        wanted = body.selection()
        if wanted.plan is not None:
            check_plan(connection, wanted.plan)
        if body.user_ids is not None:
            listed = load_users(connection, _Ids(body.user_ids))
            unknown.update(unknownUsers=listed.unknown, unknownSample=listed.sample)
            wanted = replace(wanted, listed=listed.content())
        return runs.open_run(connection, request, wanted)

    return open_and_publish(database, config, key, opens, response, also=unknown)
