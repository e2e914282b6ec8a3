"""One user's account, gone through again from the day they came: what the witness saw against what the ledger says.

Movements come in the order in which transactions had the user's row, so each begins where the one before it ended. The
instant of its transaction ties a movement to its rows in the history, to its spend, or to the host's own mistake.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from tests.faults.arithmetic import Grant, Window, credits_to_add, due_window, forced_window, take_back
from tests.faults.books import Finding, by_instant

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from tests.faults.books import Account, Books, Move, Row, Run

LEFT = timedelta(minutes=2)
"""Whoever is due for longer than this was left, even if no scan came by."""


def audit(account: Account, books: Books, *, finished: bool) -> Iterator[Finding]:
    """All that is wrong with one account.

    Args:
        account: the user's.
        books: that it is part of.
        finished: whether the service has had the time to finish what is due.
    """
    yield from _sum(account)
    yield from _granted_once(account)
    yield from _failures(account, books)
    yield from _Replay(account, books).findings()
    if finished:
        yield from _left(account, books)


def _sum(account: Account) -> Iterator[Finding]:
    """What is there came with the user or from a grant, and what went was spent or taken back."""
    moved = sum(row.credits_added for row in account.rows if row.status in {"refreshed", "reversed"})
    spent = sum(account.spends.values())
    if account.balance != account.born_balance - spent + moved:
        yield Finding(
            "balance",
            f"{account.external_id} has {account.balance:,}: born with {account.born_balance:,}, spent {spent:,}, "
            f"{moved:+,} by the ledger",
        )


def _granted_once(account: Account) -> Iterator[Finding]:
    """No window has two live grants, and no regular one begins before the end of what was granted."""
    starts: set[datetime] = set()
    granted_until: datetime | None = None
    for row in account.rows:
        if not row.live:
            continue
        early = granted_until is not None and row.starts_at < granted_until and not row.forced
        if row.starts_at in starts or early:
            yield Finding(
                "granted-twice",
                f"{account.external_id} has two live grants for {row.starts_at.isoformat()}: row {row.id} of run "
                f"{row.run_id} is the second",
            )
        starts.add(row.starts_at)
        granted_until = max(filter(None, (granted_until, row.ends_at)), default=None)


def _failures(account: Account, books: Books) -> Iterator[Finding]:
    """Nobody fails but whom the host refuses."""
    if account.kind == "poison" or account.external_id in books.poisoned:
        return
    for row in account.rows:
        if row.status == "failed":
            yield Finding("poison", f"{account.external_id} failed in run {row.run_id}, and nobody refused them")


def _left(account: Account, books: Books) -> Iterator[Finding]:
    """Nobody who was due when the last scan came by is due still."""
    due_at = account.next_at
    if due_at is None or not account.active or not account.plan.active:
        return
    if account.held:
        if account.held_until is None:
            return
        due_at = max(due_at, account.held_until)
    # Released, or set back.
    due_at = max([due_at, *(move.at for move in account.moves if move.new_balance == move.old_balance)])
    seen_at = max(filter(None, (books.scanned_at, books.at - LEFT)))
    failed_at = max((row.at for row in account.rows if row.status == "failed"), default=None)
    if due_at <= seen_at and not (failed_at and books.scanned_at and failed_at >= books.scanned_at):
        yield Finding("due-left", f"{account.external_id} is due since {due_at.isoformat()} and was not refreshed")


class _Replay:
    """An account as it should have gone.

    Args:
        account: the user's.
        books: that it is part of.
    """

    def __init__(self, account: Account, books: Books) -> None:
        self._account = account
        self._runs = books.runs
        self._name = account.external_id
        self._balance = account.born_balance
        self._next = None if account.kind == "new" else account.born_due_at
        self._shortfall = 0
        self._granted: list[Row] = []
        """Live at that time, in their order."""

    def findings(self) -> Iterator[Finding]:
        ledger = by_instant(row for row in self._account.rows if row.status != "failed")
        spends = dict(self._account.spends)
        for at, moves in groupby(self._account.moves, key=attrgetter("at")):
            first, *others = moves
            last = others[-1] if others else first
            move = first._replace(new_balance=last.new_balance, new_next=last.new_next, new_held=last.new_held)
            yield from self._follows(move)
            yield from self._is_told(move, ledger.pop(at, []), spends.pop(at, 0))
            self._balance, self._next = move.new_balance, move.new_next
        for row in (row for rows in ledger.values() for row in rows):
            yield self._movement(f"row {row.id} ({row.status}, {row.credits_added:+,}) is in the ledger alone")
        for at, amount in spends.items():
            yield self._movement(f"{amount:,} spent at {at.isoformat()} never left the balance")
        if self._next != self._account.next_at:
            yield self._movement(f"the date went from {self._next} to {self._account.next_at} unseen")

    def _decided_at(self, row: Row) -> datetime:
        run = self._runs.get(row.run_id) if row.run_id else None
        return row.at if run is None or run.as_of is None else run.as_of

    def _movement(self, text: str) -> Finding:
        return Finding("movement", f"{self._name}: {text}")

    def _follows(self, move: Move) -> Iterator[Finding]:
        if self._balance != move.old_balance:
            yield self._movement(f"the balance went from {self._balance:,} to {move.old_balance:,} unseen")
        if self._next != move.old_next:
            yield self._movement(f"the date went from {self._next} to {move.old_next} unseen")

    def _is_told(self, move: Move, rows: list[Row], spent: int) -> Iterator[Finding]:
        """Whether the ledger and the host say of a movement what it was."""
        told = sum(row.credits_added for row in rows)
        moved = move.new_balance - move.old_balance
        if moved != told - spent:
            yield self._movement(
                f"{moved:+,} at {move.at.isoformat()}, where {told:+,} was granted and {spent:,} spent"
            )
        elif len(rows) == 1 and not spent and rows[0].old_balance != move.old_balance:
            yield self._movement(
                f"row {rows[0].id} begins at {rows[0].old_balance:,} and the balance was {move.old_balance:,}"
            )
        for row in rows:
            if row.status == "refreshed":
                yield from self._grant(row, move)
            elif row.status == "reversed":
                yield from self._reversal(row, move)
            elif not _held(move, self._decided_at(row)):
                yield Finding("held", f"{self._name} was noted as held at {row.at.isoformat()} and was not")
        if not rows and move.new_next != move.old_next:
            yield from self._date(move)

    def _date(self, move: Move) -> Iterator[Finding]:
        """A date that moved without a grant: the host's mistake, or what put it right."""
        if move.new_next == self._account.set_back.get(move.at):
            return
        granted_until = max((row.ends_at for row in self._granted if row.ends_at), default=None)
        if move.at in self._account.passed_over and granted_until and move.new_next and move.new_next >= granted_until:
            return
        yield Finding("window", f"{self._name}: the date went from {move.old_next} to {move.new_next}, nobody says why")

    def _grant(self, row: Row, move: Move) -> Iterator[Finding]:
        run = self._runs.get(row.run_id) if row.run_id else None
        at = self._decided_at(row)
        name = f"{self._name} was granted {row.starts_at.isoformat()} by run {row.run_id} at {row.at.isoformat()}"
        if _held(move, at):
            yield Finding("held", f"{name}, and held")
        if not move.old_active:
            yield Finding("inactive", f"{name}, and inactive")
        due_at = at if row.source == "insert" else move.old_next
        window = self._window(run, due_at, at)
        told = Window(row.starts_at, row.ends_at, row.passed, row.first_missed_at)
        if window is None:
            yield Finding("not-due", f"{name}, due at {due_at}")
        elif (window, due_at) != (told, row.due_at):
            yield Finding("window", f"{name}: {told} from {row.due_at}, instead of {window} from {due_at}")
        elif move.new_next != (row.ends_at or move.old_next):
            yield Finding("window", f"{name}: due again at {move.new_next}, not at {row.ends_at}")
        yield from self._amount(row, run, name)
        self._shortfall = 0
        self._granted.append(row)

    def _window(self, run: Run | None, due_at: datetime | None, at: datetime) -> Window | None:
        """The window that a grant at this instant is for; None: there is none."""
        if due_at is not None and due_at <= at:
            return due_window(due_at, at, self._account.length)
        if run is not None and run.force:
            return forced_window(due_at, at, self._account.length, keep=run.keep_window)
        return None

    def _amount(self, row: Row, run: Run | None, name: str) -> Iterator[Finding]:
        plan = self._account.plan
        amount = self._account.target if run is None or run.amount is None else run.amount
        terms = (plan.mode, amount - min(self._shortfall, amount), self._shortfall)
        if terms != (row.mode, row.target, row.shortfall):
            yield Finding("amount", f"{name}: {(row.mode, row.target, row.shortfall)} instead of {terms}")
            return
        added = credits_to_add(plan.mode, terms[1], plan.cap, row.old_balance)
        if (added, row.old_balance + added) != (row.credits_added, row.new_balance):
            yield Finding("amount", f"{name}: {row.credits_added:+,} at {row.old_balance:,} instead of {added:+,}")

    def _reversal(self, row: Row, move: Move) -> Iterator[Finding]:
        run = self._runs[row.run_id] if row.run_id else None
        name = f"{self._name}: row {row.id} of rollback {row.run_id}"
        grants = [grant for grant in self._granted if run is not None and grant.run_id == run.subject_id]
        if run is None or not grants or grants[-1].reversed_by != run.id:
            yield Finding("rollback", f"{name} takes back what its run never granted")
            return
        grant = grants[-1]
        if grant is not self._granted[-1]:
            yield Finding("rollback", f"{name} takes back a grant of somebody who was refreshed since")
        terms = Grant(grant.mode or "", grant.credits_added, grant.old_balance, grant.shortfall)
        taken = take_back(terms, move.old_balance, reopen=run.reopen, allow_negative=run.allow_negative)
        if (row.credits_added, row.shortfall) != (-taken.credits_taken, taken.shortfall):
            yield Finding("rollback", f"{name} takes {-row.credits_added:,} instead of {taken}")
        if move.new_balance < min(0, move.old_balance) and not run.allow_negative:
            yield Finding("negative", f"{name} leaves {move.new_balance:,}")
        self._granted.remove(grant)
        next_at = move.old_next
        if next_at == grant.ends_at and (grant.forced or run.reopen):
            ends = [other.ends_at for other in self._granted if other.ends_at]
            next_at = max([grant.due_at, *ends]) if grant.due_at else None
        if move.new_next != next_at:
            yield Finding("rollback", f"{name} leaves the date {move.new_next} instead of {next_at}")
        if run.reopen:
            self._shortfall += taken.shortfall
        elif grant.forced:
            self._shortfall += grant.shortfall


def _held(move: Move, at: datetime) -> bool:
    """Whether a hold was in force when a user's row was changed."""
    return move.old_held and (move.old_until is None or move.old_until > at)
