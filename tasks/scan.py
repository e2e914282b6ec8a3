"""The scan: open the run of the current slot and publish its batches."""

from __future__ import annotations

import structlog

import logs
from celeryconfig import QueueNames, TaskNames
from refresh import runs
from tasks.app import app, config, database
from tasks.publish import publish_queue

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.scan")


@app.task(name=TaskNames.SCAN)
def scan() -> None:
    """Beat's hourly task."""
    opened = open_current_slot()
    if isinstance(opened, runs.NotOpened):
        log.info(f"{logs.PREFIX} Nothing to open: {opened.text}")


def open_current_slot() -> runs.Opened | runs.NotOpened:
    """Open the run of the slot that the database's clock is in, unless it is there; then publish it."""
    if not config.credit_refresh_enabled:
        return runs.NotOpened("disabled")
    with database().transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
        opened = runs.open_scheduled_run(
            connection,
            interval=config.interval,
            cron=config.credit_refresh_cron,
            batch_size=config.credit_refresh_batch_size,
            dry_run=config.credit_refresh_dry_run,
            max_users_per_second=config.scheduled_max_users_per_second,
        )
    if isinstance(opened, runs.Opened):
        log.info(f"{logs.PREFIX} Starting batch refresh...", **opened.facts())
        publish_queue(
            database(),
            QueueNames.BATCHES,
            max_attempts=config.credit_refresh_max_attempts,
            run_id=opened.run_id,
        )
    return opened
