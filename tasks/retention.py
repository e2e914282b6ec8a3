"""The nightly retention: drop what is older than the settings keep."""

from __future__ import annotations

import psycopg
import structlog

import logs
from celeryconfig import TaskNames
from db import one_line
from refresh import retention as domain
from refresh import webhook_deliveries
from refresh.errors import RefusedError
from tasks.app import app, config, database
from tasks.verify import heartbeat

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.retention")


@app.task(name=TaskNames.RETENTION)
def retention() -> None:
    """Beat's nightly task, before the audit. What somebody reads tonight is dropped in another night."""
    _tidy_webhooks()
    terms = domain.Terms(config.credit_refresh_retention_months, config.credit_refresh_planned_days)
    try:
        with heartbeat(), database().statements() as connection:
            report = domain.carry_out(connection, terms, actor="beat")
    except (RefusedError, psycopg.errors.LockNotAvailable) as error:
        log.warning(f"{logs.PREFIX} Retention has to wait for the next night: {one_line(error)}")
        return
    except psycopg.errors.InsufficientPrivilege as error:
        log.error(  # noqa: TRY400 - one line, without the traceback
            f"{logs.PREFIX} Retention drops months as the tables' owner alone: {one_line(error)}; unset "
            "CREDIT_REFRESH_RETENTION_MONTHS here, and run `credits retention --months` as that role"
        )
        return
    if not report.nothing:
        log.info(f"{logs.PREFIX} {report.summary}", **report.facts())


def _tidy_webhooks() -> None:
    with database().statements() as connection:
        expired, deleted = webhook_deliveries.tidy(connection)
    if expired or deleted:
        log.info(f"{logs.PREFIX} Tidied the webhooks' outbox", expired=expired, deleted=deleted)
