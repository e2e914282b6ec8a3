"""Start child processes, tell which one ended, and take all of them down again.

`credits up`, `credits demo`, the tests and the benchmark run workers, beat and Flower through
`Supervisor`; the embedded servers use its two building blocks, `spawn` and `stop`. Not for production:
there an init system or an orchestrator does this, with restarts, which this file leaves out on purpose.

Three things keep children from outliving us. Each gets a session of its own, so that a Ctrl-C in the
terminal, which reaches the whole foreground group, reaches us alone and we stop them in order. On the
way out every child is asked to stop, then killed with all that it forked. And when we are killed with
SIGKILL, the kernel signals the children (`setpriv --pdeathsig`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import IO, TYPE_CHECKING, Self

import settings
from embedded.errors import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

GRACE_SECONDS = 10.0
"""How long a child may take to stop before it is killed. A Celery worker finishes its batch in well under 1 s."""

_POLL_SECONDS = 0.05
_LINE_BYTES = 64 * 1024  # a line without an end is forwarded in pieces of this size, not kept in memory
_COLOURS = ("36", "32", "35", "33", "34", "31")


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged account that a child runs under when we are root."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A child that is gone. A negative `returncode` is the signal that ended it."""

    name: str
    returncode: int

    def __str__(self) -> str:
        if self.returncode < 0:
            return f"{self.name} was ended by {signal.Signals(-self.returncode).name}"
        return f"{self.name} ended with exit code {self.returncode}"


def unwind_on_signals() -> None:
    """Make SIGTERM and SIGHUP leave through the same `finally` blocks as Ctrl-C does.

    Commands call it once, at their start and in the main thread. The exit code is 128 + the signal's number, as
    shells report it. Python's own default for both is to end at once, which would leave the servers running.
    """

    def unwind(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, unwind)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's wish stands
        signal.signal(signal.SIGHUP, unwind)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP while a clean-up of bounded length runs; they take effect after it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def _setpriv() -> str | None:
    """util-linux's setpriv, if it is here and new enough; other programs of that name know no --pdeathsig."""
    program = shutil.which("setpriv")
    if program is None:
        return None
    probe = [program, "--pdeathsig", "keep", "--", "true"]
    works = subprocess.run(probe, check=False, capture_output=True).returncode == 0  # noqa: S603 - fixed arguments
    return program if works else None


def with_death_signal(argv: Sequence[str], death_signal: signal.Signals) -> list[str]:
    """Prefix a command so that the kernel sends it `death_signal` when we die, even by SIGKILL.

    The kernel watches the thread that forked, not the process, so only children of the main thread get
    this: others would be signalled as soon as a short-lived thread ends. Where setpriv is missing (it is
    part of every Debian) the command comes back as it is, and the next start clears what was left behind.
    """
    program = _setpriv()
    if program is None or threading.current_thread() is not threading.main_thread():
        return list(argv)
    return [program, "--pdeathsig", death_signal.name.removeprefix("SIG"), "--", *argv]


def spawn(  # noqa: PLR0913 - each argument is one thing that a child inherits
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    stdout: int | IO[bytes],
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    death_signal: signal.Signals = signal.SIGTERM,
    account: Account | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, its standard error joined to its standard output.

    Raises:
        EmbeddedError: the program is missing or cannot be started under `account`.
    """
    if shutil.which(str(cwd / argv[0]) if "/" in argv[0] else argv[0], path=env.get("PATH", os.defpath)) is None:
        raise EmbeddedError(f"cannot start {argv[0]}: there is no such program")  # setpriv would not tell us
    try:
        return subprocess.Popen(  # noqa: S603 - callers pass fixed programs, never a shell line
            with_death_signal(argv, death_signal),
            env=dict(env),
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=() if account else None,
        )
    except OSError as error:
        raise EmbeddedError(f"cannot start {argv[0]}: {error.strerror or error}") from error


def stop(process: subprocess.Popen[bytes], steps: Sequence[tuple[signal.Signals, float]]) -> None:
    """Send each signal in turn and wait up to its seconds; then kill the child and everything it forked.

    Args:
        process: a child started by `spawn`.
        steps: signals with the seconds to wait after each, mildest first.
    """
    for signum, seconds in steps:
        if process.poll() is None:
            process.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a child's session. Its number is its own while any member lives."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Output:
    """Forwards children's output lines to our standard error, each behind the coloured name of its child."""

    def __init__(self, *, colour: bool | None) -> None:
        if colour is None:
            colour = sys.stderr.isatty() and not settings.environment().get("NO_COLOR")
        self._colours = cycle(_COLOURS) if colour else None
        self._lock = threading.Lock()

    def forward(self, name: str, pipe: IO[bytes]) -> threading.Thread:
        prefix = f"{name:<8} | "
        if self._colours is not None:
            prefix = f"\x1b[{next(self._colours)}m{prefix}\x1b[0m"
        thread = threading.Thread(target=self._copy, args=(prefix, pipe), name=f"output of {name}", daemon=True)
        thread.start()
        return thread

    def _copy(self, prefix: str, pipe: IO[bytes]) -> None:
        with pipe:
            for line in iter(lambda: pipe.readline(_LINE_BYTES), b""):
                text = line.decode(errors="replace").rstrip("\r\n")
                # A closed terminal must not stop the reading: the child would block on a full pipe.
                with contextlib.suppress(OSError, ValueError), self._lock:
                    sys.stderr.write(f"{prefix}{text}\n")
                    sys.stderr.flush()


@dataclass(slots=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    output: threading.Thread | None
    owned: bool
    swept: bool = False


class Supervisor:
    """Runs named children and stops all of them at the end of the `with` block, whatever ends it.

    It restarts nothing: a child that ends is for the caller to report. Use it from the main thread
    (see `with_death_signal`).

    Args:
        watch: processes of somebody else, such as `Servers.processes`: reported when they end, never stopped here.
        grace_seconds: time that children have to stop, all together, before they are killed.
        colour: colour the names; by default on a terminal where NO_COLOR is not set.
    """

    def __init__(
        self,
        watch: Mapping[str, subprocess.Popen[bytes]] | None = None,
        *,
        grace_seconds: float = GRACE_SECONDS,
        colour: bool | None = None,
    ) -> None:
        self.grace_seconds = grace_seconds
        self._children = [_Child(name, process, None, owned=False) for name, process in (watch or {}).items()]
        self._output = _Output(colour=colour)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a child. Its output goes to the end of `log`, else to our standard error behind its name.

        Args:
            name: what people call it, unique here.
            argv: program and arguments; no shell is involved.
            env: the child's whole environment (`settings.environment()` gives ours).
            cwd: the child's working folder.
            log: a file for its output.

        Raises:
            EmbeddedError: the program cannot be started.
        """
        with contextlib.ExitStack() as stack:
            stdout = subprocess.PIPE if log is None else stack.enter_context(log.open("ab"))
            process = spawn(argv, env=env, cwd=cwd, stdout=stdout)
        output = self._output.forward(name, process.stdout) if process.stdout is not None else None
        self._children.append(_Child(name, process, output, owned=True))
        return process

    def check(self) -> Ended | None:
        """Tell the first child, in order of start, that has ended, or None while all run."""
        for child in self._children:
            returncode = child.process.poll()
            if returncode is not None:
                self._sweep(child)
                return Ended(child.name, returncode)
        return None

    def wait(self, timeout_seconds: float | None = None) -> Ended | None:
        """Wait until a child ends; None when `timeout_seconds` pass first."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while (ended := self.check()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_SECONDS)
        return ended

    def stop(self) -> None:
        """Send SIGTERM to all in reverse order of start; after `grace_seconds` kill what is left of each."""
        children = [child for child in reversed(self._children) if child.owned]
        with uninterrupted():
            for child in children:
                if child.process.poll() is None:
                    child.process.terminate()
            deadline = time.monotonic() + self.grace_seconds
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))
                self._sweep(child)
        self._children = [child for child in self._children if not child.owned]

    @staticmethod
    def _sweep(child: _Child) -> None:
        """Kill what a child left behind, once: later its group's number may belong to somebody else."""
        if child.swept or not child.owned:
            return
        child.swept = True
        _kill_group(child.process)
        if child.output is not None:
            child.output.join(1.0)  # bounded: a process that left the session may still hold the pipe
