"""Processes under a keeper that starts each again when it ends, as an init system does."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Self

import settings
from embedded.processes import GRACE_SECONDS, spawn, stop

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

RESTART_SECONDS = 0.5
"""From a process' end to its next start."""
_POLL_SECONDS = 0.05
_START_SECONDS = 10.0


class Kept:
    """A process that is started again when it ends, for as long as nobody holds it down.

    Attributes:
        name: what people call it.
        log: its output, that of all starts one after the other.
        environment: what its next start finds.
        restarts: how often it was started again.
    """

    def __init__(self, name: str, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self.environment = dict(environment)
        self.restarts = 0
        self._argv = [*_death_signal(), *argv]
        self._process: subprocess.Popen[bytes] | None = None
        self._ended_at: float | None = None
        self._held = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def __repr__(self) -> str:
        return f"<{self.name}, process {self.pid}>"

    @property
    def pid(self) -> int:
        """Of the present process, or of the last one while it is down."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether there is a process at present, be it a stopped one."""
        with self._lock:
            return self._process is not None and self._process.poll() is None

    def signal(self, signum: signal.Signals) -> bool:
        """Send a signal to the present process; False when there is none."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return False
            self._process.send_signal(signum)
            return True

    def hold(self) -> None:
        """From now on leave it down when it ends; what runs goes on running."""
        with self._lock:
            self._held = True

    def release(self) -> None:
        """Start it again if it is down, now and whenever it ends."""
        with self._lock:
            self._held = False

    def wait_started(self, restarts: int, seconds: float = 30.0) -> bool:
        """Wait until it was started again `restarts` times in all; False when `seconds` pass before."""
        with self._changed:
            return self._changed.wait_for(lambda: self.restarts >= restarts, seconds)

    def wait_down(self, seconds: float = 30.0) -> bool:
        """Wait until the present process has ended; False when `seconds` pass before."""
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                return True
        return process is None

    def look(self) -> None:
        """Start it if it is due; the keeper's thread alone calls this, again and again."""
        with self._changed:
            if self._process is not None:
                if self._process.poll() is None:
                    return
                if self._ended_at is None:
                    self._ended_at = time.monotonic()
                if self._held or time.monotonic() - self._ended_at < RESTART_SECONDS:
                    return
                self.restarts += 1
            with self.log.open("ab") as output:
                self._process = spawn(self._argv, env=self.environment, cwd=settings.CHECKOUT, stdout=output)
            self._ended_at = None
            self._changed.notify_all()

    def wait_first(self) -> None:
        """Wait until the keeper has started it."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._process is not None, _START_SECONDS):
                raise RuntimeError(f"{self.name} was not started")

    def end(self, deadline: float) -> None:
        """Wait for it to stop of its own accord until `deadline` (monotonic), then kill it and what it forked."""
        if self._process is not None:
            stop(self._process, [(signal.SIGTERM, max(0.0, deadline - time.monotonic()))])


def _death_signal() -> list[str]:
    """What makes the kernel kill a child with us. It watches the thread that forked: the keeper's, which lasts."""
    program = shutil.which("setpriv")
    return [program, "--pdeathsig", "KILL", "--"] if program else []


class Keeper:
    """The thread that starts processes, looks after them, and takes all down at the end of the block.

    Args:
        logs: a folder for a log file each.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._kept: list[Kept] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        for kept in self._kept:
            kept.hold()
            kept.signal(signal.SIGTERM)
            kept.signal(signal.SIGCONT)
        deadline = time.monotonic() + GRACE_SECONDS
        for kept in reversed(self._kept):
            kept.end(deadline)
        self._over.set()
        self._thread.join()

    def keep(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Kept:
        """Start a process and keep it; returns once there is one."""
        kept = Kept(name, argv, environment, self._logs / f"{name}.log")
        self._kept.append(kept)
        kept.wait_first()
        return kept

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            for kept in list(self._kept):
                kept.look()
