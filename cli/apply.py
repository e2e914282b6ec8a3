"""`credits runs apply`: execute what a dry run planned."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import click

from cli.asking import inherited_pace_option, key_option, reason_option
from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, json_option
from cli.publishing import prepare_broker, publish, refuse, wait_for_run
from cli.session import Session, actor, session
from cli.words import confirm, counted, moment, yes_option
from refresh import apply as applying
from refresh import runs
from refresh.run_detail import read_run
from refresh.run_list import find_run

if TYPE_CHECKING:
    from refresh.run_detail import Applied
    from refresh.run_list import RunLine


@click.command()
@click.argument("run", metavar="RUN")
@reason_option
@key_option
@inherited_pace_option
@click.option("--wait", is_flag=True, help="Stay, and show progress to the end.")
@yes_option
@json_option
@click.pass_context
def apply(  # noqa: PLR0913 - one for each option
    ctx: click.Context,
    *,
    run: str,
    reason: str,
    idempotency_key: str | None,
    max_users_per_second: int | None,
    wait: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Execute what a dry run planned: exactly that, for nobody else, and once. RUN is the dry run.

    Users for whom the rule would decide otherwise by now (another verdict, window, plan, mode or target), whose
    planned window has ended, or whom another run has refreshed since, are left alone: they have drifted. What users
    have spent since is no drift: the credits are computed anew, up to the target that was planned. A planned row that
    was changed is refused, and its user counts as failed.

    The exit code with --wait is 3 when users failed.

    \b
    With --json: what `credits runs list --json` says of the run that applies; existing (it was opened with this key
    before), dryRunId, usersPlanned, creditsPlanned, usersApplied, creditsApplied, usersDrifted and usersTampered. Of
    usersSkipped, those who have not drifted were deleted; of usersFailed, those whose row was not tampered with were
    refused by the database.

    \b
    Examples:
      credits bulk-refresh --plan pro --dry-run --wait --reason 'new amounts'
      credits runs apply 3f2a91c0 --wait --reason 'new amounts, approved by Kim'
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session(broker=True) as opened:
        prepare_broker(opened)
        dry_run = _ask(opened, run, yes=yes, repeatable=idempotency_key is not None)
        request = runs.Request(
            "cli",
            actor(),
            opened.settings.credit_refresh_batch_size,
            reason=reason,
            idempotency_key=idempotency_key,
            max_users_per_second=max_users_per_second,
        )
        with opened.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            begun = applying.open_apply(connection, dry_run.run_id, request)
        if isinstance(begun, runs.NotOpened):
            raise refuse(begun)
        if not begun.existing:
            publish(opened, begun.run_id)
        if wait:
            wait_for_run(opened, begun.run_id, "Applying")
        users_failed = _answer(opened, dry_run, begun, ended=wait, as_json=as_json)
    if wait and users_failed:
        ctx.exit(FINISHED_WITH_FAILURES)


def _ask(opened: Session, run: str, *, yes: bool, repeatable: bool) -> applying.DryRun:
    with opened.database.statements() as connection:
        dry_run = applying.read_dry_run(connection, find_run(connection, run))
    # The door checks for certain, and knows whether it was this very request that has applied it.
    if repeatable and dry_run.applied_by is not None:
        return dry_run
    applying.require_appliable(dry_run)
    users = counted(dry_run.users_planned, "user")
    credits_ = counted(dry_run.credits_planned, "credit")
    age = f"{moment(dry_run.created_at)} ({_age(dry_run.age_seconds)} ago)"
    confirm(
        f"Dry run {dry_run.run_id} of {age} planned {credits_} for {users}. Apply it?",
        yes=yes,
    )
    return dry_run


def _answer(opened: Session, dry_run: applying.DryRun, begun: runs.Opened, *, ended: bool, as_json: bool) -> int:
    """Say what was begun, or how it ended; returns how many users have failed."""
    with opened.database.statements() as connection:
        detail = read_run(connection, begun.run_id, failures=0)
        tampered = applying.count_tampered(connection, begun.run_id)
    assert detail.applied is not None  # noqa: S101 - of a run that applies
    facts = {
        **detail.line.facts(),
        "existing": begun.existing,
        "dryRunId": str(dry_run.run_id),
        **detail.applied.facts(),
        "usersTampered": tampered,
    }
    text = _summary(detail.line, detail.applied, tampered) if ended else _begun(begun, dry_run)
    answer(text, facts, as_json=as_json)
    return detail.line.users_failed


def _age(seconds: float) -> str:
    """How long ago, in the two largest units."""
    age = timedelta(seconds=int(seconds))
    hours, minutes = age.seconds // 3600, age.seconds // 60 % 60
    if age.days:
        return f"{counted(age.days, 'day')} {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{age.seconds} s"


def _begun(begun: runs.Opened, dry_run: applying.DryRun) -> str:
    if begun.existing:
        return f"Run {begun.run_id} was opened with this key before: it applies dry run {dry_run.run_id}."
    return (
        f"Run {begun.run_id} applies dry run {dry_run.run_id}: {counted(begun.users_selected, 'user')}, "
        f"{counted(dry_run.credits_planned, 'credit')} planned, {begun.batches_total:,} batches published."
    )


def _summary(line: RunLine, applied: Applied, tampered: int) -> str:
    gone = line.users_skipped - applied.users_drifted
    refused = line.users_failed - tampered
    rest = [
        f"{applied.users_drifted:,} had drifted",
        *([f"{gone:,} were deleted"] if gone else []),
        *([f"{tampered:,} had a planned row that was changed after the dry run"] if tampered else []),
        *([f"{refused:,} failed"] if refused else []),
    ]
    return (
        f"Run {line.run_id} {line.status} in {line.seconds:.1f} s. Planned: "
        f"{counted(applied.users_planned, 'user')}, {counted(applied.credits_planned, 'credit')}. "
        f"Applied: {counted(applied.users_applied, 'user')}, {counted(applied.credits_applied, 'credit')}; "
        f"{', '.join(rest)}."
    )
