"""Plays one of the systems of docs/recipes/ over a year: one scan after the other, against that system's own logic.

The clock is `as_of`. It stops at each boundary of each person, a microsecond before and after it, and once a day in
between; after every scan all history rows, balances and dates are compared with what that system would have done. What
runs at the database's `now()` (insert, view, functions, trigger) is not played here. Neither is `last_credit_refresh`,
which says when a grant was really made.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.command import Cli
    from tests.integration.world import World

PAGES = Path(__file__).resolve().parents[2] / "docs" / "recipes"
MICROSECOND = timedelta(microseconds=1)
DAY = timedelta(days=1)

Period = tuple[datetime, datetime]


def utc(year: int, month: int, day: int, hour: int = 0, minute: int = 0) -> datetime:
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


@dataclass
class Person:
    """A user as the played system sees them.

    Attributes:
        last: the beginning of the period that they were last refreshed for.
        due: the beginning of the first period that they have had nothing for; None where nobody keeps one.
        started: the day that their subscription, or their first 30 days, began.
        spends: credits a day, while they last.
        noted: the period that fell due under this hold has its row.
    """

    name: str
    plan: str | None
    balance: int
    started: datetime = datetime(2024, 1, 1, tzinfo=UTC)
    custom_amount: int | None = None
    day: int | None = None
    zone: str | None = None
    spends: int = 0
    active: bool = True
    held: bool = False
    held_until: datetime | None = None
    noted: bool = False
    last: datetime = field(init=False)
    due: datetime | None = field(init=False)


class System(Protocol):
    """The plain logic of one of the five systems."""

    def period(self, person: Person, at: datetime) -> Period | None:
        """The period of that system's calendar that holds `at`: its beginning and its end; None: it has none."""

    def refreshed(self, person: Person) -> int:
        """The balance after a refresh."""


class Row(NamedTuple):
    """A history row, as far as the played system knows of it."""

    status: str
    window_start: datetime
    window_end: datetime
    first_missed_at: datetime | None
    windows_passed: int
    plan_code: str | None
    old_balance: int
    credits_added: int
    new_balance: int


class Seen(NamedTuple):
    """A user after a scan, with the row that the scan wrote."""

    balance: int
    due: datetime | None
    row: Row | None


_JOIN = """
INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at, credit_refresh_day, custom_credit_amount,
    timezone)
VALUES (%(name)s, %(plan)s, %(balance)s, %(due)s, %(day)s, %(custom_amount)s, %(zone)s)
"""
_SEEN = """
SELECT u.external_id, u.credit_balance, u.next_refresh_at, h.id, h.status, h.window_start, h.window_end,
    h.first_missed_at, h.windows_passed, h.plan_code, h.old_balance, h.credits_added, h.new_balance
FROM users AS u LEFT JOIN credit_refresh_histories AS h ON h.user_id = u.id AND h.id > %s
"""
_SPEND = "UPDATE users SET credit_balance = credit_balance - %s WHERE external_id = %s AND credit_balance >= %s"


class Play:
    """A year, or more, in the life of a few people.

    Args:
        world: an empty database that has the plans.
        system: what they are compared with.
        daily: when the clock stops every day.
        outage: no scan from the first of these instants until the second.
    """

    def __init__(self, world: World, system: System, *, daily: time = time(12), outage: Period | None = None) -> None:
        self.world = world
        self.people: dict[str, Person] = {}
        self.refreshed: Counter[str] = Counter()
        self.held: list[tuple[str, datetime]] = []
        self.scans = 0
        self._system = system
        self._daily = daily
        self._outage = outage
        self._events: dict[datetime, Callable[[], None]] = {}
        self._last_id = 0

    def join(self, at: datetime, person: Person) -> None:
        """Import somebody whom the old system refreshed for the period that holds `at`; a balance grants nothing."""
        period = self._system.period(person, at)
        person.last, person.due = period or (at, None)
        self.world.sql.execute(_JOIN, vars(person))
        self.people[person.name] = person

    def on(self, at: datetime, event: Callable[[], None]) -> None:
        """Let something happen just before the scan of that instant."""
        self._events[at] = event

    def joins(self, at: datetime, person: Person) -> None:
        self.on(at, lambda: self.join(at, person))

    def changes(self, at: datetime, name: str, column: str, value: object) -> None:
        """The host changes a column of a user."""

        def change() -> None:
            self.world.sql.execute(f"UPDATE users SET {column} = %s WHERE external_id = %s", (value, name))  # noqa: S608
            setattr(self.people[name], {"plan_code": "plan"}.get(column, column), value)

        self.on(at, change)

    def leaves_the_calendar(self, at: datetime, name: str, plan: str) -> None:
        """Somebody moves to a plan whose refreshes come from elsewhere."""
        self.changes(at, name, "plan_code", plan)
        change = self._events[at]

        def leave() -> None:
            change()
            self.people[name].due = None

        self.on(at, leave)

    def gives(self, at: datetime, name: str, amount: int) -> None:
        """The host adds credits that somebody has bought, or takes them."""

        def give() -> None:
            self.world.sql.execute(
                "UPDATE users SET credit_balance = credit_balance + %s WHERE external_id = %s", (amount, name)
            )
            self.people[name].balance += amount

        self.on(at, give)

    def holds(self, at: datetime, name: str, *, until: datetime | None = None) -> None:
        """A plain UPDATE of the host's; `until` is a part of the hold and no event."""

        def hold() -> None:
            self.world.sql.execute(
                "UPDATE users SET credit_refresh_hold = true, hold_reason = 'fraud check', hold_until = %s"
                " WHERE external_id = %s",
                (until, name),
            )
            person = self.people[name]
            person.held, person.held_until, person.noted = True, until, False

        self.on(at, hold)
        if until is not None:
            self.on(until, lambda: None)

    def releases(self, at: datetime, name: str) -> None:
        def release() -> None:
            self.world.sql.execute("UPDATE users SET credit_refresh_hold = false WHERE external_id = %s", (name,))
            self.people[name].held = False

        self.on(at, release)

    def run(self, start: datetime, end: datetime) -> None:
        """Play from `start` to `end`, and check what is left behind."""
        if self._outage:
            self.on(self._outage[1], lambda: None)
        at = start
        while at < end:
            self._step(at)
            at = self._next(at)
        assert self._events == {}
        self._check_records()

    def _next(self, at: datetime) -> datetime:
        daily = datetime.combine(at, self._daily, UTC)
        marks = {daily, daily + DAY}
        for person in self.people.values():
            period = self._system.period(person, at)
            for boundary in period or ():
                marks |= {boundary - MICROSECOND, boundary, boundary + MICROSECOND}
        for event in self._events:
            marks |= {event - MICROSECOND, event}
        return min(mark for mark in marks if mark > at)

    def _step(self, at: datetime) -> None:
        event = self._events.pop(at, None)
        if event:
            event()
        if not (self._outage and self._outage[0] <= at < self._outage[1]):
            self._scan(at)
        if at.timetz() == self._daily.replace(tzinfo=UTC):
            for person in self.people.values():
                self._spend(person)

    def _scan(self, at: datetime) -> None:
        run = self.world.scan(as_of=at)
        if run.batches_total:
            self.world.work(self.world.claim(run))
        self.scans += 1
        expected = {person.name: self._expect(person, at) for person in self.people.values()}
        seen = self._see()
        assert seen == expected, f"as of {at.isoformat()}"

    def _see(self) -> dict[str, Seen]:
        seen: dict[str, Seen] = {}
        last_id = self._last_id
        for found in self.world.rows(_SEEN, last_id):
            name = found["external_id"]
            assert name not in seen, f"one scan wrote two rows for {name}"
            row = Row(*(found[column] for column in Row._fields)) if found["id"] else None
            seen[name] = Seen(found["credit_balance"], found["next_refresh_at"], row)
            self._last_id = max(self._last_id, found["id"] or 0)
        return seen

    def _expect(self, person: Person, at: datetime) -> Seen:
        """Do to the person what the played system does when it looks at `at`."""
        period = self._system.period(person, at)
        row = None
        if period and person.active and person.last < period[0]:
            if person.held and (person.held_until is None or at < person.held_until):
                row = self._note(person, period)
            else:
                row = self._refresh(person, period)
        return Seen(person.balance, person.due, row)

    def _note(self, person: Person, period: Period) -> Row | None:
        if person.noted:
            return None
        person.noted = True
        self.held.append((person.name, period[0]))
        return self._row("held", person, period, person.balance)

    def _refresh(self, person: Person, period: Period) -> Row:
        row = self._row("refreshed", person, period, self._system.refreshed(person))
        person.balance = row.new_balance
        person.last, person.due = period
        person.held = person.noted = False
        self.refreshed[person.name] += 1
        return row

    def _row(self, status: str, person: Person, period: Period, balance: int) -> Row:
        passed = 0
        boundary = person.due
        while boundary is not None and boundary < period[0]:
            following = self._system.period(person, boundary)
            boundary = following[1] if following else None
            passed += 1
        missed = person.due if passed else None
        added = balance - person.balance
        return Row(status, *period, missed, passed, person.plan, person.balance, added, balance)

    def _spend(self, person: Person) -> None:
        if 0 < person.spends <= person.balance:
            self.world.sql.execute(_SPEND, (person.spends, person.name, person.spends))
            person.balance -= person.spends

    def _check_records(self) -> None:
        """Each scan is a run that succeeded, each grant and each hold has its audit row."""
        runs = self.world.row(
            "SELECT count(*) AS runs, count(*) FILTER (WHERE status = 'succeeded') AS succeeded,"
            " sum(users_refreshed) AS refreshed, sum(users_held) AS held FROM credit_refresh_runs"
        )
        grants = self.refreshed.total()
        assert runs == {"runs": self.scans, "succeeded": self.scans, "refreshed": grants, "held": len(self.held)}
        audited = self.world.rows(
            "SELECT action, count(*) AS rows FROM credit_audit_logs WHERE run_id IS NOT NULL GROUP BY action"
        )
        expected = {"refreshed": grants, "held": len(self.held)}
        assert {row["action"]: row["rows"] for row in audited} == {name: n for name, n in expected.items() if n}


def set_up(cli: Cli, page: str) -> list[str]:
    """Run the commands of a page that set its plans and the trigger up, and return what they answer."""
    text = "".join(_blocks(page, "sh")).replace("\\\n", " ")
    commands = re.findall(r"^credits ((?:plans set|db triggers) .*\n)", text, re.MULTILINE)
    return [line for command in commands for line in cli.says(*shlex.split(command)).splitlines()]


def try_sql(world: World, page: str) -> None:
    """Run a page's SQL, for nothing: it is rolled back."""
    blocks = _blocks(page, "sql")
    assert blocks
    with world.host() as host:
        for block in blocks:
            host.execute(block)
        host.rollback()


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)
