"""`credits retention`: drop what is older than somebody wants to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.output import answer, json_option, out, progress, table
from cli.session import actor, session
from cli.words import confirm, counted, yes_option
from refresh import retention as domain

if TYPE_CHECKING:
    from datetime import datetime

    from refresh.retention_drop import Partition

_MIB = 2**20
_MONTHS_MAX = 1_200


@click.command()
@click.option(
    "--months",
    type=click.IntRange(domain.MONTHS_MIN, _MONTHS_MAX),
    metavar="N",
    help="Keep the N months before this one, instead of CREDIT_REFRESH_RETENTION_MONTHS.",
)
@click.option("--dry-run", is_flag=True, help="Show what would go, and change nothing.")
@yes_option
@json_option
def retention(*, months: int | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Drop the months of history and audit that are too old, and rows that nobody will ask for again.

    Whole months go, of both ledgers at once; what the books need of them is kept: windows that have not ended, each
    user's last grant, imports, holds that are still on. Runs stay, with their totals; their batches go with the
    months, so that an old run can no more be rolled back, applied or retried. The planned rows of dry runs go after
    CREDIT_REFRESH_PLANNED_DAYS. Without a number of months, history and audit stay as they are.

    Beat does this every night. Batches go on meanwhile; somebody who reads the tables for long, as a dump does, makes
    it give up, with nothing done.

    \b
    With --json: dryRun, booksSince, heldBackBy (the unfinished run that keeps older months), partitions (each with
    table, name, since, until, rows, sizeBytes), historyRowsKept, auditRowsKept, plannedRows, batchRows.

    \b
    Examples:
      credits retention --dry-run
      credits retention --months 24
      credits retention --yes --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        terms = domain.Terms(
            months or opened.settings.credit_refresh_retention_months, opened.settings.credit_refresh_planned_days
        )
        found = domain.survey(connection, terms)
        if not as_json:
            _show(found)
        if dry_run or found.nothing:
            answer(_words(found), {"dryRun": dry_run, **found.facts()}, as_json=as_json)
            return
        confirm(_question(found), yes=yes)
        with progress() as bar:
            task = bar.add_task("Dropping", total=found.planned_rows + found.batch_rows)
            report = domain.carry_out(
                connection, terms, actor=actor(), on_rows=lambda deleted: bar.advance(task, deleted)
            )
    facts = {"dryRun": False, "heldBackBy": found.facts()["heldBackBy"], **report.facts()}
    answer(report.summary, facts, as_json=as_json)


def _show(found: domain.Survey) -> None:
    if found.partitions:
        out.print(table("Months that go", [_row(partition) for partition in found.partitions]))


def _row(partition: Partition) -> dict[str, Any]:
    return {
        "partition": partition.name,
        "from": _day(partition.since) if partition.since else "what was kept before",
        "to": _day(partition.until),
        "rows": partition.rows,
        "MiB": round(partition.size_bytes / _MIB),
    }


def _day(at: datetime) -> str:
    return f"{at:%Y-%m-%d}"


def _words(found: domain.Survey) -> str:
    horizon = found.horizon
    held = (
        f" Run {horizon.held_back_by} has not ended, and keeps older months."
        if horizon is not None and horizon.held_back_by is not None
        else ""
    )
    if found.nothing:
        months = " No months are set to be kept: history and audit stay whole." if horizon is None else ""
        return f"Nothing is too old.{months}{held}"
    return f"{_what(found)} would go.{held}"


def _what(found: domain.Survey) -> str:
    parts = []
    if found.partitions and found.horizon is not None:
        rows = sum(partition.rows for partition in found.partitions)
        parts.append(
            f"{counted(rows, 'row')} of history and audit before {_day(found.horizon.at)}, but for those still needed"
        )
    if found.planned_rows:
        parts.append(f"{counted(found.planned_rows, 'planned row')} of {counted(found.planned_runs, 'dry run')}")
    if found.batch_rows:
        parts.append(f"{counted(found.batch_rows, 'batch row')} of old runs")
    return "; ".join(parts)


def _question(found: domain.Survey) -> str:
    return f"{_what(found)} will go for good. Go on?"
