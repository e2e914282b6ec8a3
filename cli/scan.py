"""`credits scan`: open a run over all due users, now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cli.asking import pace_option
from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, json_option
from cli.publishing import prepare_broker, publish, summary, wait_for_run
from cli.session import actor, session
from cli.types import Instant
from refresh import runs

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["scan", "summary", "wait_for_run"]


@click.command()
@click.option("--dry-run", is_flag=True, help="Record what would be granted, row by row, and change no user.")
@click.option("--as-of", type=Instant(), metavar="T", help="Decide as of this instant (in the future: dry runs alone).")
@pace_option
@click.option("--wait", is_flag=True, help="Stay, and show progress to the end.")
@json_option
@click.pass_context
def scan(  # noqa: PLR0913 - one for each option
    ctx: click.Context,
    *,
    dry_run: bool,
    as_of: datetime | None,
    max_users_per_second: int | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Find all users whose window has elapsed and have the workers refresh them.

    Beat does this every hour by itself. A scan by hand is a run of its own beside beat's, takes no slot, and leaves
    out the users whom an unfinished run already has.

    \b
    Examples:
      credits scan --dry-run --wait
      credits scan --dry-run --as-of 2026-12-01T00:00:00Z
      credits scan --max-users-per-second 500 --wait
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session(broker=True) as opened:
        if not opened.settings.credit_refresh_enabled:
            _not_opened(runs.NotOpened("disabled"), as_json=as_json)
            return
        prepare_broker(opened)
        request = runs.Request(
            "cli",
            actor(),
            opened.settings.credit_refresh_batch_size,
            dry_run=dry_run or opened.settings.credit_refresh_dry_run,
            as_of=as_of,
            max_users_per_second=max_users_per_second,
            reason="credits scan",
        )
        with opened.database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            run = runs.open_run(connection, request)
        if isinstance(run, runs.NotOpened):
            _not_opened(run, as_json=as_json)
            return
        publish(opened, run.run_id)
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
