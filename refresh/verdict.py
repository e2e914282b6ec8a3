"""A user's verdict, with everything that it rests on, in one statement and so at one instant.

The rule is `decide()`; this asks it, and joins what happened before: the last refresh, the hold, an unfinished batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any
from uuid import UUID  # noqa: TC003 - the same

from psycopg.rows import class_row

from refresh.errors import NotFoundError

if TYPE_CHECKING:
    import psycopg


@dataclass(frozen=True, slots=True)
class Verdict:
    """One user, now.

    Attributes:
        at: the database's now().
        enabled: False: the service is paused.
        all_dry: every run is a dry one.
        verdict: what the rule says.
        next_verdict: what it will say, once nothing but time and the hold are out of the way.
        window_start: of the window that the next refresh is for; with it window_end, first_missed_at, windows_passed.
        target: the amount aimed at.
        credits_added: what the next refresh would add to the balance as it is; None where it does not fit.
        already_granted: the window that is due has its grant, and the user only moves on.
        hold_since, hold_by: from the audit log; None for a hold older than the log.
        hold_changed_at, hold_changed_by: the last change of the hold's reason or end.
        batch_run_id: an unfinished run that has the user in a batch; with it batch_attempts, batch_error.
        last_at: when the user was last refreshed; with it last_source, last_run_id, last_credits, last_window_start,
            last_window_end.
    """

    at: datetime
    enabled: bool
    all_dry: bool
    user_id: int
    external_id: str
    email: str | None
    active: bool
    credit_balance: int
    next_refresh_at: datetime | None
    credit_refresh_day: int | None
    custom_credit_amount: int | None
    timezone: str | None
    created_at: datetime
    plan_code: str | None
    plan_active: bool | None
    cadence: str | None
    grant_mode: str | None
    rollover_cap: int | None
    verdict: str
    next_verdict: str
    window_start: datetime | None
    window_end: datetime | None
    first_missed_at: datetime | None
    windows_passed: int | None
    target: int | None
    credits_added: int | None
    already_granted: bool
    held: bool
    hold_reason: str | None
    hold_until: datetime | None
    hold_since: datetime | None
    hold_by: str | None
    hold_changed_at: datetime | None
    hold_changed_by: str | None
    batch_run_id: UUID | None
    batch_attempts: int | None
    batch_error: str | None
    last_at: datetime | None
    last_source: str | None
    last_run_id: UUID | None
    last_credits: int | None
    last_window_start: datetime | None
    last_window_end: datetime | None

    @property
    def due(self) -> bool:
        """Whether the user's date has come, hold or no hold."""
        return self.next_refresh_at is not None and self.next_refresh_at <= self.at

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "userId": self.external_id,
            "at": self.at.isoformat(),
            "verdict": self.verdict,
            "paused": not self.enabled,
            "allRunsDry": self.all_dry,
            "active": self.active,
            "planCode": self.plan_code,
            "planActive": self.plan_active,
            "cadence": self.cadence,
            "grantMode": self.grant_mode,
            "creditBalance": self.credit_balance,
            "nextRefreshAt": _iso(self.next_refresh_at),
            "next": self._next(),
            "hold": self._hold(),
            "unfinishedRun": self._unfinished(),
            "lastRefresh": self._last(),
        }

    def _next(self) -> dict[str, object] | None:
        if self.window_start is None:
            return None
        return {
            "verdict": self.next_verdict,
            "windowStart": _iso(self.window_start),
            "windowEnd": _iso(self.window_end),
            "firstMissedAt": _iso(self.first_missed_at),
            "windowsPassed": self.windows_passed,
            "amount": self.target,
            "creditsAdded": 0 if self.already_granted else self.credits_added,
            "alreadyGranted": self.already_granted,
        }

    def _hold(self) -> dict[str, object] | None:
        if not self.held:
            return None
        return {
            "reason": self.hold_reason,
            "until": _iso(self.hold_until),
            "ended": self.hold_until is not None and self.hold_until <= self.at,
            "since": _iso(self.hold_since),
            "by": self.hold_by,
            "changedAt": _iso(self.hold_changed_at),
            "changedBy": self.hold_changed_by,
        }

    def _unfinished(self) -> dict[str, object] | None:
        if self.batch_run_id is None:
            return None
        return {"runId": str(self.batch_run_id), "attempts": self.batch_attempts, "error": self.batch_error}

    def _last(self) -> dict[str, object] | None:
        if self.last_at is None:
            return None
        return {
            "at": _iso(self.last_at),
            "source": self.last_source,
            "runId": str(self.last_run_id) if self.last_run_id else None,
            "creditsAdded": self.last_credits,
            "windowStart": _iso(self.last_window_start),
            "windowEnd": _iso(self.last_window_end),
        }


# Twice: as things are now, and for the next refresh, at the instant when it can come and without the hold.
_DECIDE = """
decide(
    {as_of}, u.active, {hold}, u.next_refresh_at, u.credit_balance, u.custom_credit_amount,
    u.credit_refresh_day, u.timezone, p.active, p.cadence, p.interval_days, p.day_of_month, p.time_of_day, p.timezone,
    p.grant_mode, p.amount, p.rollover_cap, u.refresh_shortfall
)
"""
_FACTS = """
SELECT
    now() AS at, s.enabled, s.dry_run AS all_dry,
    u.id AS user_id, u.external_id, u.email, u.active, u.credit_balance, u.next_refresh_at, u.credit_refresh_day,
    u.custom_credit_amount, u.timezone, u.created_at,
    u.plan_code, p.active AS plan_active, p.cadence, p.grant_mode, p.rollover_cap,
    d.verdict, n.verdict AS next_verdict, w.window_start, w.window_end, w.first_missed_at, w.windows_passed,
    n.target, w.credits_added, n.verdict = 'due' AND g.granted AS already_granted,
    u.credit_refresh_hold AS held, u.hold_reason, u.hold_until,
    h.occurred_at AS hold_since, h.actor AS hold_by, c.occurred_at AS hold_changed_at, c.actor AS hold_changed_by,
    b.run_id AS batch_run_id, b.attempts AS batch_attempts, b.error AS batch_error,
    l.created_at AS last_at, l.source AS last_source, l.run_id AS last_run_id, l.credits_added AS last_credits,
    l.window_start AS last_window_start, l.window_end AS last_window_end
FROM users AS u
CROSS JOIN settings AS s
LEFT JOIN plans AS p ON p.code = u.plan_code
CROSS JOIN LATERAL {now} AS d
CROSS JOIN LATERAL {soon} AS n
LEFT JOIN LATERAL (
    SELECT n.window_start, n.window_end, n.first_missed_at, n.windows_passed, n.credits_added
) AS w ON n.verdict IN ('due', 'overflow')
CROSS JOIN LATERAL (
    SELECT EXISTS (
        SELECT FROM credit_refresh_histories
        WHERE user_id = u.id AND window_start = w.window_start AND status = 'refreshed' AND reversed_by_run_id IS NULL
    ) AS granted
) AS g
LEFT JOIN LATERAL (
    SELECT a.occurred_at, a.id, a.actor FROM credit_audit_logs AS a
    WHERE a.user_id = u.id AND a.action = 'hold_set' AND a.action <> 'refreshed'
    ORDER BY a.occurred_at DESC, a.id DESC LIMIT 1
) AS h ON u.credit_refresh_hold
LEFT JOIN LATERAL (
    SELECT a.occurred_at, a.actor FROM credit_audit_logs AS a
    WHERE a.user_id = u.id AND a.action = 'hold_changed' AND a.action <> 'refreshed'
        AND (h.id IS NULL OR (a.occurred_at, a.id) > (h.occurred_at, h.id))
    ORDER BY a.occurred_at DESC, a.id DESC LIMIT 1
) AS c ON u.credit_refresh_hold
LEFT JOIN LATERAL (
    SELECT x.run_id, x.attempts, x.error
    FROM credit_refresh_batches AS x JOIN credit_refresh_runs AS r ON r.id = x.run_id
    WHERE x.status = 'pending' AND r.status = 'running' AND NOT r.dry_run AND r.kind <> 'regrid'
        AND u.id = ANY (x.user_ids)
    ORDER BY x.id LIMIT 1
) AS b ON true
LEFT JOIN LATERAL (
    SELECT x.created_at, x.source, x.run_id, x.credits_added, x.window_start, x.window_end
    FROM credit_refresh_histories AS x
    WHERE x.user_id = u.id AND x.status = 'refreshed' AND x.reversed_by_run_id IS NULL
    ORDER BY x.window_start DESC LIMIT 1
) AS l ON true
WHERE u.external_id = %(external_id)s
"""
_EXPLAIN = _FACTS.format(
    now=_DECIDE.format(as_of="now()", hold="u.credit_refresh_hold, u.hold_until"),
    soon=_DECIDE.format(as_of="greatest(now(), u.next_refresh_at)", hold="false, NULL"),
)


def explain_user(connection: psycopg.Connection[Any], external_id: str) -> Verdict:
    """Why a user is, or is not, refreshed.

    Raises:
        NotFoundError: no such user.
    """
    with connection.cursor(row_factory=class_row(Verdict)) as cursor:
        verdict = cursor.execute(_EXPLAIN, {"external_id": external_id}).fetchone()
    if verdict is None:
        raise NotFoundError(f"there is no user {external_id!r}")
    return verdict


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
