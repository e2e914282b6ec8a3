"""The nightly audit: read the books, log what cannot be right, and keep that it was done."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

import logs
from celeryconfig import TaskNames
from refresh import verify as audit
from refresh import webhook_events
from tasks.app import app, config, database, heartbeat_path
from tasks.deliver import ring_for_webhooks

if TYPE_CHECKING:
    from collections.abc import Iterator

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.verify")

HEARTBEAT_SECONDS = 10
LOGGED_MAX = 100
"""Findings of one name that are logged; `credits verify` shows the others."""


@app.task(name=TaskNames.VERIFY)
def verify() -> None:
    """Beat's nightly task. It reads the books at one instant and writes a row of the audit log afterwards."""
    began, found = time.monotonic(), webhook_events.Found()

    def on_finding(finding: audit.Finding) -> None:
        _log(finding)
        found.note(finding)

    with heartbeat(), database().transaction() as connection:
        report = audit.verify(connection, _terms(), limit=LOGGED_MAX, on_finding=on_finding)
    report.seconds = time.monotonic() - began
    with database().transaction() as connection:
        audit.record(connection, report, actor="beat")
        found.tell(connection, report.counts)
    with database().statements() as connection:
        ring_for_webhooks(connection)
    say = log.error if report.findings else log.info
    say(
        f"{logs.PREFIX} Verified: {report.summary}",
        findings=report.findings,
        counts=dict(report.counts),
        seconds=round(report.seconds, 3),
    )


def _terms() -> audit.Terms:
    return audit.Terms(
        config.interval,
        config.credit_refresh_cron,
        enabled=config.credit_refresh_enabled,
        dry_run=config.credit_refresh_dry_run,
        top_ups=config.credit_refresh_top_ups,
    )


def _log(finding: audit.Finding) -> None:
    log.error(
        f"{logs.PREFIX} Verify found {finding.name}: {finding.text}",
        finding=finding.name,
        user_id=finding.user,
        run_id=finding.run_id,
        way_out=finding.way_out,
    )


@contextmanager
def heartbeat() -> Iterator[None]:
    """A solo worker sends none while it works, and a check over ten million rows takes longer than its health check."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            heartbeat_path("worker").touch()

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
