"""`credits history`: what a user was granted, and what not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from cli.output import answer, err, json_option, out, table
from cli.session import session
from cli.types import Instant
from cli.words import moment
from refresh.history import user_history
from refresh.retention import books_since

if TYPE_CHECKING:
    from refresh.history import Entry

LIMIT = 20
LIMIT_MAX = 10_000
WIDE_COLUMNS = 170
"""As for `credits runs list`: a narrower terminal shows the columns that matter most."""
_ID_SHOWN = 8
_ID_MAX = 2**63 - 1


class _Before(click.ParamType[int | datetime]):
    """An entry's id, or an instant."""

    name = "entry or instant"

    def convert(
        self, value: str | int | datetime, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | datetime:
        """Parse: digits alone are an id."""
        if isinstance(value, int | datetime):
            return value
        if value.isascii() and value.isdigit():
            if int(value) > _ID_MAX:
                self.fail(f"{value} is no entry's id", param, ctx)
            return int(value)
        return Instant().convert(value, param, ctx)


@click.command()
@click.argument("user", metavar="USER")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=LIMIT, show_default=True, metavar="N", help="At most N."
)
@click.option("--before", type=_Before(), metavar="ID|T", help="Older than this entry, or than this instant.")
@json_option
def history(*, user: str, limit: int, before: int | datetime | None, as_json: bool) -> None:
    """Show a user's refreshes, the newest first. USER is your app's own id of them.

    Each window that was granted, held, skipped or failed, and each grant that a rollback took back. What dry runs
    planned is not there. On a terminal of 170 columns or more, with the window, the plan, the mode and the target.

    \b
    With --json: userId; entries, of which each has id, createdAt, status, source, runId, windowStart, windowEnd,
    firstMissedAt, windowsPassed, planCode, grantMode, target, oldBalance, creditsAdded, newBalance, shortfall, reason,
    error, reversedByRunId; next, the id to give to --before for the next page, null on the last one; and booksSince,
    from when on the books are whole, null where retention has dropped nothing. Credits are exact integers of up to
    64 bits.

    \b
    Examples:
      credits history user-42
      credits history user-42 --limit 100 --json
      credits history user-42 --before 2026-11-01T00:00:00Z
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        entries, more = user_history(connection, user, limit=limit, before=before)
        since = books_since(connection)
    if as_json:
        following = entries[-1].id if more else None
        shown = {"userId": user, "entries": [entry.facts() for entry in entries], "next": following}
        answer("", {**shown, "booksSince": since.isoformat() if since else None}, as_json=True)
        return
    if since is not None and not more:
        err.print(f"The books begin at {moment(since)}: of what is older, only what is still needed is there.")
    if not entries:
        out.print(f"No refresh of {user} is on record.", soft_wrap=True, markup=False)
        return
    row = _wide if out.width >= WIDE_COLUMNS else _narrow
    out.print(table(f"History of {user}", [row(entry) for entry in entries]))
    if more:
        err.print(f"There are more: --before {entries[-1].id}")


def _narrow(entry: Entry) -> dict[str, Any]:
    return {
        "on (UTC)": _minute(entry.created_at),
        "status": entry.status,
        "old": entry.old_balance,
        "added": entry.credits_added,
        "new": entry.new_balance,
        "by": _by(entry),
        "note": _note(entry),
    }


def _wide(entry: Entry) -> dict[str, Any]:
    return {
        "on (UTC)": _minute(entry.created_at),
        "status": entry.status,
        "window": f"{_minute(entry.window_start)} to {_minute(entry.window_end) if entry.window_end else 'open end'}",
        "plan": entry.plan_code,
        "mode": entry.grant_mode,
        "target": f"{entry.target:,}" if entry.target is not None else "",
        "old": entry.old_balance,
        "added": entry.credits_added,
        "new": entry.new_balance,
        "by": _by(entry),
        "note": _note(entry),
    }


def _note(entry: Entry) -> str:
    """What is out of the ordinary, and the reason that was given."""
    notes = []
    if entry.reversed_by_run_id is not None:
        notes.append(f"taken back by run {str(entry.reversed_by_run_id)[:_ID_SHOWN]}")
    if entry.shortfall:
        notes.append(f"{entry.shortfall:,} {'not taken' if entry.status == 'reversed' else 'less'}")
    if entry.windows_passed:
        notes.append(f"{entry.windows_passed:,} missed")
    return "; ".join([*notes, *(said for said in (entry.error, entry.reason) if said)])


def _by(entry: Entry) -> str:
    return f"run {str(entry.run_id)[:_ID_SHOWN]}" if entry.run_id else entry.source


def _minute(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"
