"""`credits runs show`: everything about one run."""

from __future__ import annotations

import json
from datetime import UTC
from typing import TYPE_CHECKING, Any

import click

from cli.output import answer, err, facts, json_option, out, table
from cli.session import session
from cli.words import moment
from refresh.retention import books_since
from refresh.run_detail import read_run
from refresh.run_list import find_run

if TYPE_CHECKING:
    from datetime import datetime

    from refresh.run_detail import Child, OneBatch, RunDetail

FAILURES = 20
FAILURES_MAX = 10_000


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--failures",
    type=click.IntRange(0, FAILURES_MAX),
    default=FAILURES,
    show_default=True,
    metavar="N",
    help="At most N failed users and N failed batches.",
)
@json_option
def show(*, run: str, failures: int, as_json: bool) -> None:
    """Show a run: what was asked, where its batches stand, what failed, and what became of it.

    Of an apply, what the dry run had planned stands beside what came of it, and how many users had changed since
    (drifted). Of a rollback: what was taken back, what had been spent and so was not (shortfall), and how many users
    were left alone, because another run has refreshed them since.

    The exit code is 0 however the run ended; `credits runs watch` tells by its own.

    \b
    With --json: what `credits runs list --json` says of a run; asOf, slot, parentRunId, subjectRunId, selection,
    force, keepWindow, amount, atomic, idempotencyKey, startedAt, finishedAt, cancelledBy, cancelReason, error;
    children (runId, kind, work, status, dryRun, createdAt, requestedBy), batches by status (status, batches, users,
    usersDeferred, attempts, credits), oldestPending and failedBatches (batchId, seq, users, attempts, publishedAt,
    nextAttemptAt, error), failedUsers (userId, id, error); apply (usersPlanned,
    creditsPlanned, usersApplied, creditsApplied, usersDrifted) and rollback (usersReversed, creditsTakenBack,
    shortfall, usersRefreshedSince: null for a dry run, which counts them as skipped), each null for other runs.

    \b
    Examples:
      credits runs show 3f2a91c0
      credits runs show 3f2a91c0 --failures 1000 --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.statements() as connection:
        detail = read_run(connection, find_run(connection, run), failures=failures)
        since = books_since(connection)
    if as_json:
        answer("", detail.facts(), as_json=True)
        return
    if since is not None and detail.line.created_at < since:
        err.print(f"The books begin at {moment(since)}: of this run, which is older, retention has dropped rows.")
    out.print(facts(f"Run {detail.line.run_id}", _known(detail)))
    for title, rows in _tables(detail).items():
        if rows:
            out.print(table(title, rows))
    for child in detail.children:
        out.print(_sentence(child), soft_wrap=True, markup=False)


def _known(detail: RunDetail) -> dict[str, Any]:
    """The run's row in words, without what nobody asked for."""
    line, asked = detail.line, detail.asked
    flags = {"dry run": line.dry_run, "force": asked.force, "keep window": asked.keep_window, "atomic": asked.atomic}
    known = {
        "status": line.status,
        "kind": line.kind if line.kind == line.work else f"{line.kind} of {line.work}",
        "with": ", ".join(flag for flag, given in flags.items() if given) or None,
        "requested by": f"{line.requested_by}, by {line.source}",
        "reason": line.reason,
        "selection": json.dumps(asked.selection, ensure_ascii=False) if asked.selection else None,
        "as of": _exactly(asked.as_of),
        "slot": _exactly(asked.slot),
        "amount": asked.amount,
        "at most": f"{line.max_users_per_second:,} users/s" if line.max_users_per_second else None,
        "idempotency key": asked.idempotency_key,
        "parent": asked.parent_run_id,
        "subject": asked.subject_run_id if asked.subject_run_id != asked.parent_run_id else None,
        "created": _exactly(line.created_at),
        "started": _exactly(asked.started_at),
        "finished": _exactly(asked.finished_at),
        "seconds": f"{line.seconds:,.1f}",
        "cancelled by": asked.cancelled_by,
        "cancelled because": asked.cancel_reason,
        "users selected": line.users_selected,
        "users done": line.users_done,
        "refreshed": line.users_refreshed,
        "held": line.users_held,
        "skipped": line.users_skipped,
        "failed": line.users_failed,
        "credits": line.credits_granted,
        "error": asked.error,
    }
    return {name: value for name, value in known.items() if value is not None}


def _tables(detail: RunDetail) -> dict[str, list[dict[str, Any]]]:
    """What there is besides the run's row, by title."""
    return {
        "Planned and applied": _applied(detail),
        "Taken back": _taken_back(detail),
        "Batches": [
            {
                "status": group.status,
                "batches": group.batches,
                "users": group.users,
                "put off": group.users_deferred,
                "most attempts": group.attempts,
                "credits": group.credits,
            }
            for group in detail.batches
        ],
        "Oldest pending batch": [_batch(detail.oldest_pending)] if detail.oldest_pending else [],
        "Failed batches": [_batch(batch) for batch in detail.failed_batches],
        f"Failed users ({len(detail.failed_users):,} of {detail.line.users_failed:,})": [
            {"user": user.external_id or f"{user.user_id}, deleted since", "error": user.error}
            for user in detail.failed_users
        ],
    }


def _applied(detail: RunDetail) -> list[dict[str, Any]]:
    if detail.applied is None:
        return []
    applied = detail.applied
    return [
        {"": "planned", "users": applied.users_planned, "credits": applied.credits_planned, "drifted": None},
        {
            "": "applied",
            "users": applied.users_applied,
            "credits": applied.credits_applied,
            "drifted": applied.users_drifted,
        },
    ]


def _taken_back(detail: RunDetail) -> list[dict[str, Any]]:
    if detail.taken_back is None:
        return []
    taken = detail.taken_back
    return [
        {
            "users": taken.users_reversed,
            "credits": taken.credits_taken_back,
            "shortfall": taken.shortfall,
            "left alone (refreshed since)": "among the skipped" if detail.line.dry_run else taken.users_refreshed_since,
        }
    ]


def _batch(batch: OneBatch) -> dict[str, Any]:
    return {
        "batch": batch.batch_id,
        "users": batch.users,
        "attempts": batch.attempts,
        "published": _exactly(batch.published_at),
        "next attempt": _exactly(batch.next_attempt_at),
        "error": batch.error,
    }


_BECAME = {"apply": "Applied", "rollback": "Rolled back", "retry": "Retried"}


def _sentence(child: Child) -> str:
    became = f"Dry {child.kind}" if child.dry_run else _BECAME.get(child.kind, child.kind)
    return f"{became} by run {child.run_id} on {moment(child.created_at)} ({child.requested_by}): {child.status}."


def _exactly(at: datetime | None) -> str | None:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if at is not None else None
