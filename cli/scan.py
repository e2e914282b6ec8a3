"""`credits scan`: open a run over all due users, now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, err, json_option, progress
from cli.session import Session, actor, session
from cli.types import Instant
from refresh import runs, totals
from tasks.app import check_broker, use_broker
from tasks.publish import publish_batches

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

POLL_SECONDS = 0.2
STALLED_SECONDS = 10.0
"""How long `--wait` sees nothing move before it says what is missing."""


@click.command()
@click.option("--dry-run", is_flag=True, help="Record what would be granted, row by row, and change no user.")
@click.option("--as-of", type=Instant(), metavar="T", help="Decide as of this instant (in the future: dry runs alone).")
@click.option("--wait", is_flag=True, help="Stay, and show progress to the end.")
@json_option
@click.pass_context
def scan(ctx: click.Context, *, dry_run: bool, as_of: datetime | None, wait: bool, as_json: bool) -> None:
    """Find all users whose window has elapsed and have the workers refresh them.

    Beat does this every hour by itself. A scan by hand is a run of its own beside beat's, takes no slot, and leaves
    out the users whom an unfinished run already has.

    \b
    Examples:
      credits scan --dry-run --wait
      credits scan --dry-run --as-of 2026-12-01T00:00:00Z
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session(broker=True) as opened:
        if not opened.settings.credit_refresh_enabled:
            _not_opened(runs.NotOpened("disabled"), as_json=as_json)
            return
        use_broker(opened.settings.redis_url)
        check_broker()  # before the run is open: a command that fails has done nothing
        request = runs.Request(
            "cli",
            actor(),
            opened.settings.credit_refresh_batch_size,
            dry_run=dry_run or opened.settings.credit_refresh_dry_run,
            as_of=as_of,
            reason="credits scan",
        )
        with opened.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            run = runs.open_run(connection, request)
        if isinstance(run, runs.NotOpened):
            _not_opened(run, as_json=as_json)
            return
        publish_batches(opened.database, max_attempts=opened.settings.credit_refresh_max_attempts, run_id=run.run_id)
        if not wait:
            kind = "Dry run" if run.dry_run else "Run"
            text = f"{kind} {run.run_id}: {run.users_selected:,} users due, {run.batches_total:,} batches published."
            answer(text, run.facts(), as_json=as_json)
            return
        done = wait_for_run(opened, run.run_id)
        answer(summary(done), done.facts(), as_json=as_json)
        if done.users_failed:
            ctx.exit(FINISHED_WITH_FAILURES)


def _not_opened(why: runs.NotOpened, *, as_json: bool) -> None:
    answer(f"Nothing was opened: {why.text}.", {"opened": False, "why": why.why}, as_json=as_json)


def summary(run: totals.Progress) -> str:
    """A finished run in a sentence."""
    if run.kind == "regrid":
        return (
            f"Run {run.run_id} {run.status} in {run.seconds:.1f} s: {run.users_refreshed:,} users moved to the new "
            f"grid, {run.users_skipped:,} skipped, {run.users_failed:,} failed."
        )
    would = "would be " if run.dry_run else ""
    return (
        f"Run {run.run_id} {run.status} in {run.seconds:.1f} s: {run.users_selected:,} users due, "
        f"{run.users_refreshed:,} {would}refreshed, {run.users_held:,} held, {run.users_skipped:,} skipped, "
        f"{run.users_failed:,} failed; {run.credits_granted:,} credits {would}granted."
    )


def wait_for_run(opened: Session, run_id: UUID, doing: str = "Refreshing") -> totals.Progress:
    """Show a run's progress until it has ended."""
    with opened.database.statements() as connection, progress() as bar:
        task = bar.add_task(doing, total=None)
        moved_at, seen, warned = time.monotonic(), -1, False
        while True:
            run = totals.read_progress(connection, run_id)
            bar.update(task, total=run.users_selected, completed=run.users_done)
            if run.status != "running":
                return run
            if run.users_done != seen:
                moved_at, seen = time.monotonic(), run.users_done
            elif not warned and time.monotonic() - moved_at > STALLED_SECONDS:
                warned = True
                err.print(
                    "Nothing has moved for a while. Is a worker running (`credits up`, or `celery -A tasks worker`)? "
                    "The run stays, and the next worker takes it up.",
                    soft_wrap=True,
                )
            time.sleep(POLL_SECONDS)
