"""`credits users`: the users of the host app."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.chart import bars
from cli.main import ERROR
from cli.output import answer, err, facts, json_option, out, progress, table
from cli.rejects import reject_file
from cli.session import actor, session
from cli.why import explanation
from cli.words import confirm, counted, moment, window_rows, yes_option
from refresh.errors import RefusedError
from refresh.import_columns import COLUMNS
from refresh.import_file import UserFile
from refresh.imports import BadRowsError, Report, import_users
from refresh.runs import OPENING_LOCK_TIMEOUT
from refresh.stagger import count_unscheduled, stagger_users
from refresh.verdict import explain_user
from refresh.windows import user_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from refresh.verdict import Verdict

READ_BUFFER_BYTES = 1_048_576


@click.group()
def users() -> None:
    """Import users, show one, give dates to those who have none."""


@users.command("import", epilog=f"Columns: {', '.join(COLUMNS)}.")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.csv")
@click.option(
    "--skip-bad",
    "rejects",
    type=click.Path(path_type=Path),
    metavar="REJECTS.csv",
    help="Import the good rows, and write the bad ones there, each with its line and the reason. The file must not "
    "exist yet; without a bad row none is written.",
)
@json_option
@click.pass_context
def import_(ctx: click.Context, *, file: Path, rejects: Path | None, as_json: bool) -> None:
    """Insert and change users from a CSV of any size, all of it or nothing.

    FILE.csv is UTF-8, has commas and a header, and at least the column external_id: your app's own id. Users who are
    new need a credit_balance. Of users who are there already, only the columns that the file has are changed; balances
    are written as the file says them, and nothing is granted.

    An empty cell clears the value; an empty credit_balance leaves a user's balance as it is, and an empty active or
    credit_refresh_hold means true and false. Instants carry an offset (2026-11-21T00:00:00Z), booleans are
    true/false, 1/0 or yes/no. Whitespace around a cell is cut off, blank lines are left out. A next_refresh_at before
    the end of the window that a user was last granted for is moved to that end: no import earns anything twice.

    While changed users are written, nobody else can change them: import millions when your app is quiet.

    \b
    Examples:
      credits users import users.csv
      credits users import users.csv --skip-bad rejects.csv
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    try:
        report = _import(file, rejects)
    except BadRowsError as error:
        _say_bad(file, error, as_json=as_json)
        ctx.exit(ERROR)
    answer(_sentence(file, report, rejects), _facts(file, report, rejects), as_json=as_json)
    if report.unscheduled:
        err.print(
            f"Unscheduled: {report.unscheduled:,} of them without a next_refresh_at. No scan refreshes them until "
            "`credits users stagger` spreads them evenly over their plan's interval, or an import gives them a date in "
            "that column.",
            soft_wrap=True,
        )


def _import(path: Path, rejects: Path | None) -> Report:
    with ExitStack() as stack:
        # The header and the rejects' name first: a server is started only for an import that can be one.
        rows = stack.enter_context(_opened(path))
        columns = [column.name for column in rows.columns]
        bad = stack.enter_context(reject_file(rejects, columns)) if rejects is not None else None
        on_progress = stack.enter_context(_progress(rows))
        database = stack.enter_context(session()).database
        with database.transaction() as connection:
            on_reject = bad.add if bad is not None else None
            report = import_users(connection, rows, actor=actor(), on_reject=on_reject, on_progress=on_progress)
            if bad is not None:
                bad.flush()
        return report


@contextmanager
def _opened(path: Path) -> Iterator[UserFile]:
    try:
        file = path.open("rb", buffering=READ_BUFFER_BYTES)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield UserFile(file, str(path))


@contextmanager
def _progress(rows: UserFile) -> Iterator[Callable[[str, int], None]]:
    with progress(in_bytes=True) as bar:
        task = bar.add_task("Reading", total=rows.size)
        yield lambda stage, read: bar.update(task, description=stage, completed=read)


def _sentence(file: Path, report: Report, rejects: Path | None) -> str:
    parts = [f"{report.new:,} new", f"{report.changed:,} changed"]
    if report.unchanged:
        parts.append(f"{report.unchanged:,} unchanged")
    parts.append(f"{report.bad:,} bad" + (f" (see {rejects})" if report.bad else ""))
    text = f"Imported {report.users:,} {'user' if report.users == 1 else 'users'} from {file}: {', '.join(parts)}."
    if report.kept:
        text += f" Kept: {report.kept:,} dates later than the file's, until which those users have been granted."
    return text


def _facts(file: Path, report: Report, rejects: Path | None) -> dict[str, Any]:
    return {
        "file": str(file),
        "users": report.users,
        "new": report.new,
        "changed": report.changed,
        "unchanged": report.unchanged,
        "bad": report.bad,
        "keptNextRefreshAt": report.kept,
        "unscheduled": report.unscheduled,
        "rejects": str(rejects) if report.bad else None,
    }


def _say_bad(file: Path, error: BadRowsError, *, as_json: bool) -> None:
    for line, reason in error.examples:
        err.print(f"{file}, line {line}: {reason}", soft_wrap=True, markup=False)
    more = error.bad - len(error.examples)
    if more:
        err.print(f"… and {more:,} more bad rows.")
    rows = "1 row is" if error.bad == 1 else f"{error.bad:,} rows are"
    err.print(
        f"Nothing was imported, because {rows} bad. --skip-bad REJECTS.csv imports the others.",
        soft_wrap=True,
        markup=False,
    )
    if as_json:
        examples = [{"line": line, "reason": reason} for line, reason in error.examples]
        nothing = Report(new=0, changed=0, unchanged=0, bad=error.bad, kept=0, unscheduled=0)
        answer("", {**_facts(file, nothing, None), "rejects": None, "badRows": examples}, as_json=True)


@users.command()
@click.argument("user", metavar="USER")
@json_option
def show(*, user: str, as_json: bool) -> None:
    """Show a user: the facts, the verdict, and the next six windows. USER is your app's own id of them.

    The windows are in the user's local time, else the plan's, and in UTC. Their amount is what a refresh aims at; how
    many credits that adds depends on what is left then. A held user's are those after the hold, or after a release
    now.

    \b
    With --json: what `credits why` says, and email, timezone, creditRefreshDay, customCreditAmount, createdAt, and
    windows (startsAt, endsAt, local, timezone, amount).

    \b
    Example:
      credits users show user-42
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        verdict = explain_user(connection, user)
        windows = user_windows(connection, verdict.user_id)
    text = explanation(verdict)
    if as_json:
        shown = {
            **verdict.facts(),
            "email": verdict.email,
            "timezone": verdict.timezone,
            "creditRefreshDay": verdict.credit_refresh_day,
            "customCreditAmount": verdict.custom_credit_amount,
            "createdAt": verdict.created_at.isoformat(),
            "windows": [window.facts() for window in windows],
            "text": text,
        }
        answer("", shown, as_json=True)
        return
    out.print(facts(user, _known(verdict)))
    out.print(text, soft_wrap=True, markup=False)
    if windows:
        out.print(table("Next windows", window_rows(windows)))


def _known(verdict: Verdict) -> dict[str, Any]:
    known = {
        "email": verdict.email,
        "plan": verdict.plan_code,
        "balance": verdict.credit_balance,
        "next refresh": moment(verdict.next_refresh_at) if verdict.next_refresh_at else None,
        "amount of their own": verdict.custom_credit_amount,
        "day of their own": verdict.credit_refresh_day,
        "time zone of their own": verdict.timezone,
        "since": moment(verdict.created_at),
        "verdict": verdict.verdict,
    }
    return {name: value for name, value in known.items() if value is not None}


@users.command()
@click.option("--plan", metavar="CODE", help="Users of this plan alone.")
@yes_option
@json_option
def stagger(*, plan: str | None, yes: bool, as_json: bool) -> None:
    """Give every unscheduled user a date, spread evenly over their plan's interval.

    Unscheduled are active users on an active plan who have no next_refresh_at: imported without a date. On a rolling
    plan they are spread over the next interval, in an order that depends on their external_id alone. On a calendar
    plan, or with a day of their own, they get the next boundary. Nothing is granted before the date.

    \b
    Examples:
      credits users stagger
      credits users stagger --plan free --yes
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened:
        # All in one statement: a million users take longer than the limit of a batch.
        with opened.database.transaction(lock_timeout=OPENING_LOCK_TIMEOUT) as connection:
            unscheduled = count_unscheduled(connection, plan)
        if unscheduled:
            confirm(f"Give a date to {counted(unscheduled, 'unscheduled user')}?", yes=yes)
        with opened.database.transaction(lock_timeout=OPENING_LOCK_TIMEOUT) as connection:
            days = stagger_users(connection, actor=actor(), plan=plan) if unscheduled else []
            left = count_unscheduled(connection, plan)
    dated = sum(day.users for day in days)
    text = f"Staggered {counted(dated, 'user')}." if dated else "Nobody is unscheduled."
    if left:
        text += f" Left {counted(left, 'user')}, whom somebody else had locked or who came meanwhile: run it again."
    distribution = [{"planCode": day.plan_code, "day": day.day.isoformat(), "users": day.users} for day in days]
    if days and not as_json:
        out.print(bars("First refreshes a day (UTC)", [(day.day, day.users) for day in days]))
    answer(text, {"users": dated, "left": left, "days": distribution}, as_json=as_json)
