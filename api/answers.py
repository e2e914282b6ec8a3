"""The shapes of the answers about users and runs. The domain makes them (`facts()`); here they are documented."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from pydantic import Field

from api.schema import Answer, Credits, Instant, Json

RunKind = Literal["refresh", "apply", "rollback", "retry", "regrid"]
RunSource = Literal["beat", "cli", "api", "cron", "stripe"]
RunStatus = Literal["running", "succeeded", "partial", "failed", "cancelled"]
VerdictName = Literal["due", "not_due", "held", "inactive", "no_plan", "external", "unscheduled", "overflow"]


class Next(Answer):
    """What the next refresh will be."""

    verdict: VerdictName
    window_start: Instant
    window_end: Instant | None
    first_missed_at: Instant | None
    windows_passed: int | None
    amount: Credits | None
    credits_added: Credits | None
    already_granted: bool


class Hold(Answer):
    """A hold that is in force, or has run out and ends with the next refresh."""

    reason: str | None
    until: Instant | None
    ended: bool
    since: Instant | None
    by: str | None
    changed_at: Instant | None
    changed_by: str | None


class Unfinished(Answer):
    """A run that has the user in a batch and is not done."""

    run_id: UUID
    attempts: int | None
    error: str | None


class Last(Answer):
    """The last grant that was not taken back."""

    at: Instant
    source: Literal["run", "insert", "function", "trigger"]
    run_id: UUID | None
    credits_added: Credits
    window_start: Instant
    window_end: Instant | None


class Verdict(Answer):
    """Why a user is, or is not, refreshed."""

    user_id: str
    at: Instant
    verdict: VerdictName
    paused: bool
    all_runs_dry: bool
    active: bool
    plan_code: str | None
    plan_active: bool | None
    cadence: str | None
    grant_mode: str | None
    credit_balance: Credits
    next_refresh_at: Instant | None
    next: Next | None
    hold: Hold | None
    unfinished_run: Unfinished | None
    last_refresh: Last | None


class HistoryEntry(Answer):
    """One decision over a user."""

    id: Credits = Field(description="Give it as `before` for what is older.")
    created_at: Instant
    status: Literal["refreshed", "held", "skipped", "failed", "reversed"]
    source: Literal["run", "insert", "function", "trigger"]
    run_id: UUID | None
    window_start: Instant
    window_end: Instant | None
    first_missed_at: Instant | None
    windows_passed: int
    plan_code: str | None
    grant_mode: str | None
    target: Credits | None
    old_balance: Credits
    credits_added: Credits
    new_balance: Credits
    shortfall: Credits
    reason: str | None
    error: str | None
    reversed_by_run_id: UUID | None


class HistoryPage(Answer):
    """A user's history, the newest first."""

    entries: list[HistoryEntry]
    next: str | None = Field(description="For `before`, to get the next page; null on the last one.")


class OwnLast(Answer):
    """A user's last grant."""

    at: Instant
    credits_added: Credits
    window_start: Instant
    window_end: Instant | None


class NextRefresh(Answer):
    """What a user may know of their next refresh; without a date, `nextRefreshAt` is null."""

    credit_balance: Credits
    plan_code: str | None
    on_hold: bool
    next_refresh_at: Instant | None
    amount: Credits | None
    credits_added: Credits | None
    last_refresh: OwnLast | None


class OwnHistoryEntry(Answer):
    """One decision, as the user themselves may read it: without the notes of those who run the service."""

    id: Credits
    created_at: Instant
    status: Literal["refreshed", "held", "skipped", "failed", "reversed"]
    window_start: Instant
    window_end: Instant | None
    plan_code: str | None
    old_balance: Credits
    credits_added: Credits
    new_balance: Credits


class OwnHistoryPage(Answer):
    """A user's own history, the newest first."""

    entries: list[OwnHistoryEntry]
    next: str | None = Field(description="For `before`, to get the next page; null on the last one.")


class Refreshed(Answer):
    """What became of a single refresh."""

    user_id: str
    run_id: UUID
    existing: bool = Field(description="The Idempotency-Key had opened the run before.")
    status: RunStatus
    dry_run: bool
    outcome: Literal["refreshed", "planned", "held", "failed", "skipped"] | None = Field(
        description="Null while the run is not done: your app has the user locked, and a worker goes on with it."
    )
    credits_added: Credits
    balance_before: Credits | None
    balance_after: Credits | None
    amount: Credits | None
    window_start: Instant | None
    window_end: Instant | None
    next_refresh_at: Instant | None
    reversed: bool
    error: str | None


class Run(Answer):
    """A run, and how far it is."""

    run_id: UUID
    created_at: Instant
    kind: RunKind
    work: Literal["refresh", "apply", "rollback", "regrid"]
    source: RunSource
    status: RunStatus
    dry_run: bool
    users_selected: int
    users_done: int
    users_refreshed: int
    users_held: int
    users_skipped: int
    users_failed: int
    credits_granted: Credits
    seconds: float
    requested_by: str
    reason: str | None
    max_users_per_second: int | None


class Opened(Run):
    """A run that a request has opened."""

    existing: bool = Field(description="The Idempotency-Key had opened it before.")


class BulkOpened(Opened):
    """A run over many users that a request has opened."""

    unknown_users: int = Field(0, description="Of the `userIds`, those that are nobody's.")
    unknown_sample: list[str] = Field([], description="The first few of them.")


class RunPage(Answer):
    """Runs, the newest first."""

    runs: list[Run]
    next: str | None = Field(description="For `before`, to get the next page; null on the last one.")


class RunChild(Answer):
    """A run that applies, takes back or retries this one."""

    run_id: UUID
    kind: str
    work: str
    status: str
    dry_run: bool
    created_at: Instant
    requested_by: str


class BatchGroup(Answer):
    """The run's batches of one status."""

    status: Literal["pending", "done", "failed", "cancelled"]
    batches: int
    users: int
    users_deferred: int
    attempts: int
    credits: Credits


class OneBatch(Answer):
    """A batch that did not get done."""

    batch_id: Credits
    seq: int
    users: int
    attempts: int
    published_at: Instant | None
    next_attempt_at: Instant | None
    error: str | None


class FailedUser(Answer):
    """A user whose refresh failed; without `userId` when your app has deleted them."""

    user_id: str | None
    id: Credits
    error: str | None


class RunDetail(Run):
    """One run with all that belongs to it."""

    as_of: Instant | None
    slot: Instant | None
    parent_run_id: UUID | None
    subject_run_id: UUID | None
    selection: Json
    force: bool
    keep_window: bool
    amount: Credits | None
    atomic: bool
    idempotency_key: str | None
    started_at: Instant | None
    finished_at: Instant | None
    cancelled_by: str | None
    cancel_reason: str | None
    error: str | None
    children: list[RunChild]
    batches: list[BatchGroup]
    oldest_pending: OneBatch | None
    failed_batches: list[OneBatch]
    failed_users: list[FailedUser]
    apply: dict[str, Credits | None] | None
    rollback: dict[str, Credits | None] | None


class Cancelled(Answer):
    """A run that was cancelled; batches that a worker had are finished."""

    run_id: UUID
    kind: str
    work: str
    dry_run: bool
    status: str
    batches_cancelled: int
    users_cancelled: int
    users_selected: int
    users_refreshed: int
    users_held: int
    users_skipped: int
    users_failed: int
    credits_granted: Credits


class Settings(Answer):
    """What is particular to one user."""

    user_id: str
    credit_refresh_hold: bool
    hold_reason: str | None
    hold_until: Instant | None
    credit_refresh_day: int | None
    custom_credit_amount: Credits | None
    timezone: str | None
    next_refresh_at: Instant | None


class Reset(Answer):
    """What a reset set in motion."""

    success: bool
    reset_count: int = Field(description="Users whom the run is for; workers refresh them.")
    date: str = Field(description="The day of the call, in UTC; of one that is answered again, that of the first.")
    run: Opened | None = Field(description="Null when nobody was due: no run was opened.")


class ResetStatus(Answer):
    """Where the periodic refresh stands."""

    at: Instant
    paused: bool
    last_run: Run | None
    last_success: Run | None
    next_run_at: Instant
    timezone: str
    timetable: str
    workers_alive: bool
    workers: list[str]
    beat_alive: bool | None = Field(description="Null while paused or disabled: there is nothing to tell it by.")
    beat: str
    history: list[Run]
