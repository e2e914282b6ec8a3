"""The questions of `credits doctor` to the broker, the workers and beat. Import it once the settings are valid."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from celeryconfig import QueueNames
from cli.words import counted
from refresh.doctor import Finding
from tasks import dead_letters as refused
from tasks.app import app, check_broker, heartbeat_path, use_broker
from tasks.publish import messages_waiting

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import Literal

PING_SECONDS = 1.5
"""A worker answers between two messages; one takes some milliseconds."""
FRESH_SECONDS = 60
"""As the health checks of docker-compose.yml: heartbeats come every few seconds."""
CONTROL_WAITING_MAX = 10
"""Upkeep is one message a minute: more than some minutes of them, and nobody takes any."""
_START = "start one: `credits up`, or `celery -A tasks worker`"


def broker(url: str | None) -> Finding:
    """Whether the broker answers; later questions go to the same one."""
    use_broker(url)
    return Finding("ok", f"{check_broker()} answers")


def queues() -> Finding:
    """How many messages wait."""
    waiting = {name: messages_waiting(name) for name in QueueNames.ALL}
    said = ", ".join(f"{number:,} in {name}" for name, number in waiting.items()) + " (messages waiting)"
    if waiting[QueueNames.CONTROL] > CONTROL_WAITING_MAX:
        return Finding("wrong", said, f"no worker takes from {QueueNames.CONTROL}; {_START}")
    return Finding("ok", said)


def dead_letters() -> Finding:
    """How many messages were refused and are kept."""
    waiting = refused.waiting()
    if not waiting:
        return Finding("ok", "no message was refused")
    return Finding(
        "wrong",
        f"{counted(waiting, 'message')} refused, as none of ours",
        "`credits dead-letters` shows who sent what where; stop that, then `credits dead-letters --drop`",
    )


def workers(folders: Iterable[Path]) -> Finding:
    """Whether a worker is alive: it answers, or its heartbeat on this machine is fresh."""
    answers = app.control.ping(timeout=PING_SECONDS) or []
    names = sorted(name for reply in answers for name in reply)
    if names:
        return Finding("ok", f"{counted(len(names), 'worker')} answering: {', '.join(names)}")
    age = _age("worker", folders)
    if age is not None and age < FRESH_SECONDS:
        return Finding("ok", f"none has answered within {PING_SECONDS} s, but one was alive {age:.0f} s ago")
    return Finding("wrong", f"none answers within {PING_SECONDS} s", _START)


def beat(folders: Iterable[Path], *, on_time: bool) -> Finding:
    """Whether beat is alive: by its heartbeat on this machine, or, where it runs elsewhere, by what came of it.

    Args:
        folders: where heartbeat files may be.
        on_time: whether the current slot has its run.
    """
    age = _age("beat", folders)
    if age is not None and age < FRESH_SECONDS:
        return Finding("ok", f"was alive {age:.0f} s ago")
    said = "has left no heartbeat on this machine" if age is None else f"was last alive here {age:,.0f} s ago"
    if on_time:
        return Finding("info", f"{said}, and the scheduled run is on time: it runs elsewhere, or has stopped since")
    return Finding("wrong", said, "start it: `credits up`, or `celery -A tasks beat`")


def _age(kind: Literal["worker", "beat"], folders: Iterable[Path]) -> float | None:
    """Seconds since the youngest heartbeat; None: there is none."""
    files = [folder / heartbeat_path(kind).name for folder in folders]
    touched = [file.stat().st_mtime for file in files if file.exists()]
    return time.time() - max(touched) if touched else None
