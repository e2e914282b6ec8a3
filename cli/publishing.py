"""What the commands that open a run have in common: see that it can be carried out, publish it, wait for its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from cli.asking import key_option, reason_option, refuse
from cli.main import FINISHED_WITH_FAILURES
from cli.output import answer, err, progress
from refresh import runs, totals
from refresh.run_list import RunLine, read_line

if TYPE_CHECKING:
    from uuid import UUID

    import click

    from cli.session import Session

__all__ = [
    "Carried",
    "answer_run",
    "carry_out",
    "key_option",
    "prepare_broker",
    "publish",
    "reason_option",
    "refuse",
    "require_broker",
    "summary",
    "wait_for_run",
]

POLL_SECONDS = 0.2
STALLED_SECONDS = 10.0
"""How long `--wait` sees nothing move before it says what is missing."""


def prepare_broker(opened: Session) -> None:
    """See that batches can be published before a run is open: a command that fails has done nothing.

    Raises:
        RefusedError: this process may not grant anything.
        DatabaseError: the broker does not answer.
    """
    if not opened.settings.credit_refresh_enabled:
        raise refuse(runs.NotOpened("disabled"))
    require_broker(opened)


def require_broker(opened: Session) -> None:
    """See that the broker answers.

    Raises:
        DatabaseError: it does not.
    """
    # Celery takes half a second to import: `credits runs list` and a --help have no use for it.
    from tasks.app import check_broker, use_broker  # noqa: PLC0415

    use_broker(opened.settings.broker_url)
    check_broker()


def publish(opened: Session, run_id: UUID) -> int:
    """Publish a run that was opened and committed; returns the batches that the broker took."""
    from tasks.app import use_broker  # noqa: PLC0415 - as above
    from tasks.publish import publish_asked  # noqa: PLC0415

    use_broker(opened.settings.broker_url)
    return publish_asked(opened.database, run_id, max_attempts=opened.settings.credit_refresh_max_attempts)


class Carried(NamedTuple):
    """A run that was published.

    Attributes:
        line: the run, as far as it is.
        existing: it had been opened before.
        done: how it ended, where somebody waited for it.
        published: batches that the broker took; the others are upkeep's, as soon as the queue is short or the broker
            answers.
    """

    line: RunLine
    existing: bool
    done: totals.Progress | None
    published: int


def carry_out(opened: Session, run: runs.Opened, *, wait: bool, doing: str = "Refreshing") -> Carried:
    """Publish a run that was opened and committed, and stay to its end where that is wanted.

    A run that was there already (its idempotency key came again) is not published again: whatever its first command
    left undone is upkeep's.
    """
    published = 0 if run.existing else publish(opened, run.run_id)
    done = wait_for_run(opened, run.run_id, doing) if wait else None
    with opened.database.statements() as connection:
        return Carried(read_line(connection, run.run_id), run.existing, done, published)


def answer_run(ctx: click.Context, carried: Carried, text: str, facts: dict[str, Any], *, as_json: bool) -> None:
    """Answer for a run, and end with exit code 3 where it was waited for and has failed users.

    Args:
        ctx: of the command.
        carried: what `carry_out()` returned.
        text: what is said of a run that nobody waited for.
        facts: for JSON, on top of what `credits runs list --json` says of a run.
        as_json: as the command was asked.
    """
    done = carried.done
    said = {**carried.line.facts(), "existing": carried.existing, **facts}
    answer(summary(done) if done else text, said, as_json=as_json)
    if done and done.users_failed:
        ctx.exit(FINISHED_WITH_FAILURES)


def summary(run: totals.Progress) -> str:
    """A finished run in a sentence."""
    would = "would be " if run.dry_run else ""
    if run.work == "regrid":
        return (
            f"Run {run.run_id} {run.status} in {run.seconds:.1f} s: {run.users_refreshed:,} users moved to the new "
            f"grid, {run.users_skipped:,} skipped, {run.users_failed:,} failed."
        )
    if run.work == "rollback":
        return (
            f"Run {run.run_id} {run.status} in {run.seconds:.1f} s: {run.users_refreshed:,} users {would}taken back, "
            f"{run.users_skipped:,} skipped, {run.users_failed:,} failed; {-run.credits_granted:,} credits "
            f"{would}taken back."
        )
    return (
        f"Run {run.run_id} {run.status} in {run.seconds:.1f} s: {run.users_selected:,} users, "
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
