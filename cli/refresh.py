"""`credits refresh`: one user, there and then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.asking import key_option, reason_option, refuse
from cli.main import FINISHED_WITH_FAILURES, REFUSED
from cli.output import answer, json_option
from cli.session import actor, session
from cli.why import explanation
from cli.words import counted, moment
from refresh import runs
from refresh.at_once import do_at_once
from refresh.errors import RefusedError
from refresh.single import NotGrantedError, open_single, read_single
from refresh.verdict import explain_user

if TYPE_CHECKING:
    import psycopg

    from cli.session import Session
    from refresh.at_once import Granted
    from refresh.single import Done
    from refresh.verdict import Verdict

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
        done = read_single(connection, run, user, left)
    text = _text(done)
    answer(text, {**done.facts(), "force": request.force, "text": text}, as_json=as_json)
    if code := _CODES.get(done.outcome or ""):
        ctx.exit(code)


_CODES = {"failed": FINISHED_WITH_FAILURES, "held": REFUSED, "skipped": REFUSED}


def _request(opened: Session, **options: Any) -> runs.Request:
    size = opened.settings.credit_refresh_batch_size
    options["dry_run"] = options["dry_run"] or opened.settings.credit_refresh_dry_run
    return runs.Request("cli", actor(), size, **options)


def _open(connection: psycopg.Connection[Any], request: runs.Request, verdict: Verdict) -> runs.Opened:
    try:
        run = open_single(connection, request, verdict)
    except NotGrantedError as error:
        way_out = _way_out(error.outcome, verdict, force=request.force)
        raise RefusedError(f"{explanation(verdict)} {way_out}") from error
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


def _text(done: Done) -> str:
    run, user = done.run, done.verdict.external_id
    there = f"Run {run.run_id} is there already, opened with the same key. " if run.existing else ""
    if done.granted and done.granted.status == "refreshed":
        back = " A rollback has taken that back since." if done.granted.reversed else ""
        return f"{there}{user} is refreshed with {_grant(done.granted)}. {_next(done)}{back} Run {run.run_id}."
    if done.granted and done.granted.status == "planned":
        return (
            f"{there}{user} would be refreshed with {_grant(done.granted)}. Nothing was changed; "
            f"`credits runs apply {run.run_id}` does it."
        )
    if done.outcome is None:
        why = done.error or "its run is not done"
        return f"{there}{user} is not refreshed yet: {why}. Run {run.run_id} is open, and a worker goes on with it."
    if done.outcome == "failed":
        return f"{there}{user} is not refreshed: {done.error}. Run {run.run_id}."
    return f"{there}{user} is not refreshed. {explanation(done.verdict)} Run {run.run_id}."


def _next(done: Done) -> str:
    at = done.verdict.next_refresh_at
    return f"Next refresh {moment(at)}." if at else "There is no date for the next refresh."


def _grant(granted: Granted) -> str:
    window = f"from {moment(granted.window_start)}"
    window += f" to {moment(granted.window_end)}" if granted.window_end else ", outside any grid"
    return (
        f"{counted(granted.credits_added, 'credit')} (balance {granted.balance_before:,} before, "
        f"{granted.balance_after:,} after) for the window {window}"
    )
