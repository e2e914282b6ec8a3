"""What a command needs before it can work: checked settings, running servers, a database of this release."""

from __future__ import annotations

import getpass
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import embedded
import settings
from db import Database
from embedded.processes import unwind_on_signals

if TYPE_CHECKING:
    from collections.abc import Iterator

INSTANCE = "up"
"""The embedded servers that commands share: the first starts them, the others find them."""


@dataclass(frozen=True, slots=True)
class Session:
    """Settings whose URLs are filled in, and the database behind them."""

    settings: settings.Settings
    database: Database


@contextmanager
def session(*, broker: bool = False, migrated: bool = True) -> Iterator[Session]:
    """Open the database, on embedded servers where the environment names none.

    Args:
        broker: whether the command publishes.
        migrated: refuse a database that this release was not written for.

    Raises:
        SettingsError, EmbeddedError, DatabaseError: each with one line for people.
    """
    unwind_on_signals()
    loaded = settings.load()
    with _urls(loaded, broker=broker) as found:
        assert found.database_url is not None  # noqa: S101 - filled in by _urls
        database = Database(found.database_url, found.database_schema)
        if migrated:
            database.require_migrated()
        yield Session(found, database)


@contextmanager
def _urls(loaded: settings.Settings, *, broker: bool) -> Iterator[settings.Settings]:
    postgres = loaded.database_url is None
    redis = broker and loaded.broker_url is None
    if not postgres and not redis:
        yield loaded
        return
    with embedded.servers(INSTANCE, loaded.credits_state_dir, postgres=postgres, redis=redis, share=True) as running:
        yield loaded.with_urls(
            database_url=running.database_url if postgres else loaded.database_url,
            redis_url=running.redis_url if redis else loaded.redis_url,
        )


def actor() -> str:
    """Who asks, for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's numeric user without a name
        return "cli"
