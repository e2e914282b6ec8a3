"""Statistics over a period: how the runs that ended in it went, what failed and why, and how the users stand now.

Everything is aggregated in PostgreSQL, over one snapshot. Grants by source are counted in the history, which knows no
instant of writing by index but is partitioned by window: the reading is bounded by the windows that a grant of the
period can be for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from db import one
from refresh.errors import RefusedError
from refresh.schedule import slot_at
from refresh.snapshot import read_only

if TYPE_CHECKING:
    import psycopg

DAYS = 30
DAYS_MAX = 3_660
CAUSES_SHOWN = 10
MANY_SLOTS = 2
"""Users whom so many whole scans have left out are overdue."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs that have ended, of one kind or of several.

    Attributes:
        kind: None: the live runs that grant, of whatever kind.
        dry_run: they changed no user; what they count would have been.
        empty: how many of them found nobody to do anything with.
        users_refreshed: granted; of a regrid, moved to another date; of a rollback, taken back from.
        credits: granted; sums may be larger than 64 bits.
        median_seconds, p95_seconds, max_seconds: from a run's opening to its end; with users_per_second over the runs
            that were neither empty nor cancelled, None where there are none.
    """

    kind: str | None
    dry_run: bool
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
    credits: int
    median_seconds: float | None
    p95_seconds: float | None
    max_seconds: float | None
    users_per_second: float | None

    @property
    def user_success_rate(self) -> float | None:
        """Of the users refreshed or failed, the part that was refreshed; None where there are none."""
        tried = self.users_refreshed + self.users_failed
        return self.users_refreshed / tried if tried else None

    @property
    def run_success_rate(self) -> float | None:
        """Of the runs that were not cancelled, the part that succeeded without one failed user; None: no such run."""
        tried = self.runs - self.cancelled
        return self.succeeded / tried if tried else None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "runs": self.runs,
            "succeeded": self.succeeded,
            "partial": self.partial,
            "failed": self.failed,
            "cancelled": self.cancelled,
            "empty": self.empty,
            "usersRefreshed": self.users_refreshed,
            "usersHeld": self.users_held,
            "usersSkipped": self.users_skipped,
            "usersFailed": self.users_failed,
            "credits": self.credits,
            "medianSeconds": _rounded(self.median_seconds),
            "p95Seconds": _rounded(self.p95_seconds),
            "maxSeconds": _rounded(self.max_seconds),
            "usersPerSecond": _rounded(self.users_per_second),
        }


@dataclass(frozen=True, slots=True)
class Cause:
    """Failures whose errors differ in numbers at most.

    Attributes:
        error: the first line of the latest one's.
        failures: how often; a user who failed in three runs counts three times.
        runs: in how many runs.
        user: one of the users, by the host's id; by ours where they are gone.
        run_id: the run in which they failed.
    """

    error: str
    failures: int
    runs: int
    user: str
    run_id: str

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "error": self.error,
            "failures": self.failures,
            "runs": self.runs,
            "exampleUserId": self.user,
            "exampleRunId": self.run_id,
        }


@dataclass(frozen=True, slots=True)
class Source:
    """Grants that came in one way: by runs, at insert, by the function or by the spend trigger."""

    source: str
    grants: int
    credits: int

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {"source": self.source, "grants": self.grants, "credits": self.credits}


@dataclass(frozen=True, slots=True)
class Users:
    """How the users stand now, by the rule's verdict.

    Attributes:
        by_verdict: every verdict of design.md, with 0 where nobody has it.
        overdue: of the due, those whom `MANY_SLOTS` whole scans have left out.
        overdue_before: they are due since before this instant.
        due_since: since when the longest of the due is; None where nobody is.
    """

    by_verdict: dict[str, int]
    overdue: int
    overdue_before: datetime
    due_since: datetime | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        verdicts = {"notDue" if name == "not_due" else name: users for name, users in self.by_verdict.items()}
        verdicts["noPlan"] = verdicts.pop("no_plan")
        return {
            "total": sum(self.by_verdict.values()),
            **verdicts,
            "overdue": self.overdue,
            "overdueBefore": self.overdue_before.isoformat(),
            "dueSince": self.due_since.isoformat() if self.due_since else None,
        }


@dataclass(frozen=True, slots=True)
class Stats:
    """A period's statistics.

    Attributes:
        at: the database's now(), at which the period ends.
        since: when it begins.
        granting: the live runs that grant: refresh, apply, and their retries.
        by_kind: all runs, live and dry ones apart.
        users_taken_back: by rollbacks; a user of whom two grants were taken back counts twice.
        credits_taken_back: by rollbacks.
        causes: why users failed in live runs, the most frequent first; `CAUSES_SHOWN` at most.
        causes_total: how many causes there are.
        failures_total: how many failures there are.
        sources: grants by the way they came in.
        sources_since: grants for a window that began earlier are not among them.
        users: how they stand now.
    """

    at: datetime
    since: datetime
    granting: Runs
    by_kind: list[Runs]
    users_taken_back: int
    credits_taken_back: int
    causes: list[Cause]
    causes_total: int
    failures_total: int
    sources: list[Source]
    sources_since: datetime
    users: Users

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it.

        Returns:
            at, since; granting, the live runs that grant: runs, succeeded, partial, failed, cancelled, empty,
            usersRefreshed, usersHeld, usersSkipped, usersFailed, credits, medianSeconds, p95Seconds, maxSeconds,
            usersPerSecond (the last four null without a run that had users), userSuccessRate and runSuccessRate (0 to
            1, or null); byKind, a list of kind, dryRun and the same without rates; takenBack: users, credits;
            failures: total, causes, and top, a list of error, failures, runs, exampleUserId, exampleRunId; grants:
            windowsSince, and bySource, a list of source, grants, credits; users: total, due, notDue, held, inactive,
            noPlan, external, unscheduled, overflow, overdue, overdueBefore, dueSince.
        """
        return {
            "at": self.at.isoformat(),
            "since": self.since.isoformat(),
            "granting": {
                **self.granting.facts(),
                "userSuccessRate": self.granting.user_success_rate,
                "runSuccessRate": self.granting.run_success_rate,
            },
            "byKind": [{"kind": runs.kind, "dryRun": runs.dry_run, **runs.facts()} for runs in self.by_kind],
            "takenBack": {"users": self.users_taken_back, "credits": self.credits_taken_back},
            "failures": {
                "total": self.failures_total,
                "causes": self.causes_total,
                "top": [cause.facts() for cause in self.causes],
            },
            "grants": {
                "windowsSince": self.sources_since.isoformat(),
                "bySource": [source.facts() for source in self.sources],
            },
            "users": self.users.facts(),
        }


_NOW = "SELECT now(), coalesce(%(since)s::timestamptz, now() - make_interval(hours => 24 * %(days)s))"

# One reading for both: by kind, and over the runs that grant.
_RUNS = """
SELECT
    {kind}, {dry_run}, count(*), count(*) FILTER (WHERE r.status = 'succeeded'),
    count(*) FILTER (WHERE r.status = 'partial'), count(*) FILTER (WHERE r.status = 'failed'),
    count(*) FILTER (WHERE r.status = 'cancelled'), count(*) FILTER (WHERE r.batches_total = 0),
    coalesce(sum(r.users_refreshed), 0)::bigint, coalesce(sum(r.users_held), 0)::bigint,
    coalesce(sum(r.users_skipped), 0)::bigint, coalesce(sum(r.users_failed), 0)::bigint,
    coalesce(sum(r.credits_granted), 0),
    percentile_cont(0.5) WITHIN GROUP (ORDER BY t.seconds), percentile_cont(0.95) WITHIN GROUP (ORDER BY t.seconds),
    max(t.seconds),
    sum(r.users_refreshed + r.users_held + r.users_skipped + r.users_failed) FILTER (WHERE t.seconds IS NOT NULL)
        / nullif(sum(t.seconds), 0)
FROM credit_refresh_runs AS r
CROSS JOIN LATERAL (
    SELECT CASE WHEN r.batches_total > 0 AND r.status <> 'cancelled' THEN
        extract(epoch FROM r.finished_at - r.started_at)::double precision
    END AS seconds
) AS t
WHERE r.finished_at >= %(since)s {which}
"""
_BY_KIND = _RUNS.format(kind="r.kind", dry_run="r.dry_run", which="GROUP BY 1, 2 ORDER BY 2, 1")
_GRANTING = _RUNS.format(kind="NULL", dry_run="false", which="AND NOT r.dry_run AND r.work IN ('refresh', 'apply')")

# What is said twice of a status names the index's predicate (models/history.py).
_TAKEN_BACK = """
SELECT count(*), coalesce(-sum(h.credits_added), 0)
FROM credit_refresh_runs AS r
JOIN credit_refresh_histories AS h ON h.run_id = r.id AND h.status = 'reversed' AND h.status <> 'refreshed'
WHERE r.finished_at >= %(since)s AND r.work = 'rollback' AND NOT r.dry_run
"""

# A user's own row says more than the error of the batch that was given up with them.
_CAUSES = """
WITH ended AS MATERIALIZED (
    SELECT id, finished_at FROM credit_refresh_runs WHERE finished_at >= %(since)s AND users_failed > 0 AND NOT dry_run
),
failed AS (
    SELECT e.finished_at, h.run_id, h.user_id, h.error
    FROM ended AS e
    JOIN credit_refresh_histories AS h ON h.run_id = e.id AND h.status = 'failed' AND h.status <> 'refreshed'
    UNION ALL
    SELECT e.finished_at, b.run_id, m.user_id, b.error
    FROM ended AS e
    JOIN credit_refresh_batches AS b ON b.run_id = e.id AND b.status = 'failed'
    CROSS JOIN LATERAL unnest(b.user_ids) AS m (user_id)
    WHERE NOT EXISTS (
        SELECT FROM credit_refresh_histories AS h
        WHERE h.run_id = b.run_id AND h.user_id = m.user_id AND h.status = 'failed' AND h.status <> 'refreshed'
    )
),
causes AS (
    SELECT
        count(*) AS failures, count(DISTINCT f.run_id) AS runs,
        max(ARRAY[f.finished_at::text, f.run_id::text, f.user_id::text, l.line]) AS example
    FROM failed AS f
    CROSS JOIN LATERAL (SELECT coalesce(split_part(f.error, E'\\n', 1), 'no error is on record') AS line) AS l
    GROUP BY regexp_replace(l.line, '[0-9]+', '#', 'g')
)
SELECT
    c.example[4], c.failures, c.runs, coalesce(u.external_id, 'id ' || c.example[3]), c.example[2],
    count(*) OVER (), (sum(c.failures) OVER ())::bigint
FROM causes AS c LEFT JOIN users AS u ON u.id = c.example[3]::bigint
ORDER BY c.failures DESC, c.example DESC
LIMIT %(limit)s
"""

# A window is at most a month long, or the longest interval of a plan; a run that looked back (--as-of) may have granted
# for an older one, which is not worth reading all of the history.
_SOURCES_SINCE = """
SELECT %(since)s - make_interval(hours => 24 * greatest(32, max(interval_days) FILTER (WHERE cadence = 'rolling')))
FROM plans
"""
_SOURCES = """
SELECT source, count(*), sum(credits_added)
FROM credit_refresh_histories
WHERE window_start >= %(windows_since)s AND window_start <= now() AND status = 'refreshed' AND created_at >= %(since)s
GROUP BY source ORDER BY count(*) DESC, source
"""

_USERS = """
SELECT
    d.verdict, count(*), count(*) FILTER (WHERE u.wake_at < %(before)s), min(u.wake_at)
FROM users AS u
LEFT JOIN plans AS p ON p.code = u.plan_code
CROSS JOIN LATERAL decide(
    now(), u.active, u.credit_refresh_hold, u.hold_until, u.next_refresh_at, u.credit_balance, u.custom_credit_amount,
    u.credit_refresh_day, u.timezone, p.active, p.cadence, p.interval_days, p.day_of_month, p.time_of_day, p.timezone,
    p.grant_mode, p.amount, p.rollover_cap, u.refresh_shortfall
) AS d
GROUP BY d.verdict
"""
VERDICTS = ("due", "not_due", "held", "inactive", "no_plan", "external", "unscheduled", "overflow")


def read_stats(
    connection: psycopg.Connection[Any],
    *,
    interval: timedelta,
    cron: str | None,
    days: int = DAYS,
    since: datetime | None = None,
) -> Stats:
    """The statistics of the runs that ended in a period, which ends now, and of the users as they are.

    Args:
        connection: at the very beginning of a transaction, which becomes read-only with one snapshot.
        interval: the width of a slot; with `cron`, what says who is overdue.
        cron: a timetable in UTC that takes the interval's place.
        days: how many times 24 hours ago the period begins; 1 to `DAYS_MAX`.
        since: when it begins, instead.

    Raises:
        RefusedError: `days` is not allowed, or `since` lies ahead.
    """
    if not 1 <= days <= DAYS_MAX:
        raise RefusedError(f"{days} days are not allowed: 1 to {DAYS_MAX:,} are")
    read_only(connection)
    at, begins = one(connection.execute(_NOW, {"since": since, "days": days}))
    if begins > at:
        raise RefusedError(f"{begins.isoformat()} lies in the future: an instant up to {at.isoformat()} is allowed")
    period = {"since": begins}
    by_kind = [_runs(row) for row in connection.execute(_BY_KIND, period)]
    granting = _runs(one(connection.execute(_GRANTING, period)))
    taken_users, taken_credits = one(connection.execute(_TAKEN_BACK, period))
    causes = connection.execute(_CAUSES, {**period, "limit": CAUSES_SHOWN}).fetchall()
    causes_total, failures_total = causes[0][5:] if causes else (0, 0)
    (windows_since,) = one(connection.execute(_SOURCES_SINCE, period))
    sources = connection.execute(_SOURCES, {**period, "windows_since": windows_since}).fetchall()
    return Stats(
        at=at,
        since=begins,
        granting=granting,
        by_kind=by_kind,
        users_taken_back=taken_users,
        credits_taken_back=int(taken_credits),
        causes=[Cause(*row[:5]) for row in causes],
        causes_total=causes_total,
        failures_total=failures_total,
        sources=[Source(source, grants, int(credits_added)) for source, grants, credits_added in sources],
        sources_since=windows_since,
        users=_users(connection, _overdue_before(at, interval, cron)),
    )


def _runs(row: tuple[Any, ...]) -> Runs:
    values: list[Any] = [int(value) if isinstance(value, Decimal) else value for value in row]
    return Runs(*values)


def _overdue_before(at: datetime, interval: timedelta, cron: str | None) -> datetime:
    slot = slot_at(at, interval, cron)
    for _ in range(MANY_SLOTS):
        slot = slot_at(slot - timedelta(microseconds=1), interval, cron)
    return slot


def _users(connection: psycopg.Connection[Any], overdue_before: datetime) -> Users:
    found = {row[0]: row[1:] for row in connection.execute(_USERS, {"before": overdue_before})}
    _, overdue, due_since = found.get("due", (0, 0, None))
    return Users({verdict: found.get(verdict, (0,))[0] for verdict in VERDICTS}, overdue, overdue_before, due_since)


def _rounded(number: float | None) -> float | None:
    return round(number, 3) if number is not None else None
