"""`credits refresh`: one user, there and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cli.asking import key_option, reason_option, refuse
from cli.main import FINISHED_WITH_FAILURES, REFUSED
from cli.output import answer, json_option
from cli.session import actor, session
from cli.why import explanation
from cli.words import counted, moment
from db import transaction
from refresh import runs, totals
from refresh.at_once import Granted, do_at_once, read_granted
from refresh.preview import preview
from refresh.selection import Selection
from refresh.verdict import Verdict, explain_user

if TYPE_CHECKING:
    from datetime import datetime

    import psycopg

    from cli.session import Session

AMOUNT_MAX = 2**63 - 1


@click.command()
@click.argument("user", metavar="USER")
@click.option(
    "--amount", type=click.IntRange(1, AMOUNT_MAX), metavar="N", help="Aim at N credits, under the plan's mode."
)
@click.option("--force", is_flag=True, help="Even if they are not due, have no date, or are refreshed by a webhook.")
@click.option("--keep-window", is_flag=True, help="With --force: leave their next date where it is.")
@click.option("--dry-run", is_flag=True, help="Record what would be granted, and change nothing.")
@reason_option
@key_option
@json_option
@click.pass_context
def refresh(ctx: click.Context, /, *, user: str, as_json: bool, **options: Any) -> None:
    """Refresh one user, there and then. USER is your app's own id of them.

    It is a run of one user, done by this command itself: it needs neither a broker nor a worker. Who is not due is
    refused, and told why, unless --force is given; who is held, inactive or without a plan is refused in any case.

    With --force, a user who is not due is granted a window that begins now; a rolling interval starts anew from here,
    a monthly or daily date stays on its grid. Who is due anyway is refreshed as ever. --amount takes the place of the
    user's or the plan's amount, and the plan's mode says what becomes of it: under `fill`, a user who has as much
    already gets nothing.

    While your app has the user locked, the command tries again for some seconds. Then it says so and ends with exit
    code 0: the run stays open, and the workers go on with it.

    \b
    With --json: userId, runId, existing (the idempotency key had opened the run), status (of the run), dryRun, force,
    outcome (refreshed, planned, held, failed, skipped; null while the run is not done), creditsAdded, balanceBefore,
    balanceAfter, amount, windowStart, windowEnd, nextRefreshAt, reversed (a rollback has taken it back), error; and
    text, the sentence.

    Exit codes: 0 refreshed, or going on; 2 refused; 3 the refresh failed.

    \b
    Examples:
      credits refresh user-42 --reason 'ticket 1234'
      credits refresh user-42 --amount 500 --force --keep-window --reason 'goodwill, ticket 1234'
      credits refresh user-42 --force --dry-run --reason 'what would they get?'
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    if options["keep_window"] and not options["force"]:
        raise click.UsageError("--keep-window is for --force: any other refresh ends at its window's end")
    with session() as opened, opened.database.statements() as connection:
        if not opened.settings.credit_refresh_enabled:
            raise refuse(runs.NotOpened("disabled"))
        request = _request(opened, **options)
        run = _open(connection, request, explain_user(connection, user))
        left = do_at_once(connection, run.run_id) if not run.existing else None
        done = _read(connection, run, user, left)
    answer(done.text(), {**done.facts(), "force": request.force}, as_json=as_json)
    if done.code:
        ctx.exit(done.code)


def _request(opened: Session, **options: Any) -> runs.Request:
    size = opened.settings.credit_refresh_batch_size
    options["dry_run"] = options["dry_run"] or opened.settings.credit_refresh_dry_run
    return runs.Request("cli", actor(), size, **options)


def _open(connection: psycopg.Connection[Any], request: runs.Request, verdict: Verdict) -> runs.Opened:
    wanted = Selection(user=verdict.external_id)
    with transaction(connection, lock_timeout=runs.OPENING_LOCK_TIMEOUT):
        admitted = runs.admit(connection, request, wanted)
        if isinstance(admitted, runs.Request):
            shown = preview(connection, admitted, wanted)
            for outcome in shown.apart:
                raise runs.RefusedError(f"{explanation(verdict)} {_way_out(outcome, verdict, force=request.force)}")
        run = runs.open_run(connection, request, wanted)
        if isinstance(run, runs.NotOpened):
            raise refuse(run)
    return run


def _way_out(outcome: str, verdict: Verdict, *, force: bool) -> str:
    user = verdict.external_id
    return "Nothing was granted: " + {
        "held": f"`credits release {user}` ends the hold",
        "inactive": "not even --force grants an inactive user anything",
        "no_plan": "give them a plan first (`credits plans list`)",
        "overflow": "a smaller --amount may fit",
        "already_granted": "once a scan has moved them on, --force grants a window of its own",
        "unfinished": f"wait for run {verdict.batch_run_id}, or cancel it (`credits runs cancel`)",
    }.get(outcome, "--force refreshes them all the same" if not force else "they have changed meanwhile; try again")


@dataclass(frozen=True, slots=True)
class _Done:
    """What became of the run: `granted` is its row of history, `left` why it has not ended."""

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
    def code(self) -> int:
        """Of the process."""
        return {"failed": FINISHED_WITH_FAILURES, "held": REFUSED, "skipped": REFUSED}.get(self.outcome or "", 0)

    def facts(self) -> dict[str, object]:
        """For JSON."""
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
            "error": self._error,
            "text": self.text(),
        }

    @property
    def _error(self) -> str | None:
        return (self.granted.error if self.granted else None) or self.progress.error or self.left

    def text(self) -> str:
        """For people."""
        run, user = self.run, self.verdict.external_id
        there = f"Run {run.run_id} is there already, opened with the same key. " if run.existing else ""
        if self.granted and self.granted.status == "refreshed":
            back = " A rollback has taken that back since." if self.granted.reversed else ""
            return f"{there}{user} is refreshed with {_grant(self.granted)}. {self._next()}{back} Run {run.run_id}."
        if self.granted and self.granted.status == "planned":
            return (
                f"{there}{user} would be refreshed with {_grant(self.granted)}. Nothing was changed; "
                f"`credits runs apply {run.run_id}` does it."
            )
        if self.outcome is None:
            why = self._error or "its run is not done"
            return f"{there}{user} is not refreshed yet: {why}. Run {run.run_id} is open, and a worker goes on with it."
        if self.outcome == "failed":
            return f"{there}{user} is not refreshed: {self._error}. Run {run.run_id}."
        return f"{there}{user} is not refreshed. {explanation(self.verdict)} Run {run.run_id}."

    def _next(self) -> str:
        at = self.verdict.next_refresh_at
        return f"Next refresh {moment(at)}." if at else "There is no date for the next refresh."


def _read(connection: psycopg.Connection[Any], run: runs.Opened, user: str, left: str | None) -> _Done:
    verdict = explain_user(connection, user)
    progress = totals.read_progress(connection, run.run_id)
    return _Done(run, progress, read_granted(connection, run.run_id, verdict.user_id), verdict, left)


def _grant(granted: Granted) -> str:
    window = f"from {moment(granted.window_start)}"
    window += f" to {moment(granted.window_end)}" if granted.window_end else ", outside any grid"
    return (
        f"{counted(granted.credits_added, 'credit')} (balance {granted.balance_before:,} before, "
        f"{granted.balance_after:,} after) for the window {window}"
    )


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
