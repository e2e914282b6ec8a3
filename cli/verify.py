"""`credits verify`: read the books and say what in them cannot be right."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, json_option, out, progress
from cli.session import session
from refresh import verify as audit

if TYPE_CHECKING:
    from rich.progress import Progress

    from refresh.verify_kinds import Check

LIMIT = 1_000


@click.command()
@click.option("--top-ups", is_flag=True, help="The app sells or returns credits: balances may rise between refreshes.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=LIMIT,
    show_default=True,
    help="Findings of one name that are shown; the others are counted.",
)
@json_option
@click.pass_context
def verify(ctx: click.Context, *, top_ups: bool, limit: int, as_json: bool) -> None:
    """Check that the books are right: every balance change explained, no window granted twice, nobody overdue.

    It reads everything at one instant, changes nothing and locks nobody; ten million rows take some minutes. Each
    finding has a name, the user or the run, the facts and a way out. Beat does this every night.

    \b
    Exit codes: 0 nothing found, 3 something found.

    \b
    Examples:
      credits verify
      credits verify --top-ups
      credits verify --json --limit 100 | jq '.counts'
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.transaction() as connection, progress() as bar:
        shown: list[dict[str, object]] = []
        terms = audit.Terms(
            opened.settings.interval,
            opened.settings.credit_refresh_cron,
            enabled=opened.settings.credit_refresh_enabled,
            dry_run=opened.settings.credit_refresh_dry_run,
            top_ups=top_ups,
        )
        began = time.monotonic()
        report = audit.verify(
            connection,
            terms,
            limit=limit,
            on_finding=(lambda finding: shown.append(finding.facts())) if as_json else _print,
            on_check=_Steps(bar),
        )
        report.seconds = time.monotonic() - began
    answer(_summary(report, limit), _facts(report, shown), as_json=as_json)
    if report.findings:
        ctx.exit(FINISHED_WITH_FAILURES)


class _Steps:
    """Moves the bar on: a step for each check."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("Counting", total=len(audit.CHECKS))
        self._begun = 0

    def __call__(self, check: Check) -> None:
        self._bar.update(self._task, description=check.title, completed=self._begun)
        self._begun += 1


def _print(finding: audit.Finding) -> None:
    out.print(f"{finding.name}: {finding.about}: {finding.text}.", soft_wrap=True, markup=False)
    out.print(f"    {finding.way_out}.", soft_wrap=True, markup=False)


def _summary(report: audit.Report, limit: int) -> str:
    more = sum(count - limit for count in report.counts.values() if count > limit)
    return report.summary + (f" {more:,} of them are not shown: --limit shows more." if more else "")


def _facts(report: audit.Report, shown: list[dict[str, object]]) -> dict[str, Any]:
    return {
        "at": report.books.at.isoformat(),
        "booksSince": report.books.since.isoformat() if report.books.since else None,
        "historyRows": report.books.history,
        "auditRows": report.books.audit,
        "users": report.books.users,
        "counts": dict(report.counts),
        "findings": shown,
        "seconds": round(report.seconds, 3),
    }
