"""What a fault is, and the register that each topic's file adds its own to (catalogue.py collects them)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from tests.faults.arena import Arena

    Run: TypeAlias = Callable[[Arena, Random, "Hits"], None]
    Unavailable: TypeAlias = Callable[[Arena], str | None]

OPEN = "in an open transaction"
GAP = "between commit and publish"


class Hits:
    """How often a fault hit what it was after."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, what: str, times: int = 1) -> None:
        """Count a hit, or several."""
        self.counts[what] += times


def _never(_arena: Arena) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: for `--only` and the tables.
        run: injects it, waits for as long as it lasts, heals what it broke and returns.
        aims: what it is meant to hit, as `Hits` counts it; none of them may be 0 over a whole run of the suite.
        about: what happens, in a line.
        unavailable: why it cannot be run here; None: it can.
        bound_seconds: after its end, everybody who was due then is refreshed within these; docs/guarantees.md has them.
    """

    name: str
    run: Run
    aims: tuple[str, ...]
    about: str
    unavailable: Unavailable = _never
    bound_seconds: float = 45.0


FAULTS: dict[str, Fault] = {}


def fault(name: str, *aims: str, unavailable: Unavailable = _never) -> Callable[[Run], Run]:
    """Register a fault; the first line of the function's docstring says what happens.

    Args:
        name: for `--only` and the tables.
        aims: what it is meant to hit.
        unavailable: why it cannot be run here.
    """

    def register(run: Run) -> Run:
        FAULTS[name] = Fault(name, run, aims, (run.__doc__ or "").partition("\n")[0], unavailable)
        return run

    return register
