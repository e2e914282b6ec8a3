"""Recovery: how long it takes after a fault until everybody who was due is refreshed, and when all work is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg

from db import one

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_SECONDS = 150.0
"""What takes longer is not waited for. What takes longer than its fault's bound is a finding."""
POLL_SECONDS = 0.1

# In the form of the wake index. Whom the host's own trigger refuses nobody can refresh.
_DUE = """
SELECT u.id FROM credits.users AS u
WHERE u.wake_at <= now() AND u.active
    AND NOT EXISTS (SELECT FROM host.poisoned AS p WHERE p.external_id = u.external_id)
"""
_STILL_DUE = """
SELECT u.id FROM credits.users AS u
WHERE u.id = ANY (%s) AND u.wake_at <= %s AND u.active
"""
_UNDONE = f"""
SELECT
    (SELECT count(*) FROM ({_DUE}) AS due) AS users_due,
    (SELECT count(*) FROM credits.credit_refresh_runs WHERE status = 'running') AS runs_running,
    (SELECT count(*) FROM host.asked WHERE answered_at IS NULL) AS asks_unanswered
"""  # noqa: S608 - a text of this module


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of those who were due.

    Attributes:
        users: how many were due.
        seconds: until the last of them was refreshed; None: not within the limit.
        left: how many were not.
    """

    users: int
    seconds: float | None
    left: int


@dataclass(frozen=True, slots=True)
class Undone:
    """What is still to be done."""

    users_due: int
    runs_running: int
    asks_unanswered: int

    def __str__(self) -> str:
        work = f"{self.users_due} users due, {self.runs_running} runs running"
        return f"{work}, {self.asks_unanswered} asks without an answer"

    @property
    def nothing(self) -> bool:
        """Whether all is done."""
        return not (self.users_due or self.runs_running or self.asks_unanswered)


def await_recovery(url: str, look: Callable[[], None], *, limit_seconds: float = LIMIT_SECONDS) -> Recovered:
    """Wait until everybody who is due now has been refreshed, or noted as held.

    Args:
        url: of the database, past the proxies; it may still be starting.
        look: called again and again meanwhile; what it raises ends the wait.
        limit_seconds: after which it is no use to wait on.
    """
    began = time.monotonic()
    waiting: list[int] | None = None
    users = 0
    now: Any = None
    while time.monotonic() - began < limit_seconds:
        look()
        try:
            with _connect(url) as connection:
                if waiting is None:
                    (now,) = one(connection.execute("SELECT now()"))
                    waiting = [id_ for (id_,) in connection.execute(_DUE)]
                    users = len(waiting)
                while waiting and time.monotonic() - began < limit_seconds:
                    time.sleep(POLL_SECONDS)
                    look()
                    waiting = [id_ for (id_,) in connection.execute(_STILL_DUE, (waiting, now))]
        except psycopg.OperationalError:
            time.sleep(POLL_SECONDS)
            continue
        if not waiting:
            return Recovered(users, time.monotonic() - began, 0)
    return Recovered(users, None, len(waiting or ()))


def await_rest(url: str, look: Callable[[], None]) -> Undone:
    """Wait until nobody is due, no run is running and every ask is answered; returns what is left after the limit."""
    began = time.monotonic()
    undone = Undone(-1, -1, -1)
    while time.monotonic() - began < LIMIT_SECONDS:
        look()
        try:
            undone = look_once(url)
        except psycopg.OperationalError:
            time.sleep(POLL_SECONDS)
            continue
        if undone.nothing:
            break
        time.sleep(POLL_SECONDS)
    return undone


def look_once(url: str) -> Undone:
    """What is undone at this instant."""
    with _connect(url) as connection:
        return Undone(*one(connection.execute(_UNDONE)))


def _connect(url: str) -> psycopg.Connection[Any]:
    return psycopg.connect(url, autocommit=True, application_name="recovery", connect_timeout=5)
