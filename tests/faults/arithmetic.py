"""The rule a third time: rolling windows and grant modes in plain Python, for the checker alone.

Written from the design and not from the SQL, and not shared with the product or its other tests. Instants are aware,
credits are integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime, timedelta


@dataclass(frozen=True, slots=True)
class Window:
    """A window of a user's grid, and how many before it went by without a grant."""

    starts_at: datetime
    ends_at: datetime | None
    passed: int = 0
    first_missed_at: datetime | None = None


def due_window(due_at: datetime, at: datetime, length: timedelta) -> Window:
    """The window of the grid through `due_at` that holds `at`, which is not earlier.

    Args:
        due_at: the first boundary that has no grant.
        at: when it is granted.
        length: of a window; whole days of 24 hours.
    """
    passed = (at - due_at) // length
    starts_at = due_at + passed * length
    return Window(starts_at, starts_at + length, passed, due_at if passed else None)


def forced_window(due_at: datetime | None, at: datetime, length: timedelta, *, keep: bool) -> Window:
    """The window that a forced grant begins at once, before anything is due.

    Args:
        due_at: when the user would be due; the new window ends no earlier.
        at: the run's instant.
        length: of a window.
        keep: leave the date where it is.
    """
    if keep:
        return Window(at, due_at)
    return Window(at, max(at + length, due_at or at))


def credits_to_add(mode: str, target: int, cap: int | None, balance: int) -> int:
    """What a grant adds; negative where it lowers."""
    if mode == "fill":
        return max(0, target - balance)
    if mode == "reset":
        return target - balance
    if mode == "add":
        return target
    carried = min(balance, cap or 0)  # rollover; a debt is carried over whole
    return carried + target - balance


@dataclass(frozen=True, slots=True)
class TakenBack:
    """What a rollback takes of a grant, and what of it the user has spent."""

    credits_taken: int
    shortfall: int


@dataclass(frozen=True, slots=True)
class Grant:
    """The terms of a grant that a rollback has to know."""

    mode: str
    credits_added: int
    old_balance: int
    shortfall: int


def take_back(grant: Grant, balance: int, *, reopen: bool, allow_negative: bool) -> TakenBack:
    """What is taken back of a grant from a balance."""
    there = min(grant.credits_added, max(balance, 0))
    missing = grant.credits_added - there
    if reopen and grant.mode in {"fill", "reset"}:
        shortfall = missing + grant.shortfall + min(grant.old_balance, 0)
    else:
        shortfall = (0 if allow_negative else missing) + (grant.shortfall if reopen else 0)
    return TakenBack(grant.credits_added if allow_negative else there, max(shortfall, 0))
