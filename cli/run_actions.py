"""`credits runs retry` and `credits runs cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.asking import inherited_pace_option, key_option, reason_option
from cli.output import answer, json_option
from cli.publishing import answer_run, carry_out, prepare_broker
from cli.session import Session, actor, session
from cli.words import confirm, counted, yes_option
from refresh import runs
from refresh.cancel import cancel_run
from refresh.errors import RefusedError
from refresh.retry import open_retry, read_retriable
from refresh.run_list import find_run, read_line

if TYPE_CHECKING:
    from uuid import UUID

    from refresh.cancel import Cancelled

_DOING = {"refresh": "Refreshing", "apply": "Applying", "rollback": "Rolling back", "regrid": "Moving"}


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--reason", default="credits runs retry", show_default=True, help="For whoever asks why.")
@key_option
@inherited_pace_option
@click.option("--wait", is_flag=True, help="Stay, and show progress to the end.")
@yes_option
@json_option
@click.pass_context
def retry(  # noqa: PLR0913 - one for each option
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
    """Take up the users of a run who failed, as a new run.

    Those are the users whom the database refused, the users of batches that were given up, and, of a cancelled run,
    those whose batch was never begun. What the run was asked for is asked for again, and each batch decides anew:
    whoever was refreshed since is skipped. Users in an unfinished batch of another run are left to that one.

    A run may be retried several times. The exit code with --wait is 3 when users failed again.

    \b
    With --json: what `credits runs list --json` says of the new run; existing (it was opened with this key before),
    and retriedRunId.

    \b
    Examples:
      credits runs retry 3f2a91c0
      credits runs retry 3f2a91c0 --wait --yes --reason 'the trigger is mended'
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session(broker=True) as opened:
        prepare_broker(opened)
        run_id = _ask(opened, run, yes=yes, repeatable=idempotency_key is not None)
        request = runs.Request(
            "cli",
            actor(),
            opened.settings.credit_refresh_batch_size,
            reason=reason,
            idempotency_key=idempotency_key,
            max_users_per_second=max_users_per_second,
        )
        with opened.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            begun = open_retry(connection, run_id, request)
        with opened.database.statements() as connection:
            work = read_line(connection, begun.run_id).work
        carried = carry_out(opened, begun, wait=wait, doing=_DOING[work])
        text = (
            f"Run {begun.run_id} retries run {run_id}: {counted(begun.users_selected, 'user')}, "
            f"{begun.batches_total:,} batches published."
        )
        answer_run(ctx, carried, text, {"retriedRunId": str(run_id)}, as_json=as_json)


def _ask(opened: Session, run: str, *, yes: bool, repeatable: bool) -> UUID:
    with opened.database.statements() as connection:
        run_id = find_run(connection, run)
        try:
            failed = read_retriable(connection, run_id)
        except RefusedError:
            # A request that comes again may find nobody left. The door knows whether it opened a run before.
            if repeatable:
                return run_id
            raise
    elsewhere = f" ({failed.users_elsewhere:,} more are left to other runs)" if failed.users_elsewhere else ""
    confirm(f"Retry {counted(failed.users, 'user')} of run {run_id}{elsewhere}?", yes=yes)
    return run_id


@click.command()
@click.argument("run", metavar="RUN")
@reason_option
@yes_option
@json_option
def cancel(*, run: str, reason: str, yes: bool, as_json: bool) -> None:
    """Cancel a run: batches that a worker has are finished, the others are not begun.

    Nothing is taken back (`credits runs rollback` does that). Whoever was not refreshed is due as before, and
    `credits runs retry` takes them up.

    \b
    With --json: runId, kind, work, dryRun, status, batchesCancelled, usersCancelled, usersSelected, usersRefreshed,
    usersHeld, usersSkipped, usersFailed, creditsGranted.

    \b
    Examples:
      credits runs cancel 3f2a91c0 --reason 'wrong amount'
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened:
        with opened.database.statements() as connection:
            line = read_line(connection, find_run(connection, run))
        if line.status != "running":
            raise RefusedError(f"run {line.run_id} had ended already: {line.status}")
        left = counted(line.users_selected - line.users_done, "user")
        confirm(f"Run {line.run_id} ({line.kind}) has {left} left. Cancel it?", yes=yes)
        with opened.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            cancelled = cancel_run(connection, line.run_id, actor=actor(), reason=reason)
    if cancelled.status != "cancelled":
        raise RefusedError(f"run {line.run_id} had ended already: {cancelled.status}")
    answer(_sentence(cancelled), cancelled.facts(), as_json=as_json)


def _sentence(cancelled: Cancelled) -> str:
    run_id, left = cancelled.ended.run_id, counted(cancelled.users, "user")
    if cancelled.ended.dry_run:
        return f"Run {run_id} is cancelled: {left} not looked at."
    what = {
        "refresh": f"{left} not refreshed, due as before",
        "apply": f"{left} left as they are",
        "rollback": f"from {left} nothing was taken back",
        "regrid": f"{left} left on their old date",
    }[cancelled.work]
    return f"Run {run_id} is cancelled: {what}; `credits runs retry {run_id}` takes them up."
