"""Plans: checked before they are saved, shown before they move anybody, and changed with an audit row.

    draft (nothing written: the plan as it would be, its windows, how many users move) → save, guarded by the draft

Moving the users is a run of its own: regrid.py.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from datetime import time  # noqa: TC003 - psycopg's row factory builds the class at run time
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db import one
from refresh import regrid, runs
from refresh.errors import RefusedError
from refresh.windows import plan_windows

if TYPE_CHECKING:
    from collections.abc import Mapping

    import psycopg

    from refresh.windows import Window

GRANT_MODES = ("fill", "reset", "add", "rollover")
CADENCES = ("rolling", "monthly", "daily", "external")
CREDITS_MAX = 2**63 - 1

_RANGES = {
    "amount": (1, CREDITS_MAX),
    "rollover_cap": (0, CREDITS_MAX),
    "interval_days": (1, 3_660),
    "day_of_month": (1, 31),
}
_CHOICES = {"grant_mode": GRANT_MODES, "cadence": CADENCES}
_GRID = ("cadence", "interval_days", "day_of_month", "time_of_day", "timezone")
_CODE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A row of `plans`, with the defaults of the table."""

    code: str
    name: str
    amount: int
    grant_mode: str = "fill"
    rollover_cap: int | None = None
    cadence: str = "rolling"
    interval_days: int = 30
    day_of_month: int | None = None
    time_of_day: time | None = None
    timezone: str = "UTC"
    atomic: bool = False
    active: bool = True

    def values(self) -> dict[str, Any]:
        """The columns, for a statement."""
        return asdict(self)

    def facts(self) -> dict[str, object]:
        """What a JSON answer and the audit log say of it."""
        return {
            "code": self.code,
            "name": self.name,
            "amount": self.amount,
            "grantMode": self.grant_mode,
            "rolloverCap": self.rollover_cap,
            "cadence": self.cadence,
            "intervalDays": self.interval_days,
            "dayOfMonth": self.day_of_month,
            "timeOfDay": self.time_of_day.isoformat("minutes") if self.time_of_day else None,
            "timezone": self.timezone,
            "atomic": self.atomic,
            "active": self.active,
        }


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan as it would be.

    Attributes:
        before: as it is; None when it would be new.
        after: as it would be.
        windows: of a user who starts now.
        users_moved: how many users would get another date.
        paused: they would move after the pause.
    """

    before: Plan | None
    after: Plan
    windows: list[Window]
    users_moved: int
    paused: bool

    @property
    def leaves_external(self) -> bool:
        """Whether its users had no dates until now."""
        return self.before is not None and self.before.cadence == "external" and self.after.cadence != "external"

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "before": self.before.facts() if self.before else None,
            "after": self.after.facts(),
            "windows": [window.facts() for window in self.windows],
            "usersMoved": self.users_moved,
            "paused": self.paused,
        }


_READ = "SELECT * FROM plans WHERE code = %(code)s"
_READ_LOCKED = "SELECT * FROM plans WHERE code = %(code)s FOR NO KEY UPDATE"
_LIST = "SELECT * FROM plans ORDER BY code"
_USERS = "SELECT plan_code, count(*) FROM users WHERE plan_code IS NOT NULL GROUP BY plan_code"
_INSERT = """
INSERT INTO plans (
    code, name, amount, grant_mode, rollover_cap, cadence, interval_days, day_of_month, time_of_day, timezone, atomic,
    active
) VALUES (
    %(code)s, %(name)s, %(amount)s, %(grant_mode)s, %(rollover_cap)s, %(cadence)s, %(interval_days)s,
    %(day_of_month)s, %(time_of_day)s, %(timezone)s, %(atomic)s, %(active)s
) ON CONFLICT DO NOTHING
"""
_UPDATE = """
UPDATE plans SET
    name = %(name)s, amount = %(amount)s, grant_mode = %(grant_mode)s, rollover_cap = %(rollover_cap)s,
    cadence = %(cadence)s, interval_days = %(interval_days)s, day_of_month = %(day_of_month)s,
    time_of_day = %(time_of_day)s, timezone = %(timezone)s, atomic = %(atomic)s, active = %(active)s
WHERE code = %(code)s
"""
_AUDIT = """
INSERT INTO credit_audit_logs (actor, action, run_id, detail) VALUES (%(actor)s, 'plan_set', %(run_id)s, %(detail)s)
"""


def list_plans(connection: psycopg.Connection[Any]) -> list[tuple[Plan, int]]:
    """All plans with the number of their users."""
    users = dict(connection.execute(_USERS).fetchall())
    with connection.cursor(row_factory=class_row(Plan)) as cursor:
        return [(plan, users.get(plan.code, 0)) for plan in cursor.execute(_LIST)]


def draft(connection: psycopg.Connection[Any], code: str, changes: Mapping[str, Any]) -> Draft:
    """What a plan would be with some values changed. Nothing is written.

    Args:
        connection: counting the users of a large plan may take longer than the pool's limit of a batch.
        code: of a plan that is there, or of a new one.
        changes: by the names of `Plan`'s attributes.

    Raises:
        RefusedError: a value is not allowed, or does not go with the others.
    """
    before = _read(connection, _READ, code)
    after = _changed(before, code, changes)
    if after.timezone != (before.timezone if before else None):
        _check_timezone(connection, after.timezone)
    (enabled,) = one(connection.execute("SELECT enabled FROM settings"))
    made = Draft(before, after, plan_windows(connection, after.values()), 0, not enabled)
    if before is None or not _moves_grid(before, after):
        return made
    moved = regrid.count_moved(connection, after.values(), leaves_external=made.leaves_external)
    return replace(made, users_moved=moved)


def save(connection: psycopg.Connection[Any], made: Draft, *, actor: str, batch_size: int) -> runs.Opened | None:
    """Save a drafted plan, and open the run that moves its users.

    Args:
        connection: in a transaction that waits up to `runs.OPENING_LOCK_TIMEOUT`; publish after its commit.
        made: what was shown.
        actor: who asks, for the audit log.
        batch_size: users in a transaction of the run.

    Returns:
        The run; None when nobody moves.

    Raises:
        RefusedError: the plan is not what it was when it was drafted.
    """
    runs.lock_door(connection)
    values = made.after.values()
    if _read(connection, _READ_LOCKED, made.after.code) != made.before or (
        connection.execute(_UPDATE if made.before else _INSERT, values).rowcount != 1
    ):
        raise RefusedError(f"plan {made.after.code} was changed by somebody else meanwhile: look at it again")
    run = None
    if made.before and _moves_grid(made.before, made.after):
        run = regrid.open_regrid(
            connection, values, leaves_external=made.leaves_external, requested_by=actor, batch_size=batch_size
        )
    detail = {
        "plan": made.after.code,
        "before": made.before.facts() if made.before else None,
        "after": made.after.facts(),
        "usersMoved": run.users_selected if run else 0,
    }
    connection.execute(_AUDIT, {"actor": actor, "run_id": run.run_id if run else None, "detail": Jsonb(detail)})
    return run


def _read(connection: psycopg.Connection[Any], query: str, code: str) -> Plan | None:
    with connection.cursor(row_factory=class_row(Plan)) as cursor:
        return cursor.execute(query, {"code": code}).fetchone()


def _moves_grid(before: Plan, after: Plan) -> bool:
    return any(getattr(before, name) != getattr(after, name) for name in _GRID)


def _changed(before: Plan | None, code: str, changes: Mapping[str, Any]) -> Plan:
    for name, value in changes.items():
        _check_value(name, value)
    if before is not None:
        after = replace(before, **changes)
    else:
        if not _CODE.fullmatch(code):
            raise RefusedError(f"{code!r} is no code for a new plan: up to 63 of a-z, 0-9, '.', '_' and '-'")
        if "amount" not in changes:
            raise RefusedError(f"there is no plan {code!r}; a new one needs an amount (--amount)")
        after = Plan(**{"code": code, "name": code, **changes})
    _check_together(after, changes)
    return after


def _check_value(name: str, value: Any) -> None:
    label = name.replace("_", " ")
    if name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise RefusedError(f"{label} {value} is not allowed: {low:,} to {high:,} are")
    elif name in _CHOICES and value not in _CHOICES[name]:
        raise RefusedError(f"{label} {value!r} is not allowed: {', '.join(_CHOICES[name])} are")
    elif name == "name" and not value.strip():
        raise RefusedError("a plan's name cannot be empty")


def _check_together(plan: Plan, changes: Mapping[str, Any]) -> None:
    if plan.grant_mode == "rollover" and plan.rollover_cap is None:
        raise RefusedError("grant mode rollover needs a cap, the most that is carried over: --rollover-cap, 0 or more")
    if plan.cadence == "monthly" and plan.day_of_month is None:
        raise RefusedError("cadence monthly needs a day of the month: --day, 1 to 31")
    if plan.cadence == "daily" and plan.time_of_day is None:
        raise RefusedError("cadence daily needs a time of day: --time, 00:00 to 23:59")
    # A value that says nothing in this plan was meant for another cadence or mode.
    for name, option, wanted, found in (
        ("rollover_cap", "--rollover-cap", ("grant mode", "rollover"), plan.grant_mode),
        ("interval_days", "--interval-days", ("cadence", "rolling"), plan.cadence),
        ("day_of_month", "--day", ("cadence", "monthly"), plan.cadence),
    ):
        if name in changes and found != wanted[1]:
            raise RefusedError(f"{option} says something of {' '.join(wanted)} only, and this plan's is {found}")


def _check_timezone(connection: psycopg.Connection[Any], wanted: str) -> None:
    names = [name for (name,) in connection.execute("SELECT name FROM timezones ORDER BY name")]
    if wanted in names:
        return
    # By the whole name and by the city alone, whatever the case.
    known = {name.rpartition("/")[2].lower(): name for name in names} | {name.lower(): name for name in names}
    close = [known[match] for match in get_close_matches(wanted.replace(" ", "_").lower(), known, n=3)]
    meant = f"did you mean {' or '.join(dict.fromkeys(close))}?" if close else "IANA names such as Europe/Berlin are"
    raise RefusedError(f"time zone {wanted!r} is not allowed: {meant}")
