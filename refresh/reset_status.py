"""Where the periodic refresh stands: the last runs, the last success, and when the next one is due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from db import one
from refresh.run_list import RunLine, Wanted, list_runs, read_line
from refresh.schedule import next_slot

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    import psycopg

RUNS_SHOWN = 10

_LAST_SUCCESS = """
SELECT id FROM credit_refresh_runs
WHERE status = 'succeeded' AND work = 'refresh' AND NOT dry_run AND NOT selection ? 'user'
ORDER BY created_at DESC, id DESC LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class ResetStatus:
    """Where things stand at one instant.

    Refreshes of single users, by support or for Stripe, are left out: a few of them would hide that nobody scans.

    Attributes:
        runs: the last live refreshes, the newest first.
        last_success: the last one that refreshed everybody whom it found, were it nobody.
        next_at: when beat scans next, as the timetable has it.
    """

    at: datetime
    enabled: bool
    runs: list[RunLine]
    last_success: RunLine | None
    next_at: datetime

    def facts(self) -> dict[str, Any]:
        """What a JSON answer says of it."""
        return {
            "at": self.at.isoformat(),
            "paused": not self.enabled,
            "lastRun": self.runs[0].facts() if self.runs else None,
            "lastSuccess": self.last_success.facts() if self.last_success else None,
            "nextRunAt": self.next_at.isoformat(),
            "timezone": "UTC",
            "history": [line.facts() for line in self.runs],
        }


def read_date(connection: psycopg.Connection[Any]) -> str:
    """Today, in UTC."""
    return str(one(connection.execute("SELECT (now() AT TIME ZONE 'UTC')::date"))[0])


def read_status(connection: psycopg.Connection[Any], *, interval: timedelta, cron: str | None) -> ResetStatus:
    """Where things stand; `interval` and `cron` are the settings' timetable."""
    at, enabled = one(connection.execute("SELECT now(), enabled FROM settings"))
    found, _more = list_runs(connection, Wanted(kind="refresh", dry_run=False, of_one=False), limit=RUNS_SHOWN)
    success = connection.execute(_LAST_SUCCESS).fetchone()
    return ResetStatus(
        at=at,
        enabled=enabled,
        runs=found,
        last_success=read_line(connection, success[0]) if success else None,
        next_at=next_slot(at, interval, cron),
    )
