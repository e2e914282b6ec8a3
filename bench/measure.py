"""Ways of doing the same work, timed in turn, and each one's ratio to a yardstick of the same minute."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.worlds import verify
from cli.output import err

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.worlds import Worlds


@dataclass(frozen=True)
class Way:
    """One way of refreshing everybody.

    Attributes:
        name: of the row.
        worlds: where its databases come from.
        refresh: does it in the database of that URL, and returns its seconds.
        by_a_run: whether a run of ours says so in the end.
    """

    name: str
    worlds: Worlds
    refresh: Callable[[str], float]
    by_a_run: bool = True


@dataclass(frozen=True)
class Result:
    """Users per second over the repetitions; the ratio is to the first way of the same repetition. Medians."""

    name: str
    users_per_second: float
    ratio: float
    slowest: float
    fastest: float
    repetitions: int

    def row(self) -> dict[str, object]:
        """What a table says of it."""
        return {
            "way": self.name,
            "users/s": f"{self.users_per_second:,.0f}",
            "slowest to fastest": f"{self.slowest:,.0f} to {self.fastest:,.0f}",
            "ratio": f"{self.ratio:.2f}",
        }


def measure(ways: Sequence[Way], repetitions: int) -> list[Result]:
    """Time each way in turn, again and again, so that a slow minute of the machine slows all of them.

    Each begins with a fresh copy of the same database, and every row is verified after it. Each repetition has an order
    of its own, the same in each run of the benchmark: always behind the same way, one could be slowed by what that
    leaves to the disk and the caches.

    Args:
        ways: the first is the yardstick.
        repetitions: of each.

    Raises:
        SystemExit: a way did not refresh every user exactly once.
    """
    speeds: dict[str, list[float]] = {way.name: [] for way in ways}
    for repetition in range(1, repetitions + 1):
        for way in random.Random(repetition).sample(ways, len(ways)):  # noqa: S311 - an order, no secret
            with way.worlds.copy() as url:
                seconds = way.refresh(url)
                verify(url, way.worlds.users, by_a_run=way.by_a_run)
            speed = way.worlds.users / seconds
            speeds[way.name].append(speed)
            err.print(f"{repetition}/{repetitions}  {way.name}: {speed:,.0f} users/s", highlight=False)
    return [result(name, speed, speeds[ways[0].name]) for name, speed in speeds.items()]


def result(name: str, speeds: list[float], yardstick: list[float]) -> Result:
    """Medians of a way, and of its ratios to the yardstick repetition by repetition."""
    ratios = [speed / limit for speed, limit in zip(speeds, yardstick, strict=True)]
    return Result(name, statistics.median(speeds), statistics.median(ratios), min(speeds), max(speeds), len(speeds))
