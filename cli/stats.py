"""`credits stats`: how runs went in a period, what failed and why, and how the users stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.output import answer, json_option, out, progress, table
from cli.session import session
from cli.types import Instant
from cli.words import counted, moment
from refresh import stats as domain
from refresh.errors import RefusedError

if TYPE_CHECKING:
    from datetime import datetime

    from refresh.stats import Runs, Stats

_VERDICTS = {
    "due": "due",
    "not_due": "not due yet",
    "held": "held",
    "inactive": "inactive",
    "no_plan": "without an active plan",
    "external": "by webhook only",
    "unscheduled": "unscheduled",
    "overflow": "overflowing 64 bits",
}
# Of a regrid, moved; of a rollback, taken back from; of a dry run, planned.
_DONE = "done"


@click.command()
@click.option(
    "--days",
    type=click.IntRange(1, domain.DAYS_MAX),
    metavar=f"1..{domain.DAYS_MAX}",
    help=f"The last so many times 24 hours.  [default: {domain.DAYS}]",
)
@click.option("--since", type=Instant(), metavar="T", help="From this instant on, instead.")
@json_option
def stats(*, days: int | None, since: datetime | None, as_json: bool) -> None:
    """Show how the runs went that ended in a period, what failed and why, and how the users stand now.

    Success is said of the live runs that grant: refreshes, applies and their retries. Of users, those refreshed among
    those refreshed or failed; of runs, those without a failed user among those not cancelled. Durations are of the runs
    that had users. Dry runs are counted apart.

    Errors that differ in numbers alone are one cause. Grants by source include those outside any run: at insert, by
    the host's call, by the spend trigger.

    \b
    With --json: at, since; granting (runs, succeeded, partial, failed, cancelled, empty, usersRefreshed, usersHeld,
    usersSkipped, usersFailed, credits, medianSeconds, p95Seconds, maxSeconds, usersPerSecond, userSuccessRate,
    runSuccessRate); byKind (kind, dryRun and the same without rates); takenBack (users, credits); failures (total,
    causes, top: error, failures, runs, exampleUserId, exampleRunId); grants (windowsSince, bySource: source, grants,
    credits); users (total, due, notDue, held, inactive, noPlan, external, unscheduled, overflow, overdue,
    overdueBefore, dueSince).

    \b
    Examples:
      credits stats
      credits stats --days 1
      credits stats --since 2026-11-01T00:00:00Z --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    if days is not None and since is not None:
        raise RefusedError(f"--days {days} and --since {since.isoformat()} say the same thing twice: give one of them")
    with session() as opened, progress() as bar:
        bar.add_task("Reading runs, grants and users", total=None)
        with opened.database.transaction() as connection:
            found = domain.read_stats(
                connection,
                interval=opened.settings.interval,
                cron=opened.settings.credit_refresh_cron,
                days=days or domain.DAYS,
                since=since,
            )
    if as_json:
        answer("", found.facts(), as_json=True)
        return
    _show(found)


def _show(found: Stats) -> None:
    out.print(f"{moment(found.since)} to {moment(found.at)}", style="bold")
    for sentence in _sentences(found):
        out.print(sentence, soft_wrap=True, markup=False)
    if found.by_kind:
        out.print(table("Runs that have ended", [_ended(runs) for runs in found.by_kind]))
        out.print(table("Their users", [_users(runs) for runs in found.by_kind]))
    if found.causes:
        shown = len(found.causes)
        title = "Failures by cause"
        if shown < found.causes_total:
            title += f": the {shown} most frequent of {found.causes_total:,}"
        rows = [
            {
                "failures": cause.failures,
                "runs": cause.runs,
                "error": cause.error,
                "such as user": cause.user,
                "in run": cause.run_id,
            }
            for cause in found.causes
        ]
        out.print(table(title, rows))
    if found.sources:
        rows = [{"source": it.source, "grants": it.grants, "credits": it.credits} for it in found.sources]
        out.print(table("Grants by source", rows))
        out.print(f"(For windows since {moment(found.sources_since)}; grants for older ones are not counted.)")
    rows = [{"users now": _VERDICTS[verdict], "": users} for verdict, users in found.users.by_verdict.items() if users]
    if rows:
        out.print(table("Users", rows))
    if found.users.overdue:
        out.print(
            f"Overdue: {counted(found.users.overdue, 'user')} due since before {moment(found.users.overdue_before)}, "
            f"whom {domain.MANY_SLOTS} scans have left out. `credits doctor` looks for the reason.",
            soft_wrap=True,
        )


def _sentences(found: Stats) -> list[str]:
    runs = found.granting
    if not runs.runs:
        return ["No run that grants has ended in that time."]
    empty = f", {runs.empty:,} of which found nobody due" if runs.empty else ""
    said = [f"Runs that grant: {runs.runs:,}{empty}; {_share(runs.run_success_rate)} succeeded."]
    if runs.user_success_rate is not None:
        said.append(
            f"Users: {runs.users_refreshed:,} refreshed with {counted(runs.credits, 'credit')}, "
            f"{runs.users_held:,} held, {runs.users_skipped:,} skipped, {runs.users_failed:,} failed; "
            f"{_share(runs.user_success_rate)} success."
        )
    if found.users_taken_back:
        said.append(
            f"Taken back by rollbacks: {counted(found.credits_taken_back, 'credit')} of "
            f"{counted(found.users_taken_back, 'user')}."
        )
    if runs.median_seconds is not None:
        said.append(
            f"Duration: median {runs.median_seconds:,.1f} s, 95 % within {runs.p95_seconds:,.1f} s, longest "
            f"{runs.max_seconds:,.1f} s; {runs.users_per_second or 0:,.0f} users per second."
        )
    return said


def _ended(runs: Runs) -> dict[str, Any]:
    return {
        "kind": _kind(runs),
        "runs": runs.runs,
        "succeeded": runs.succeeded,
        "partial": runs.partial,
        "failed": runs.failed,
        "cancelled": runs.cancelled,
        "median s": f"{runs.median_seconds:,.1f}" if runs.median_seconds is not None else None,
        "longest s": f"{runs.max_seconds:,.1f}" if runs.max_seconds is not None else None,
    }


def _users(runs: Runs) -> dict[str, Any]:
    return {
        "kind": _kind(runs),
        _DONE: runs.users_refreshed,
        "held": runs.users_held,
        "skipped": runs.users_skipped,
        "failed": runs.users_failed,
        "credits": runs.credits,
    }


def _kind(runs: Runs) -> str:
    return f"{runs.kind} (dry)" if runs.dry_run else str(runs.kind)


def _share(rate: float | None) -> str:
    """A percentage that says 100 and 0 of nothing less."""
    if rate is None:
        return "none"
    if 0 < rate < 1:
        return f"{min(max(rate * 100, 0.01), 99.99):.2f} %"
    return f"{rate:.0%}".replace("%", " %")
