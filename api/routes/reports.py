"""How runs went, and what the days ahead bring."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from api import reports
from api.callers import Reader
from api.context import Config, Db
from api.problems import InvalidRequestError, documented
from api.schema import Moment, Text
from refresh import forecast as ahead
from refresh import stats
from refresh.errors import RefusedError

router = APIRouter(prefix="/api/admin/credits", tags=["reports"])

CHANGES_MAX = 20


@router.get(
    "/refresh-stats",
    response_model=reports.Stats,
    summary="How runs went: success, durations, failures by cause",
    responses=documented("refused", "invalid-request"),
)
def refresh_stats(
    _caller: Reader,
    config: Config,
    database: Db,
    days: Annotated[
        int | None,
        Query(ge=1, le=stats.DAYS_MAX, description=f"The last so many times 24 hours; {stats.DAYS}, unless said."),
    ] = None,
    since: Annotated[Moment | None, Query(description="From this instant on, instead.")] = None,
) -> dict[str, Any]:
    """Of the runs that ended in the period, which ends now; and of the users as they are."""
    if days is not None and since is not None:
        raise InvalidRequestError("query.since", "days and since say the same thing twice: give one of them")
    with database.transaction() as connection:
        return stats.read_stats(
            connection, interval=config.interval, cron=config.credit_refresh_cron,
            days=days or stats.DAYS, since=since,
        ).facts()  # fmt: skip


@router.get(
    "/forecast",
    response_model=reports.Forecast,
    summary="The refreshes and credits of the days ahead, by plan",
    responses=documented("refused", "invalid-request"),
)
def forecast(
    _caller: Reader,
    database: Db,
    days: Annotated[int, Query(ge=1, le=ahead.DAYS_MAX, description="How many days, in UTC; the first is today.")] = (
        ahead.DAYS
    ),
    set_: Annotated[
        list[Text] | None,
        Query(
            alias="set",
            max_length=CHANGES_MAX,
            description="What if a plan were like that? `pro.amount=25000`; nothing is written.",
        ),
    ] = None,
) -> dict[str, Any]:
    """As things are, and, with `set`, as they would be."""
    try:
        changes = [ahead.parse_change(text) for text in set_ or []]
    except RefusedError as error:
        raise InvalidRequestError("query.set", str(error)) from None
    with database.transaction() as connection:
        return ahead.forecast(connection, days=days, changes=changes).facts()
