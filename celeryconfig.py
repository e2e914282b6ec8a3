"""Celery's configuration: the one place of timetable, queues, routes, limits and transport options.

Each value that differs from Celery's default says why. The measurements are in docs/adr/ and in `make bench`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from amqp.exceptions import RecoverableConnectionError
from celery.schedules import crontab, schedule
from kombu import Queue

import settings

_settings = settings.load()


class QueueNames:
    """The queues. What compose starts is compared with these by a test."""

    CONTROL = "control"
    """Scan and upkeep: a few messages an hour, never behind a million batches."""
    BATCHES = "batches"
    """Batch ids of beat's runs."""
    BULK = "bulk"
    """Batch ids of the runs that somebody asked for. A worker takes from this queue and that in turn, so that the
    hourly refresh never waits behind a million users."""

    WEBHOOKS = "webhooks"
    """What endpoints are told. Its workers wait for other people's servers, so they do nothing else."""

    DEAD = "dead"
    """Messages that were refused (tasks/dead_letters.py). No worker takes from it."""

    WORK = (BATCHES, BULK)
    REFRESH = (CONTROL, *WORK)
    """All that refreshing takes."""
    ALL = (*REFRESH, WEBHOOKS)


class TaskNames:
    """The tasks by the names that messages carry."""

    SCAN = "tasks.scan"
    BATCH = "tasks.batch"
    UPKEEP = "tasks.upkeep"
    RETENTION = "tasks.retention"
    VERIFY = "tasks.verify"
    DELIVER = "tasks.deliver"

    ALL = frozenset({SCAN, BATCH, UPKEEP, RETENTION, VERIFY, DELIVER})


def _refuse_to_wait(reason: str) -> None:
    raise RecoverableConnectionError(reason)


# --- broker ---------------------------------------------------------------------------------------------------------
broker_url = _settings.broker_url
_amqp = (broker_url or "").startswith("amqp")
broker_transport_options: dict[str, Any]
if _amqp:
    # RabbitMQ is the same doorbell. A message is acknowledged as its task begins (Celery's default): what dies with a
    # worker is upkeep's to find, as on Redis. Confirms made publishing six times slower, for a certainty that nobody
    # needs. A broker short of memory or disk says so and reads no more, for as long as that takes: refused, then.
    broker_transport_options = {"confirm_publish": False, "write_timeout": 10, "on_blocked": _refuse_to_wait}
    # A solo worker sends none while it works, and the auditor works for minutes: RabbitMQ would close its connection.
    # A peer that is gone is found by TCP keepalive, which py-amqp sets to 150 s.
    broker_heartbeat = 0
else:
    # Redis is a doorbell: kombu's emulated acknowledgements lost 32 tasks in 110 SIGKILLs all the same, and cost a
    # fifth of the throughput. Rows in PostgreSQL say what is done; upkeep rings again. Without emulation there is no
    # visibility_timeout, and nothing is redelivered behind our back.
    broker_transport_options = {
        "ack_emulation": False,
        # No message has a priority, and each step is another list of each queue that is asked for every message.
        "priority_steps": [0],
        # The default waits for ever: a publish to a hung Redis would hang with it.
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 30,
    }
broker_connection_timeout = 5
# A worker that outlives its broker comes back by itself, however long that takes; the default gives up after 100 tries.
broker_connection_max_retries = None
broker_connection_retry_on_startup = True
# Celery's own default, named because less is a trap: Flower asks eight questions at once, each holding a connection
# while it takes a second one, and with fewer than nine they wait for each other for ever.
broker_pool_limit = 10

# --- messages -------------------------------------------------------------------------------------------------------
# JSON alone: a message is data, never code.
accept_content = ["json"]
task_serializer = "json"
result_serializer = "json"
event_serializer = "json"
# Nobody reads results; each stored one is five more Redis commands.
task_ignore_result = True
task_store_errors_even_if_ignored = False
task_publish_retry = False  # upkeep publishes again; a retry here would hold the scan

# --- queues and routes ----------------------------------------------------------------------------------------------
task_default_queue = QueueNames.CONTROL
# A quorum queue outlives the loss of a RabbitMQ node. Redis takes no arguments.
_queue_arguments = {"x-queue-type": _settings.celery_task_default_queue_type} if _amqp else None
task_queues = [Queue(name, routing_key=name, queue_arguments=_queue_arguments) for name in QueueNames.ALL]
DEAD_LETTERS_MAX = 1_000
# Of RabbitMQ's older kind, from which one may read without taking as often as one likes; Redis' list is cut by us.
DEAD_QUEUE = Queue(
    QueueNames.DEAD,
    routing_key=QueueNames.DEAD,
    queue_arguments={"x-queue-type": "classic", "x-max-length": DEAD_LETTERS_MAX} if _amqp else None,
)
task_create_missing_queues = False  # a typo in a route is an error, not a queue that nobody drains
task_routes = {
    TaskNames.SCAN: {"queue": QueueNames.CONTROL},
    TaskNames.UPKEEP: {"queue": QueueNames.CONTROL},
    TaskNames.RETENTION: {"queue": QueueNames.CONTROL},
    TaskNames.VERIFY: {"queue": QueueNames.CONTROL},
    TaskNames.DELIVER: {"queue": QueueNames.WEBHOOKS},
    TaskNames.BATCH: {"queue": QueueNames.BATCHES},  # or the other one: tasks/publish.py says which
}

# --- workers --------------------------------------------------------------------------------------------------------
# One process, one task at a time, many processes: the fastest pool for batches of milliseconds (0.6 of the bare loop
# against prefork's 0.5), and a SIGKILL costs one batch. Its limits are the database's (db.py): Celery's time limits
# hold in prefork alone and would do nothing here.
worker_pool = "solo"
worker_concurrency = 1
worker_consumer = "tasks.consumer:Consumer"  # refuses what is not a message of ours
# What lies in a killed worker's memory is found by upkeep, so keep it little; more buys nothing when a message
# carries several batches. RabbitMQ gives as many of each queue: to a worker at a nightly task, upkeep's messages too.
worker_prefetch_multiplier = 1 if _amqp else 4
worker_hijack_root_logger = False
worker_redirect_stdouts = False
# Flower's eyes. They cost up to a twentieth of the throughput (`make bench`).
worker_send_task_events = _settings.credit_refresh_task_events
task_send_sent_event = False
worker_cancel_long_running_tasks_on_connection_loss = False

# --- timetable ------------------------------------------------------------------------------------------------------
timezone = "UTC"
enable_utc = True
beat_schedule_filename = str(_settings.credits_state_dir / "celerybeat-schedule")
beat_scheduler = "tasks.beat:Scheduler"  # leaves a heartbeat file for health checks
beat_max_loop_interval = 10  # seconds between heartbeats at most

UPKEEP_INTERVAL = timedelta(minutes=1)
_seconds = _settings.credit_refresh_interval_seconds
if _seconds is not None:
    _scan_at: crontab | schedule = schedule(timedelta(seconds=_seconds))
    _upkeep_at: crontab | schedule = schedule(min(timedelta(seconds=_seconds), UPKEEP_INTERVAL))
else:
    # Wall-clock entries, because an interval starts anew whenever beat's file is lost: restarted often enough, it
    # never fires. Beat rings each hour whatever the interval; the slot decides whether there is anything to open.
    _scan_at = crontab.from_string(_settings.credit_refresh_cron) if _settings.credit_refresh_cron else crontab("0")
    _upkeep_at = crontab()

# A beat that has no file yet fires at once: the slot that passed while nobody watched is opened now. Where it was
# opened already, the scan finds it taken.
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
beat_schedule: dict[str, dict[str, Any]] = {
    "scan": {"task": TaskNames.SCAN, "schedule": _scan_at, "last_run_at": _LONG_AGO},
    "upkeep": {"task": TaskNames.UPKEEP, "schedule": _upkeep_at, "last_run_at": _LONG_AGO},
    # In a quiet hour, and not on the hour, when scans begin. Nothing is owed for a night that nobody watched. Retention
    # comes first, so that the audit reads what is left of the books.
    "retention": {"task": TaskNames.RETENTION, "schedule": crontab(minute="47", hour="2")},
    "verify": {"task": TaskNames.VERIFY, "schedule": crontab(minute="17", hour="3")},
}
