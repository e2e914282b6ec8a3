"""The Celery app: settings, logs, the worker's database, and what is checked before a worker or beat starts."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from celery import Celery, signals

import logs
import settings
from db import Database, DatabaseError

if TYPE_CHECKING:
    from pathlib import Path

try:
    config = settings.load()
except settings.SettingsError as error:
    # `celery -A tasks` imports this: end with the line alone.
    raise SystemExit(f"credits: {error}") from None

app: Celery = Celery("credits")
app.config_from_object("celeryconfig")

BROKER_TIMEOUT_SECONDS = 5


def use_broker(url: str | None) -> None:
    """Publish to another broker than `REDIS_URL` names: commands on embedded servers.

    Where the environment has `CELERY_BROKER_URL`, Celery publishes there whatever it is told.
    """
    app.conf.update(broker_url=url)


@cache
def database() -> Database:
    """This process's pool of connections."""
    if config.database_url is None:
        raise DatabaseError("DATABASE_URL is not set: set it, or let `credits up` start everything with servers.")
    return Database(config.database_url, config.database_schema, name="credits-worker", pool=2)


def heartbeat_path(kind: Literal["worker", "beat"]) -> Path:
    """The file whose age is a process's health: asking workers by message costs a second of CPU each time."""
    return config.credits_state_dir / f"{kind}.heartbeat"


@signals.setup_logging.connect
def _configure_logs(**_: Any) -> None:
    logs.configure(config.log_level, config.log_format)


@signals.celeryd_init.connect
@signals.beat_init.connect
def _check_servers(**_: Any) -> None:
    """End the start with one line when something is missing, instead of retrying unseen."""
    if config.broker_url is None:
        raise SystemExit("credits: REDIS_URL is not set: set it, or let `credits up` start everything with servers.")
    try:
        database().require_migrated()
        database().close()  # beat asks nothing more, and a pool that forks inherits nothing
        check_broker()
    except DatabaseError as error:
        raise SystemExit(f"credits: {error}") from None
    config.credits_state_dir.mkdir(parents=True, exist_ok=True)


def check_broker() -> str:
    """Make sure that the broker answers; returns what it is.

    Raises:
        DatabaseError: it does not; the text is one line for people.
    """
    with app.connection_for_write() as connection:
        try:
            connection.ensure_connection(max_retries=1, timeout=BROKER_TIMEOUT_SECONDS, reraise_as_library_errors=False)
        except (*connection.connection_errors, *connection.channel_errors) as error:  # RabbitMQ refuses by the latter
            name = "CELERY_BROKER_URL" if config.celery_broker_url else "REDIS_URL"
            raise DatabaseError(f"The broker cannot be reached: {error} (see {name})") from error
        return "RabbitMQ" if connection.transport.driver_type == "amqp" else "Redis"


@signals.worker_process_init.connect
def _forget_inherited_connections(**_: Any) -> None:
    """A pool that forks (not the one configured) must not share psycopg connections with its parent."""
    if database.cache_info().currsize:
        database().dispose()
        database.cache_clear()


@signals.heartbeat_sent.connect
def _beat_heart(**_: Any) -> None:
    heartbeat_path("worker").touch()
