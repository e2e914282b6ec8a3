"""The SQL rule as the tests ask it, one question at a time or thousands, and the time zones that it knows."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import psycopg
from psycopg.types.numeric import Int8Dumper

from tests import oracle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.cluster import Cluster

SESSIONS = {
    "UTC": "-c search_path=credits -c timezone=UTC -c plan_cache_mode=force_custom_plan",
    "New York": "-c search_path=credits -c timezone=America/New_York -c plan_cache_mode=force_generic_plan",
}
"""Every rule test runs in one of each: the rule must not ask in which zone it is read, nor may it matter whether
PostgreSQL knows the values when it plans and folds what is constant."""

ABBREVIATIONS = {"CET": 1, "EET": 2, "MET": 1, "WET": 0}
"""Zones whose names PostgreSQL takes for abbreviations of a fixed offset in hours: docs/rule.md, "Grids"."""

Question = tuple[oracle.Grid, datetime, datetime]

_WINDOWS = """
SELECT w.window_start, w.window_end, w.windows_passed, CASE WHEN w.windows_passed > 0 THEN c.due_at END
FROM unnest(%s::text[], %s::integer[], %s::smallint[], %s::time[], %s::text[], %s::timestamptz[], %s::timestamptz[])
    WITH ORDINALITY AS c (cadence, interval_days, day, time_of_day, zone, due_at, as_of, seq)
CROSS JOIN LATERAL refresh_window(c.cadence, c.interval_days, c.day, c.time_of_day, c.zone, c.due_at, c.as_of) AS w
ORDER BY c.seq
"""

# One after the other, each due at the end of the one before, asked about at that very instant.
_WALK = """
WITH RECURSIVE walk AS (
    SELECT 1 AS step, w.window_start, w.window_end, w.windows_passed
    FROM refresh_window(
        %(cadence)s, %(interval_days)s::integer, %(day)s::smallint, %(time)s, %(zone)s, %(due)s, %(as_of)s
    ) AS w
    UNION ALL
    SELECT step + 1, w.window_start, w.window_end, w.windows_passed
    FROM walk
    CROSS JOIN LATERAL refresh_window(
        %(cadence)s, %(interval_days)s::integer, %(day)s::smallint, %(time)s, %(zone)s, walk.window_end, walk.window_end
    ) AS w
    WHERE step < %(steps)s
)
SELECT window_start, window_end, windows_passed FROM walk ORDER BY step
"""

_DECIDE = """
SELECT * FROM decide(
    %(as_of)s, %(user_active)s, %(held)s, %(hold_until)s::timestamptz, %(due)s::timestamptz, %(balance)s,
    %(custom)s::bigint, %(user_day)s::smallint, %(user_zone)s::text, %(plan_active)s::boolean, %(cadence)s::text,
    %(interval_days)s::integer, %(plan_day)s::smallint, %(time)s::time, %(plan_zone)s::text, %(mode)s::text,
    %(amount)s::bigint, %(cap)s::bigint, %(shortfall)s, %(force)s, %(keep_window)s
)
"""


class Rule:
    """The rule in one session. Zones are read from the server's own files: it and the oracle know the same ones."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        # Every integer is sent as a bigint, or each size of a number would be a statement of its own to prepare.
        connection.adapters.register_dumper(int, Int8Dumper)
        connection.prepared_max = 1_000
        (share,) = self._row("SELECT setting FROM pg_config WHERE name = 'SHAREDIR'")
        self._zone_files = Path(share) / "timezone"
        self._zones: dict[str, tzinfo] = {}
        self.zone_names = [name for (name,) in connection.execute("SELECT name FROM timezones ORDER BY name")]

    def _row(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        row = self._connection.execute(query, parameters, prepare=True).fetchone()
        assert row is not None
        return tuple(row)

    def zone(self, name: str) -> tzinfo:
        if name not in self._zones:
            self._zones[name] = self._read_zone(name)
        return self._zones[name]

    def _read_zone(self, name: str) -> tzinfo:
        if name in ABBREVIATIONS:
            return timezone(timedelta(hours=ABBREVIATIONS[name]), name)
        # A PostgreSQL that was built to use the system's zones, as Debian's is, has none of its own.
        if not self._zone_files.is_dir():
            return ZoneInfo(name)
        with (self._zone_files / name).open("rb") as file:
            return ZoneInfo.from_file(file, key=name)

    def windows(self, questions: Sequence[Question]) -> list[oracle.Window]:
        columns = [[*grid_values(grid), due, as_of] for grid, due, as_of in questions]
        rows = self._connection.execute(_WINDOWS, [list(column) for column in zip(*columns, strict=True)]).fetchall()
        return [read_window(*row) for row in rows]

    def walk(self, grid: oracle.Grid, due: datetime, as_of: datetime, *, steps: int) -> list[oracle.Window]:
        asked = dict(zip(("cadence", "interval_days", "day", "time", "zone"), grid_values(grid), strict=True))
        found = self._connection.execute(_WALK, {**asked, "due": due, "as_of": as_of, "steps": steps}, prepare=True)
        return [read_window(start, end, passed, None) for start, end, passed in found]

    def credits(self, grant_mode: str, target: int, rollover_cap: int | None, balance: int) -> int | None:
        (added,) = self._row(
            "SELECT credits_to_add(%s::text, %s::bigint, %s::bigint, %s::bigint)",
            (grant_mode, target, rollover_cap, balance),
        )
        return None if added is None else int(added)

    def decide(
        self, user: oracle.User, plan: oracle.Plan | None, as_of: datetime, run: oracle.Asked = oracle.SCAN
    ) -> oracle.Decision:
        asked = {**user_values(user), **plan_values(plan), "as_of": as_of}
        # As the batch does: what is asked for takes the custom amount's place.
        asked["custom"] = user.custom_amount if run.amount is None else run.amount
        asked |= {"force": run.force, "keep_window": run.keep_window}
        verdict, start, end, missed, passed, target, added = self._row(_DECIDE, asked)
        # Else there is no window, and what the columns hold means nothing.
        fallen_due = user.next_refresh_at is not None and user.next_refresh_at <= as_of
        told = start is not None and (verdict in {"due", "overflow"} or (verdict == "held" and fallen_due))
        return oracle.Decision(verdict, read_window(start, end, passed, missed) if told else None, target, added)


def read_window(start: datetime, end: datetime | None, passed: int, missed: datetime | None) -> oracle.Window:
    # To UTC: in a session's own zone, Python holds an instant of the hour that exists twice for equal to no other.
    return oracle.Window(start.astimezone(UTC), end and end.astimezone(UTC), passed, missed and missed.astimezone(UTC))


def grid_values(grid: oracle.Grid) -> tuple[object, ...]:
    return (grid.cadence, grid.interval_days, grid.day, grid.time_of_day, str(grid.timezone))


def user_values(user: oracle.User) -> dict[str, object]:
    return {
        "user_active": user.active,
        "held": user.held,
        "hold_until": user.hold_until,
        "due": user.next_refresh_at,
        "balance": user.balance,
        "custom": user.custom_amount,
        "user_day": user.refresh_day,
        "user_zone": user.timezone and str(user.timezone),
        "shortfall": user.shortfall,
    }


def plan_values(plan: oracle.Plan | None) -> dict[str, object]:
    return {
        "plan_active": plan and plan.active,
        "cadence": plan and plan.cadence,
        "interval_days": plan and plan.interval_days,
        "plan_day": plan and plan.day_of_month,
        "time": plan and plan.time_of_day,
        "plan_zone": plan and str(plan.timezone),
        "mode": plan and plan.grant_mode,
        "amount": plan and plan.amount,
        "cap": plan and plan.rollover_cap,
    }


@contextmanager
def sessions(cluster: Cluster) -> Iterator[list[Rule]]:
    """The rule in a migrated database, once for each of SESSIONS."""
    name = cluster.create(cluster.template)
    url = cluster.url(name).replace("+psycopg", "", 1)  # SQLAlchemy's word
    try:
        connections = [psycopg.connect(url, autocommit=True, options=options) for options in SESSIONS.values()]
        yield [Rule(connection) for connection in connections]
        for connection in connections:
            connection.close()
    finally:
        cluster.drop(name)
