"""Upkeep: every minute, put right what was lost, and finish what is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
from celery import signals
from kombu.exceptions import OperationalError

import logs
from celeryconfig import QueueNames, TaskNames
from refresh import delivery, partitions, stripe_events, totals, webhook_events
from tasks.app import app, config, database
from tasks.batch import log_finished
from tasks.deliver import ring_for_webhooks
from tasks.publish import messages_waiting, publish_queue
from tasks.scan import open_current_slot

if TYPE_CHECKING:
    from collections.abc import Callable

STRIPE_EVENTS_MAX = 200
"""Events of Stripe's that one upkeep looks at, some ten milliseconds each."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.upkeep")


@app.task(name=TaskNames.UPKEEP)
def upkeep() -> None:
    """Give up what was tried too often, finish runs, publish what waits, open a missed slot, make partitions.

    And look again at events of Stripe's that wait for something, and ring for what webhook endpoints are to be told,
    disabled or not.
    """
    steps: list[Callable[[], object]] = [_make_partitions, _tell_of_silence, _ring_for_webhooks]
    if config.credit_refresh_enabled:
        steps = [_give_up, _finish, _publish, open_current_slot, _process_stripe_events, *steps]
    for step in steps:
        try:
            step()
        except Exception:  # one that fails must not keep the others from their work; the next minute tries it again
            log.exception(f"{logs.PREFIX} Upkeep could not {step.__name__.strip('_').replace('_', ' ')}")


def _give_up() -> None:
    with database().statements() as connection:
        spent = delivery.give_up_batches(connection, max_attempts=config.credit_refresh_max_attempts)
    for batch_id, run_id, error in spent:
        log.error(
            f"{logs.PREFIX} Error refreshing credits: a batch was given up; `credits runs retry` takes its users up",
            batch_id=batch_id,
            run_id=str(run_id),
            error=error,
        )


def _finish() -> None:
    with database().statements() as connection:
        log_finished(totals.finish_runs(connection))


def _publish() -> None:
    for queue in QueueNames.WORK:
        waiting = messages_waiting(queue)
        with database().statements() as connection:
            lost = delivery.record_losses(connection, scheduled=queue == QueueNames.BATCHES, queue_empty=waiting == 0)
        if lost:
            log.warning(f"{logs.PREFIX} Batches were lost and are published again", batches=lost, queue=queue)
        published = publish_queue(
            database(),
            queue,
            max_attempts=config.credit_refresh_max_attempts,
            ring_again=waiting < delivery.MESSAGES_ENOUGH,
        )
        if published:
            log.info(f"{logs.PREFIX} Published batches again", batches=published, queue=queue)


def _make_partitions() -> None:
    with database().transaction(lock_timeout=partitions.LOCK_TIMEOUT) as connection:
        for name in partitions.ensure_partitions(connection):
            log.info(f"{logs.PREFIX} Made partition {name}")


def _process_stripe_events() -> None:
    terms = stripe_events.Terms(config.stripe_plan_after_cancel)
    with database().statements() as connection:
        for done in stripe_events.process_waiting(connection, terms, limit=STRIPE_EVENTS_MAX):
            log.info(f"{logs.PREFIX} Stripe event", event_id=done.id, outcome=done.outcome, user=done.user)


def _tell_of_silence() -> None:
    with database().statements() as connection:
        told = webhook_events.tell_silence(connection)
    if told:
        log.warning(f"{logs.PREFIX} Nobody was refreshed for days: webhook endpoints are told", endpoints=told)


def _ring_for_webhooks() -> None:
    with database().statements() as connection:
        ring_for_webhooks(connection)


@signals.worker_ready.connect
def _catch_up(**_: Any) -> None:
    """A worker that starts looks at once: what was lost while nobody was there need not wait for beat."""
    try:
        upkeep.delay()
    except OperationalError as error:
        log.warning(f"{logs.PREFIX} The broker did not take the first upkeep", error=str(error))
