"""The checker: whether the ledger is what it must be, by nothing that the product says of itself.

It shares no code with the product. Its sources are the tables of the service, what the host app noted by itself
(population.py) and what triggers of the host's saw (witness.py); its arithmetic is its own (arithmetic.py).

    balance        born - spent + granted - taken back, user by user
    movement       each movement of a balance or a date is one row of the ledger, or a spend, or the host's; and back
    audit          each row of the history is one of the audit log
    granted-twice  one live grant for a window, none that begins inside another
    window         of a grant: the right one of the user's grid, with what was missed, and the next date after it
    not-due · held · inactive   nobody is granted before it is due (unless forced), while held, while inactive
    amount         target and mode: the credits that this plan adds to that balance
    negative       nobody is brought below zero
    rollback       takes back what its run granted, once, as far as it is there, and moves dates as asked
    dry-run        changes nothing
    runs           what has ended has ended whole; totals, batches and rows say the same
    slot · key     one run each; whoever asks again is told of it
    two-batches    nobody is in two unfinished batches
    poison · given-up   nobody fails whom the host does not refuse, and no batch is given up
    due-left · unfinished   (finished) nobody who was due is due still, and every run has ended
    stranger       a user whom nobody brought
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.faults import accounts, books, run_rules
from tests.faults.books import Finding
from tests.faults.run_rules import watch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import psycopg

__all__ = ["Finding", "check", "watch"]

EACH_MAX = 10
"""Findings of a rule that are told; the others are counted."""

_ONE_SNAPSHOT = """
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;
SET LOCAL search_path = credits;
SET LOCAL timezone = 'UTC';
SET LOCAL statement_timeout = 0;
"""


def check(connection: psycopg.Connection[Any], *, finished: bool) -> list[Finding]:
    """Check everything, at one instant.

    Args:
        connection: in autocommit, as somebody who may read both schemas.
        finished: the service has had the time to finish: nobody is left, and no run. At any other time all the other
            rules hold.

    Returns:
        What is wrong; of each rule `EACH_MAX` at most, and a line for the others.
    """
    with connection.transaction():
        connection.execute(_ONE_SNAPSHOT)
        return list(_few_of_each(_all(connection, finished=finished)))


def _all(connection: psycopg.Connection[Any], *, finished: bool) -> Iterator[Finding]:
    yield from run_rules.broken_rules(connection, finished=finished)
    everything = books.read(connection)
    for name in everything.strangers:
        yield Finding("stranger", f"nobody brought {name}")
    for account in everything.accounts.values():
        yield from accounts.audit(account, everything, finished=finished)


def _few_of_each(findings: Iterable[Finding]) -> Iterator[Finding]:
    found: Counter[str] = Counter()
    for finding in findings:
        found[finding.rule] += 1
        if found[finding.rule] <= EACH_MAX:
            yield finding
    for rule, times in found.items():
        if times > EACH_MAX:
            yield Finding(rule, f"… and {times - EACH_MAX:,} more")
