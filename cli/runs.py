"""`credits runs`: the runs there are and were. What acts on a run lives in files of its own and is added at the end."""

from __future__ import annotations

from datetime import UTC
from typing import Any

import click

from cli.apply import apply
from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, err, json_option, out, table
from cli.rollback import rollback
from cli.run_actions import cancel, retry
from cli.run_show import show
from cli.scan import summary, wait_for_run
from cli.session import session
from cli.types import Instant
from refresh.run_list import KINDS, SOURCES, STATUSES, RunLine, Wanted, find_run, list_runs, read_line

LIMIT = 20
LIMIT_MAX = 1_000
WIDE_COLUMNS = 150
"""A terminal narrower than this shows the columns that matter most; all of them would be cut to shreds."""
_ID_SHOWN = 8


@click.group()
def runs() -> None:
    """Look at runs: all of them, one, or one at work.

    RUN is the run's id, or at least the first 4 characters of it, as far as they are its alone.
    """


@runs.command("list")
@click.option("--status", type=click.Choice(STATUSES), help="Runs of this status alone.")
@click.option("--kind", type=click.Choice(KINDS), help="Runs of this kind alone.")
@click.option("--source", type=click.Choice(SOURCES), help="Runs that came in this way alone.")
@click.option("--dry-run/--live", default=None, help="Dry runs alone, or those alone that change users.")
@click.option("--since", type=Instant(), metavar="T", help="Opened at T or later.")
@click.option("--before", metavar="RUN", help="Older than this run: the next page.")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=LIMIT, show_default=True, metavar="N", help="At most N."
)
@json_option
def list_(*, before: str | None, limit: int, as_json: bool, **filters: Any) -> None:
    """List runs, the newest first.

    On a terminal of 150 columns or more, with the users held and skipped, the seconds, who asked and why.

    \b
    With --json: runs, of which each has runId, createdAt, kind, work, source, status, dryRun, usersSelected,
    usersDone, usersRefreshed, usersHeld, usersSkipped, usersFailed, creditsGranted, seconds, requestedBy, reason,
    maxUsersPerSecond (null where it has no pace); and next, the run to give to --before for the next page, null on the
    last one.

    \b
    Examples:
      credits runs list
      credits runs list --status partial --since 2026-11-01T00:00:00Z
      credits runs list --source beat --live --limit 100 --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        older_than = find_run(connection, before) if before is not None else None
        found, more = list_runs(connection, Wanted(before=older_than, **filters), limit=limit)
    if as_json:
        following = str(found[-1].run_id) if more else None
        answer("", {"runs": [line.facts() for line in found], "next": following}, as_json=True)
        return
    if not found:
        out.print(
            "There are no such runs."
            if before or any(value is not None for value in filters.values())
            else "There are no runs yet."
        )
        return
    row = _wide if out.width >= WIDE_COLUMNS else _narrow
    out.print(table("Runs", [row(line) for line in found]))
    if more:
        err.print(f"There are more: --before {str(found[-1].run_id)[:_ID_SHOWN]}")


@runs.command()
@click.argument("run", metavar="RUN")
@json_option
@click.pass_context
def watch(ctx: click.Context, *, run: str, as_json: bool) -> None:
    """Watch a run until it has ended: progress on a terminal, then the summary. Ctrl-C ends the watching alone.

    A run that has ended already is summed up at once. The exit code is 3 when users failed.

    \b
    With --json: what `credits runs list --json` says of a run.

    \b
    Examples:
      credits runs watch 3f2a91c0
      credits runs watch 3f2a91c0 --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened:
        with opened.database.statements() as connection:
            line = read_line(connection, find_run(connection, run))
        done = wait_for_run(opened, line.run_id, _DOING[line.work])
        with opened.database.statements() as connection:
            line = read_line(connection, line.run_id)
    answer(summary(done), line.facts(), as_json=as_json)
    if line.users_failed:
        ctx.exit(FINISHED_WITH_FAILURES)


_DOING = {"refresh": "Refreshing", "apply": "Applying", "rollback": "Rolling back", "regrid": "Moving"}


def _narrow(line: RunLine) -> dict[str, Any]:
    return {
        "run": str(line.run_id)[:_ID_SHOWN],
        "created": f"{line.created_at.astimezone(UTC):%m-%d %H:%M}",
        "kind": _kind(line) + (", dry" if line.dry_run else ""),
        "status": line.status,
        "users": _done(line),
        "failed": line.users_failed,
        "credits": line.credits_granted,
    }


def _wide(line: RunLine) -> dict[str, Any]:
    return {
        "run": str(line.run_id)[:_ID_SHOWN],
        "created": f"{line.created_at.astimezone(UTC):%m-%d %H:%M}",
        "kind": _kind(line) + (", dry" if line.dry_run else ""),
        "status": line.status,
        "users": _done(line),
        "refreshed": line.users_refreshed,
        "held": line.users_held,
        "skipped": line.users_skipped,
        "failed": line.users_failed,
        "credits": line.credits_granted,
        "requested by": line.requested_by,
        "reason": line.reason,
    }


def _kind(line: RunLine) -> str:
    return line.kind if line.kind == line.work else f"{line.kind} of {line.work}"


def _done(line: RunLine) -> str:
    if line.users_done == line.users_selected:
        return f"{line.users_done:,}"
    return f"{line.users_done:,}/{line.users_selected:,}"


# Commands with a file of their own: import each above, add it here.
runs.add_command(show)
runs.add_command(apply)
runs.add_command(rollback)
runs.add_command(retry)
runs.add_command(cancel)
