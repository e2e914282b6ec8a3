"""All faults by their names. Each topic has a file; importing it registers what is in it."""

from __future__ import annotations

from tests.faults.faults import (
    callers,
    clocks,
    deployment,
    kills,
    messages,
    network,
    openings,
    postgres,
    redis,
    signals,
    twice,
)
from tests.faults.faults.kinds import FAULTS, GAP, OPEN, Fault, Hits, fault

__all__ = [
    "FAULTS",
    "GAP",
    "OPEN",
    "Fault",
    "Hits",
    "callers",
    "clocks",
    "deployment",
    "fault",
    "kills",
    "messages",
    "network",
    "openings",
    "postgres",
    "redis",
    "signals",
    "twice",
]
