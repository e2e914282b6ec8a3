"""Upkeep: every minute, put right what was lost, and finish what is done."""

from __future__ import annotations

from typing import Any

import structlog
from celery import signals
from kombu.exceptions import OperationalError

import logs
from celeryconfig import TaskNames
from refresh import delivery, partitions, runs
from tasks.app import app, config, database
from tasks.batch import log_finished
from tasks.publish import batches_waiting, publish_batches
from tasks.scan import open_current_slot

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.upkeep")


@app.task(name=TaskNames.UPKEEP)
def upkeep() -> None:
    """Give up what was tried too often, publish what waits, finish runs, open a missed slot, make partitions."""
    if config.credit_refresh_enabled:
        _deliver()
        open_current_slot()
    with database().transaction() as connection:
        for name in partitions.ensure_partitions(connection):
            log.info(f"{logs.PREFIX} Made partition {name}")


def _deliver() -> None:
    queue_empty = batches_waiting() == 0
    with database().statements() as connection:
        if queue_empty and (lost := delivery.record_losses(connection)):
            log.warning(f"{logs.PREFIX} Batches were lost and are published again", batches=lost)
        for batch_id, run_id, error in delivery.give_up_batches(
            connection, max_attempts=config.credit_refresh_max_attempts
        ):
            log.error(
                f"{logs.PREFIX} Error refreshing credits: a batch was given up; its users are due at the next scan",
                batch_id=batch_id,
                run_id=str(run_id),
                error=error,
            )
        log_finished(runs.finish_runs(connection))
    published = publish_batches(database(), max_attempts=config.credit_refresh_max_attempts)
    if published:
        log.info(f"{logs.PREFIX} Published batches again", batches=published)


@signals.worker_ready.connect
def _catch_up(**_: Any) -> None:
    """A worker that starts looks at once: what was lost while nobody was there need not wait for beat."""
    try:
        upkeep.delay()
    except OperationalError as error:
        log.warning(f"{logs.PREFIX} The broker did not take the first upkeep", error=str(error))
