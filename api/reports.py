"""The shapes of the statistics and of the forecast. The domain makes them (`facts()`); here they are documented."""

from __future__ import annotations

from datetime import date
from uuid import UUID

from api.schema import Answer, Credits, Instant, Json


class RunTotals(Answer):
    """Runs that ended in the period."""

    runs: int
    succeeded: int
    partial: int
    failed: int
    cancelled: int
    empty: int
    users_refreshed: int
    users_held: int
    users_skipped: int
    users_failed: int
    credits: Credits
    median_seconds: float | None
    p95_seconds: float | None
    max_seconds: float | None
    users_per_second: float | None


class Granting(RunTotals):
    """Of the live runs that grant: refreshes, applies and their retries."""

    user_success_rate: float | None
    run_success_rate: float | None


class RunsOfKind(RunTotals):
    """Of one kind, dry runs apart."""

    kind: str
    dry_run: bool


class Taken(Answer):
    """What rollbacks took back."""

    users: int
    credits: Credits


class Cause(Answer):
    """Failures whose errors differ in numbers at most."""

    error: str | None
    failures: int
    runs: int
    example_user_id: str | None
    example_run_id: UUID | str | None


class Failures(Answer):
    """What failed, by cause."""

    total: int
    causes: int
    top: list[Cause]


class GrantsOf(Answer):
    """Grants that came in one way."""

    source: str
    grants: int
    credits: Credits


class Grants(Answer):
    """Grants by the way they came in."""

    windows_since: Instant
    by_source: list[GrantsOf]


class UsersNow(Answer):
    """How the users stand now, by the rule's verdict."""

    total: int
    due: int
    not_due: int
    held: int
    inactive: int
    no_plan: int
    external: int
    unscheduled: int
    overflow: int
    overdue: int
    overdue_before: Instant
    due_since: Instant | None


class Stats(Answer):
    """How runs went in a period, what failed and why, and how the users stand."""

    at: Instant
    since: Instant
    granting: Granting
    by_kind: list[RunsOfKind]
    taken_back: Taken
    failures: Failures
    grants: Grants
    users: UsersNow


class Total(Answer):
    """Refreshes and credits: at least, if nobody spends anything; at most, if everybody has spent everything."""

    users: int
    refreshes: int
    credits_least: Credits
    credits_most: Credits


class PlanTotal(Total):
    """Of one plan."""

    plan_code: str


class Day(Answer):
    """One plan on one day, in UTC."""

    day: date
    plan_code: str
    refreshes: int
    credits_least: Credits
    credits_most: Credits


class Outlook(Total):
    """The days ahead under one set of plans."""

    plans: list[PlanTotal]
    days: list[Day]
    not_refreshed: dict[str, int]


class Change(Answer):
    """A plan as it is and as it would be."""

    before: Json
    after: Json
    users_moved: int


class Forecast(Answer):
    """What the days ahead bring, as things are and as they would be."""

    at: Instant
    first_day: date
    last_day: date
    paused: bool
    all_runs_dry: bool
    as_it_is: Outlook
    changes: list[Change] | None
    what_if: Outlook | None
    difference: Total | None
