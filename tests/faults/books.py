"""What the checker reads: the service's tables and the host's own notes, user by user, by SQL of its own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta  # noqa: TC003 - the named tuples' fields
from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple
from uuid import UUID  # noqa: TC003 - the same

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import psycopg


class Finding(NamedTuple):
    """Something that must not be.

    Attributes:
        rule: which rule it breaks.
        text: one clear line.
    """

    rule: str
    text: str


class Plan(NamedTuple):
    """How a plan grants."""

    code: str
    mode: str
    cap: int | None
    active: bool


class Run(NamedTuple):
    """What a run was asked for."""

    id: UUID
    work: str
    as_of: datetime | None
    force: bool
    keep_window: bool
    amount: int | None
    subject_id: UUID | None
    reopen: bool
    allow_negative: bool


class Row(NamedTuple):
    """A row of a user's history: all but plans and what a rollback or an apply left alone."""

    id: int
    run_id: UUID | None
    source: str
    status: str
    starts_at: datetime
    ends_at: datetime | None
    first_missed_at: datetime | None
    passed: int
    mode: str | None
    target: int | None
    old_balance: int
    credits_added: int
    new_balance: int
    due_at: datetime | None
    shortfall: int
    reversed_by: UUID | None
    at: datetime

    @property
    def live(self) -> bool:
        """A grant that nobody has taken back."""
        return self.status == "refreshed" and self.reversed_by is None

    @property
    def forced(self) -> bool:
        """A grant of a window of its own, before anything was due."""
        return self.ends_at is None or self.due_at is None or self.due_at > self.starts_at


class Move(NamedTuple):
    """A change of a user's row, as the witness saw it."""

    at: datetime
    old_balance: int
    new_balance: int
    old_next: datetime | None
    new_next: datetime | None
    old_held: bool
    new_held: bool
    old_until: datetime | None
    old_active: bool


@dataclass(slots=True)
class Account:
    """A user: as they came, as they are, and all that happened between.

    Attributes:
        spends: credits spent, by the instant of their transaction.
        set_back: dates that the host has moved, by the same.
        passed_over: instants at which a window was found granted already.
    """

    id: int
    external_id: str
    balance: int
    next_at: datetime | None
    held: bool
    held_until: datetime | None
    active: bool
    plan: Plan
    born_balance: int
    born_due_at: datetime
    target: int
    length: timedelta
    kind: str
    rows: list[Row] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    spends: dict[datetime, int] = field(default_factory=dict)
    set_back: dict[datetime, datetime] = field(default_factory=dict)
    passed_over: set[datetime] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Books:
    """All of it, at one instant.

    Attributes:
        at: that instant.
        scanned_at: when the last scheduled run was opened; None: there is none.
        strangers: users whom nobody saw coming.
        poisoned: users whom the host refuses.
    """

    at: datetime
    scanned_at: datetime | None
    runs: Mapping[UUID, Run]
    accounts: Mapping[int, Account]
    strangers: list[str]
    poisoned: frozenset[str]


_CLOCK = """
SELECT now(), (SELECT max(created_at) FROM credit_refresh_runs WHERE source = 'beat' AND NOT dry_run)
"""
_PLANS = "SELECT code, grant_mode, rollover_cap, active FROM plans"
_RUNS = """
SELECT
    id, work, as_of, force, keep_window, amount, subject_run_id,
    coalesce((selection ->> 'reopen')::boolean, false), coalesce((selection ->> 'allowNegative')::boolean, false)
FROM credit_refresh_runs
"""
_USERS = """
SELECT
    u.id, u.external_id, u.credit_balance, u.next_refresh_at, u.credit_refresh_hold, u.hold_until, u.active,
    b.plan_code, b.born_balance, b.due_at, b.target, make_interval(hours => 24 * b.interval_days), b.kind
FROM users AS u LEFT JOIN host.born AS b ON b.external_id = u.external_id
"""
_ROWS = """
SELECT
    user_id, id, run_id, source, status, window_start, window_end, first_missed_at, windows_passed, grant_mode, target,
    old_balance, credits_added, new_balance, previous_next_refresh_at, shortfall, reversed_by_run_id, created_at
FROM credit_refresh_histories
WHERE status IN ('refreshed', 'reversed', 'held', 'failed')
ORDER BY id
"""
_MOVES = """
SELECT
    user_id, moved_at, old_balance, new_balance, old_next, new_next, old_held, new_held, old_until, old_active
FROM host.moves
ORDER BY id
"""
_SPENDS = """
SELECT u.id, s.spent_at, sum(s.amount)::bigint
FROM host.spends AS s JOIN users AS u ON u.external_id = s.external_id
GROUP BY u.id, s.spent_at
"""
_SET_BACK = "SELECT u.id, m.moved_at, m.to_at FROM host.moved AS m JOIN users AS u ON u.external_id = m.external_id"
_PASSED_OVER = "SELECT user_id, occurred_at FROM credit_audit_logs WHERE action = 'already_granted'"
_POISONED = "SELECT external_id FROM host.poisoned"


def read(connection: psycopg.Connection[Any]) -> Books:
    """Read everything.

    Args:
        connection: in a transaction of one snapshot, whose time zone is UTC.
    """
    ((at, scanned_at),) = _rows(connection, _CLOCK)
    accounts, strangers = _read_accounts(connection)
    _fill(connection, accounts)
    runs = {run.id: run for run in map(Run._make, _rows(connection, _RUNS))}
    poisoned = frozenset(external_id for (external_id,) in _rows(connection, _POISONED))
    return Books(at, scanned_at, runs, accounts, strangers, poisoned)


def _rows(connection: psycopg.Connection[Any], query: LiteralString) -> list[tuple[Any, ...]]:
    return connection.execute(query, binary=True).fetchall()


def _read_accounts(connection: psycopg.Connection[Any]) -> tuple[dict[int, Account], list[str]]:
    """Those whom somebody brought, and the names of the others."""
    plans = {plan.code: plan for plan in map(Plan._make, _rows(connection, _PLANS))}
    accounts: dict[int, Account] = {}
    strangers = []
    for user_id, external_id, *user, plan_code, born_balance, due_at, target, length, kind in _rows(connection, _USERS):
        if plan_code is None:
            strangers.append(external_id)
            continue
        balance, next_at, held, held_until, active = user
        accounts[user_id] = Account(
            id=user_id,
            external_id=external_id,
            balance=balance,
            next_at=next_at,
            held=held,
            held_until=held_until,
            active=active,
            plan=plans[plan_code],
            born_balance=born_balance,
            born_due_at=due_at,
            target=target,
            length=length,
            kind=kind,
        )
    return accounts, strangers


def _fill(connection: psycopg.Connection[Any], accounts: Mapping[int, Account]) -> None:
    """What happened to them."""

    def of_each(query: LiteralString) -> Iterator[tuple[Account, list[Any]]]:
        for user_id, *values in _rows(connection, query):
            if account := accounts.get(user_id):
                yield account, values

    for account, values in of_each(_ROWS):
        account.rows.append(Row(*values))
    for account, values in of_each(_MOVES):
        account.moves.append(Move(*values))
    for account, (spent_at, amount) in of_each(_SPENDS):
        account.spends[spent_at] = amount
    for account, (moved_at, to_at) in of_each(_SET_BACK):
        account.set_back[moved_at] = to_at
    for account, (passed_at,) in of_each(_PASSED_OVER):
        account.passed_over.add(passed_at)


def by_instant(rows: Iterable[Row]) -> dict[datetime, list[Row]]:
    """Rows that were written in one transaction."""
    found: defaultdict[datetime, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.at].append(row)
    return dict(found)
