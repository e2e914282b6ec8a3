"""The batch task: refresh the batches that a message names, each in a transaction of its own."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import psycopg
import structlog

import logs
from celeryconfig import TaskNames
from db import DatabaseError, one_line
from refresh import delivery, pacing, totals
from refresh.batch import granted_users
from refresh.work import Pending, do_batch, pending_batches
from tasks.app import app, config, database
from tasks.deliver import ring_for_webhooks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refresh.closing import Outcome

NO_DATABASE_PAUSE_SECONDS = 5.0

_ENDED = {"regrid": "Users moved to their plan's grid", "rollback": "Rollback completed"}

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.batch")


@app.task(name=TaskNames.BATCH)
def batch(batch_ids: list[int]) -> None:
    """Refresh batches; end the runs that have nothing left."""
    try:
        _work(batch_ids)
    except DatabaseError as error:
        # One worker that cannot reach the database must not take every message from those that can. The batches count
        # as lost before long, and are rung for again.
        log.error(f"{logs.PREFIX} {error}", pause_seconds=NO_DATABASE_PAUSE_SECONDS)  # noqa: TRY400 - it says all
        time.sleep(NO_DATABASE_PAUSE_SECONDS)


def _work(batch_ids: list[int]) -> None:
    with database().statements() as connection:
        if not config.credit_refresh_enabled:
            log.warning(f"{logs.PREFIX} Batches are left for others: CREDIT_REFRESH_ENABLED is false here")
            delivery.unclaim_batches(connection, batch_ids)
            return
        done = [pending for pending in pending_batches(connection, batch_ids) if _do(connection, pending)]
        perhaps_ended = {pending.run_id for pending in done if not pending.far_from_end}
        if perhaps_ended and (ended := totals.finish_runs(connection, perhaps_ended)):
            log_finished(ended)
            ring_for_webhooks(connection)


def _do(connection: psycopg.Connection[Any], pending: Pending) -> Outcome | None:
    if pending.correlation_id is None:
        return _do_logged(connection, pending)
    with structlog.contextvars.bound_contextvars(correlation_id=pending.correlation_id):
        return _do_logged(connection, pending)


def _do_logged(connection: psycopg.Connection[Any], pending: Pending) -> Outcome | None:
    try:
        if pending.paced and not _await_turn(connection, pending.id):
            return None
        outcome = do_batch(connection, pending)
    except psycopg.Error as error:
        # Not because of its users, and nothing was changed. Upkeep tries again: after a backoff, or, where the
        # connection is gone and the failure cannot be noted, once the batch counts as lost.
        if isinstance(error, psycopg.errors.LockNotAvailable) and not (pending.lone or pending.atomic):
            # A batch of many waits for no user. It was a table, as while retention copies old months: nobody's attempt.
            log.warning(
                f"{logs.PREFIX} A batch waits for a locked table: {one_line(error)}; upkeep publishes it again",
                batch_id=pending.id,
            )
            delivery.unclaim_batches(connection, [pending.id])
            return None
        log.exception(f"{logs.PREFIX} Error refreshing credits", batch_id=pending.id, error=one_line(error))
        if connection.closed:
            raise
        delivery.record_failure(connection, pending.id, one_line(error))
        return None
    if outcome and outcome.users_failed:
        log.error(
            f"{logs.PREFIX} Error refreshing credits: the database refused users of a batch",
            batch_id=pending.id,
            run_id=str(outcome.run_id),
            users_failed=outcome.users_failed,
            atomic=pending.atomic,
        )
    if outcome and log.isEnabledFor(logging.DEBUG):
        for external_id, credits_added in granted_users(connection, pending.id):
            log.debug(
                f"{logs.PREFIX} Successfully refreshed {credits_added} credits for user {external_id}",
                run_id=str(outcome.run_id),
            )
    return outcome


def _await_turn(connection: psycopg.Connection[Any], batch_id: int) -> bool:
    """Take the next turn of a paced run and sleep until it comes; False when there is nothing to do then."""
    try:
        seconds = pacing.take_turn(connection, batch_id)
    except psycopg.errors.LockNotAvailable:
        # Many workers, or somebody who cancels the run. It was nobody's attempt.
        delivery.unclaim_batches(connection, [batch_id])
        return False
    if seconds is None:
        return False
    time.sleep(seconds)
    return True


def log_finished(finished: Iterable[totals.Finished]) -> None:
    """Say of each run that it ended, and how."""
    for run in finished:
        log.info(f"{logs.PREFIX} {_ENDED.get(run.work, 'Batch refresh completed')}", **run.facts())
