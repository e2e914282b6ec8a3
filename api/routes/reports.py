"""How runs went, and what the days ahead bring."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from api import reports
from api.callers import Reader
from api.context import Config, Db
from api.problems import documented
from api.schema import Instant
from refresh import forecast as ahead
from refresh import stats

router = APIRouter(prefix="/api/admin/credits", tags=["reports"])

CHANGES_MAX = 20


@router.get(
    "/refresh-stats",
    response_model=reports.Stats,
    summary="How runs went: success, durations, failures by cause",
    responses=documented("refused"),
)
def refresh_stats(
    _caller: Reader,
    config: Config,
    database: Db,
    days: Annotated[int, Query(ge=1, le=stats.DAYS_MAX, description="The last so many times 24 hours.")] = stats.DAYS,
    since: Annotated[Instant | None, Query(description="From this instant on, instead.")] = None,
) -> dict[str, Any]:
    """Of the runs that ended in the period, which ends now; and of the users as they are."""
    with database.transaction() as connection:
        found = stats.read_stats(
            connection, interval=config.interval, cron=config.credit_refresh_cron, days=days, since=since
        )
    return found.facts()


@router.get(
    "/forecast",
    response_model=reports.Forecast,
    summary="The refreshes and credits of the days ahead, by plan",
    responses=documented("refused"),
)
def forecast(
    _caller: Reader,
    database: Db,
    days: Annotated[int, Query(ge=1, le=ahead.DAYS_MAX, description="How many days, in UTC; the first is today.")] = (
        ahead.DAYS
    ),
    set_: Annotated[
        list[str] | None,
        Query(
            alias="set",
            max_length=CHANGES_MAX,
            description="What if a plan were like that? `pro.amount=25000`; nothing is written.",
        ),
    ] = None,
) -> dict[str, Any]:
    """As things are, and, with `set`, as they would be."""
    changes = [ahead.parse_change(text) for text in set_ or []]
    with database.transaction() as connection:
        return ahead.forecast(connection, days=days, changes=changes).facts()
