"""The forecast: how many refreshes and credits each day ahead brings, as things are and as they would be.

Nothing is written: the transaction is a read-only one. How it is reckoned, and why credits are two numbers: outlook.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

from db import one
from refresh import plans
from refresh.errors import RefusedError
from refresh.outlook import Outlook, read_outlook
from refresh.snapshot import read_only

if TYPE_CHECKING:
    from collections.abc import Iterable

    import psycopg

    from refresh.plans import Draft

DAYS = 30
DAYS_MAX = 366

_INTEGERS = ("amount", "rollover_cap", "interval_days", "day_of_month")
SETTABLE = (*_INTEGERS, "grant_mode", "cadence", "time_of_day", "timezone", "active")
_CHANGE_LENGTH = 160
_INTEGER = re.compile(r"-?[0-9]+")
_WALL_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Forecast:
    """What lies ahead.

    Attributes:
        at: the database's now().
        first_day, last_day: of the period, in UTC; the first is today, and what is overdue counts on it.
        paused: the service is paused; the numbers are those without the pause.
        all_dry: every run is a dry one; the numbers are those without that.
        as_it_is: under the plans as they are.
        drafts: the plans as they would be; none where nothing was asked.
        what_if: under these; None where nothing was asked.
    """

    at: datetime
    first_day: date
    last_day: date
    paused: bool
    all_dry: bool
    as_it_is: Outlook
    drafts: list[Draft]
    what_if: Outlook | None

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it.

        Returns:
            at, firstDay, lastDay, paused, allRunsDry; asItIs; and, each null unless something was asked:
            changes: a list of before, after (a plan as in `credits plans list`), usersMoved;
            whatIf: like asItIs; difference: users, refreshes, creditsLeast, creditsMost, whatIf less asItIs.

            asItIs holds users, refreshes, creditsLeast, creditsMost; plans, the same for each planCode; days, a list
            of day (UTC), planCode, refreshes, creditsLeast, creditsMost, without those that are empty; and
            notRefreshed, users by reason: later, held, inactive, noPlan, external, unscheduled, overflow.
        """
        asked = self.what_if is not None
        changes = [
            {
                "before": draft.before.facts() if draft.before else None,
                "after": draft.after.facts(),
                "usersMoved": draft.users_moved,
            }
            for draft in self.drafts
        ]
        return {
            "at": self.at.isoformat(),
            "firstDay": self.first_day.isoformat(),
            "lastDay": self.last_day.isoformat(),
            "paused": self.paused,
            "allRunsDry": self.all_dry,
            "asItIs": self.as_it_is.facts(),
            "changes": changes if asked else None,
            "whatIf": self.what_if.facts() if self.what_if else None,
            "difference": (self.what_if.total - self.as_it_is.total).facts() if self.what_if else None,
        }


_PERIOD = """
SELECT now(), t.today, t.today + make_interval(hours => 24 * %(days)s), NOT s.enabled, s.dry_run
FROM settings AS s CROSS JOIN (SELECT date_trunc('day', now(), 'UTC') AS today) AS t
"""
_CODES = "SELECT code FROM plans ORDER BY code"


def parse_change(text: str) -> tuple[str, str, Any]:
    """A change such as `pro.amount=25000`: the plan's code, the name of a value, and the value.

    Raises:
        RefusedError: it is no such change. Whether the plan and the value are allowed is `forecast()`'s to say.
    """
    target, equals, value = text.partition("=")
    code, _, name = target.rpartition(".")
    if len(text) > _CHANGE_LENGTH:
        raise RefusedError(f"{text[:_CHANGE_LENGTH]!r}… is no change: up to {_CHANGE_LENGTH} characters are allowed")
    if not equals or not code:
        raise RefusedError(f"{text!r} is no change: write PLAN.NAME=VALUE, such as pro.amount=25000")
    if name not in SETTABLE:
        raise RefusedError(f"{name!r} in {text!r} is not allowed: {', '.join(SETTABLE)} are")
    if name in _INTEGERS:
        if not _INTEGER.fullmatch(value):
            raise RefusedError(f"{value!r} in {text!r} is not allowed: a whole number without separators is")
        return code, name, int(value)
    if name == "time_of_day":
        found = _WALL_TIME.fullmatch(value)
        if found is None:
            raise RefusedError(f"{value!r} in {text!r} is not allowed: 00:00 to 23:59 are")
        return code, name, time(int(found[1]), int(found[2]))
    if name == "active":
        if value not in _BOOLEANS:
            raise RefusedError(f"{value!r} in {text!r} is not allowed: true, false are")
        return code, name, _BOOLEANS[value]
    return code, name, value


def forecast(
    connection: psycopg.Connection[Any], *, days: int = DAYS, changes: Iterable[tuple[str, str, Any]] = ()
) -> Forecast:
    """What the next days bring, as things are and, where changes are given, as they would be. Nothing is written.

    Args:
        connection: at the very beginning of a transaction, which becomes read-only with one snapshot.
        days: how many days (UTC) from today on, today being the first; 1 to `DAYS_MAX`.
        changes: (plan, name, value) as `parse_change()` gives them.

    Raises:
        RefusedError: `days` is not allowed; no such plan, a value twice, or one that the plan cannot have.
    """
    if not 1 <= days <= DAYS_MAX:
        raise RefusedError(f"{days} days are not allowed: 1 to {DAYS_MAX} are")
    read_only(connection)
    at, today, until, paused, all_dry = one(connection.execute(_PERIOD, {"days": days}))
    drafts = _drafts(connection, changes)
    as_it_is = read_outlook(connection, until, [])
    what_if = read_outlook(connection, until, drafts) if drafts else None
    last = until.date() - timedelta(days=1)
    return Forecast(at, today.date(), last, paused, all_dry, as_it_is, drafts, what_if)


def _drafts(connection: psycopg.Connection[Any], changes: Iterable[tuple[str, str, Any]]) -> list[Draft]:
    wanted: dict[str, dict[str, Any]] = {}
    codes = [code for (code,) in connection.execute(_CODES)]
    for code, name, value in changes:
        if code not in codes:
            raise RefusedError(f"there is no plan {code!r}: {', '.join(codes)} are there")
        if name in wanted.setdefault(code, {}):
            raise RefusedError(f"{code}.{name} is set twice, to {wanted[code][name]} and to {value}: once is allowed")
        wanted[code][name] = value
    return [plans.draft(connection, code, values) for code, values in wanted.items()]
