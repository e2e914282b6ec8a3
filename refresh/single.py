"""One user's refresh as a run of its own: what refuses it beforehand, and what became of it.

The command and the HTTP API ask here, and each says it in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from db import transaction
from refresh import runs, totals
from refresh.at_once import Granted, read_granted
from refresh.errors import RefusedError
from refresh.preview import preview
from refresh.selection import Selection
from refresh.verdict import Verdict, explain_user

if TYPE_CHECKING:
    from datetime import datetime

    import psycopg


class NotGrantedError(RefusedError):
    """The rule gives the user nothing now.

    Attributes:
        outcome: why: a verdict, `already_granted` or `unfinished`.
        verdict: the user, with everything that it rests on.
    """

    def __init__(self, outcome: str, verdict: Verdict) -> None:
        super().__init__(f"{verdict.external_id} is not refreshed: {outcome}")
        self.outcome = outcome
        self.verdict = verdict


def open_single(
    connection: psycopg.Connection[Any], request: runs.Request, verdict: Verdict
) -> runs.Opened | runs.NotOpened:
    """Open the run of one user, unless it would grant nothing.

    Args:
        connection: in autocommit, or in a transaction that waits `OPENING_LOCK_TIMEOUT` for locks.
        request: what is asked for.
        verdict: whose.

    Raises:
        NotGrantedError: the rule would refuse them; no run was opened.
        RefusedError: as `runs.open_run()`.
    """
    wanted = Selection(user=verdict.external_id)
    with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
        admitted = runs.admit(connection, request, wanted)
        if isinstance(admitted, runs.Request):
            for outcome in preview(connection, admitted, wanted).apart:
                raise NotGrantedError(outcome, verdict)
        return runs.open_run(connection, request, wanted)


@dataclass(frozen=True, slots=True)
class Done:
    """What became of the run.

    Attributes:
        granted: its row of history; None while there is none, and where it left the user out.
        verdict: the user, after it.
        left: why it has not ended, for people.
    """

    run: runs.Opened
    progress: totals.Progress
    granted: Granted | None
    verdict: Verdict
    left: str | None

    @property
    def outcome(self) -> str | None:
        """In a word; None while the run is not done."""
        if self.granted is not None:
            return self.granted.status
        if self.progress.status == "running":
            return None
        return "failed" if self.progress.users_failed else "skipped"

    @property
    def error(self) -> str | None:
        """What went wrong, or why it is not done."""
        return (self.granted.error if self.granted else None) or self.progress.error or self.left

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        got = self.granted
        return {
            "userId": self.verdict.external_id,
            "runId": str(self.run.run_id),
            "existing": self.run.existing,
            "status": self.progress.status,
            "dryRun": self.run.dry_run,
            "outcome": self.outcome,
            "creditsAdded": got.credits_added if got else 0,
            "balanceBefore": got.balance_before if got else None,
            "balanceAfter": got.balance_after if got else None,
            "amount": got.target if got else None,
            "windowStart": _iso(got.window_start) if got else None,
            "windowEnd": _iso(got.window_end) if got else None,
            "nextRefreshAt": _iso(self.verdict.next_refresh_at),
            "reversed": bool(got and got.reversed),
            "error": self.error,
        }


def read_single(connection: psycopg.Connection[Any], run: runs.Opened, user: str, left: str | None) -> Done:
    """What became of a user's run; `left` as `do_at_once()` returned it."""
    verdict = explain_user(connection, user)
    progress = totals.read_progress(connection, run.run_id)
    return Done(run, progress, read_granted(connection, run.run_id, verdict.user_id), verdict, left)


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
