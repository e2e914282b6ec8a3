"""Clocks that step while processes run, by libfaketime: PostgreSQL's clock, the one that counts, stays right."""

from __future__ import annotations

import re
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.faults.faults.kinds import fault

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits
    from tests.faults.processes import Kept

STEPPED = "processes that wrote another time"
_STEP_SECONDS = 2 * 3600
_STAY_SECONDS = (6.0, 12.0)
_WRITTEN = re.compile(r"\b20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}")
_LIBRARIES = ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/lib/faketime/libfaketime.so.1")
_START_SECONDS = 60.0
_AT_WORK = ("[CreditRefresh]", "Sending due task")
"""What a worker's log says, and a beat's, once they do what they are there for."""
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - libfaketime's


def _library() -> Path | None:
    root = Path("/")
    return next((path for pattern in _LIBRARIES for path in root.glob(pattern.removeprefix("/"))), None)


def _no_library(_arena: Arena) -> str | None:
    return None if _library() else "libfaketime is not installed (Debian's package faketime)"


@fault("clocks-forward", STEPPED, unavailable=_no_library)
def step_forward(arena: Arena, random: Random, hits: Hits) -> None:
    """The clocks of beats and workers step two hours forward, then back to the right time."""
    everybody = [*arena.beats, *arena.workers]
    _step(arena, random, hits, dict.fromkeys(everybody, _STEP_SECONDS))


@fault("clocks-back", STEPPED, unavailable=_no_library)
def step_back(arena: Arena, random: Random, hits: Hits) -> None:
    """The clocks of beats and workers step two hours back, then forward to the right time."""
    everybody = [*arena.beats, *arena.workers]
    _step(arena, random, hits, dict.fromkeys(everybody, -_STEP_SECONDS))


@fault("clocks-apart", STEPPED, unavailable=_no_library)
def step_apart(arena: Arena, random: Random, hits: Hits) -> None:
    """Each beat and worker has its own idea of the time, four hours apart."""
    everybody = [*arena.beats, *arena.workers]
    _step(arena, random, hits, {kept: random.choice((-1, 0, 1)) * _STEP_SECONDS for kept in everybody})


def _step(arena: Arena, random: Random, hits: Hits, steps: dict[Kept, int]) -> None:
    """Step each clock of a running process, and back again; before and after, the processes are as ever."""
    usual = {kept: dict(kept.environment) for kept in steps}
    for kept in steps:
        _set_clock(_file(arena, kept), 0)
        kept.environment |= _faked(_file(arena, kept))
    said = {kept: kept.log.stat().st_size for kept in steps}
    _restart(steps)
    _await_work(said)
    said = {kept: kept.log.stat().st_size for kept in steps}
    for kept, seconds in steps.items():
        _set_clock(_file(arena, kept), seconds)
    time.sleep(random.uniform(*_STAY_SECONDS))
    for kept in steps:
        _set_clock(_file(arena, kept), 0)
        hits.count(STEPPED, _has_another_time(_log(kept, said[kept])))
    time.sleep(random.uniform(*_STAY_SECONDS))
    for kept in steps:
        kept.environment = usual[kept]
    _restart(steps)
    _sweep()


def _await_work(said: dict[Kept, int]) -> None:
    """Until each is at work, lest its clock steps before it has looked at it; the suite goes on without a straggler."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if all(any(words in _log(kept, since) for words in _AT_WORK) for kept, since in said.items()):
            return
        time.sleep(0.2)


def _log(kept: Kept, since: int) -> str:
    return kept.log.read_bytes()[since:].decode(errors="replace")


def _has_another_time(log: str) -> bool:
    """Whether lines of a log were written at another hour: by a process that believes its clock."""
    now = datetime.now(UTC)
    written = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in _WRITTEN.findall(log))
    return any(abs(now - at) > timedelta(hours=1) for at in written)


def _file(arena: Arena, kept: Kept) -> Path:
    return arena.logs / f"{kept.name}.clock"


def _faked(file: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(_library()),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",  # a step is seen at once
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # a step of the wall clock is none of this one
        "PYTHONPATH": str(Path(__file__).with_name("stepping")),
    }


def _set_clock(file: Path, seconds: int) -> None:
    draft = file.with_suffix(".new")
    draft.write_text(f"{seconds:+d}\n")
    draft.replace(file)


def _restart(all_kept: Iterable[Kept]) -> None:
    """Restart processes by SIGTERM, those that do not listen by SIGKILL, and wait until they run again."""
    wanted = {kept: kept.restarts + 1 for kept in all_kept}
    for kept in wanted:
        kept.signal(signal.SIGTERM)
    for kept, restarts in wanted.items():
        if not kept.wait_started(restarts):
            kept.signal(signal.SIGKILL)
            kept.wait_started(restarts)


def _sweep() -> None:
    """Remove what libfaketime leaves of processes that did not end in its way."""
    for file in _SHARED_MEMORY.glob("*faketime_*"):
        pid = file.name.rpartition("_")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            file.unlink(missing_ok=True)
