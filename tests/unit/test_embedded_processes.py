"""The supervisor, with real children: what it starts ends with it, and it tells what ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

import settings
from embedded.errors import EmbeddedError
from embedded.processes import Ended, Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path("/")


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def python(script: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("script", "returncode", "text"),
    [
        ("exit 3", 3, "child ended with exit code 3"),
        ("exit 0", 0, "child ended with exit code 0"),
        ("kill -9 $$", -9, "child was ended by SIGKILL"),
    ],
)
def test_wait_tells_which_child_ended_and_how(script: str, returncode: int, text: str) -> None:
    with Supervisor() as supervisor:
        supervisor.start("other", shell("exec sleep 60"), env=settings.environment(), cwd=HERE)
        assert supervisor.check() is None
        supervisor.start("child", shell(script), env=settings.environment(), cwd=HERE)
        ended = supervisor.wait(10)
    assert ended == Ended("child", returncode)
    assert str(ended) == text


def test_wait_gives_up_in_time() -> None:
    with Supervisor() as supervisor:
        supervisor.start("child", shell("exec sleep 60"), env=settings.environment(), cwd=HERE)
        assert supervisor.wait(0.1) is None


def test_a_child_has_time_to_stop_in_order(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with Supervisor(grace_seconds=10) as supervisor:
        script = (
            f"trap 'sleep 0.3; echo stopped > {note}; exit 0' TERM; echo ready > {note}; while :; do sleep 0.05; done"
        )
        supervisor.start("child", shell(script), env=settings.environment(), cwd=HERE)
        eventually(lambda: note.exists() and note.read_text() == "ready\n")
    assert note.read_text() == "stopped\n"


def test_a_child_that_ignores_sigterm_is_killed_with_all_it_forked(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    supervisor = Supervisor(grace_seconds=0.3)
    script = f"trap '' TERM; sleep 60 & echo $! > {note}; while :; do sleep 60; done"
    child = supervisor.start("stubborn", shell(script), env=settings.environment(), cwd=HERE)
    eventually(lambda: note.exists() and note.read_text().endswith("\n"))
    grandchild = int(note.read_text())
    began = time.monotonic()
    supervisor.stop()
    assert 0.3 <= time.monotonic() - began < 5
    assert child.returncode == -signal.SIGKILL
    eventually(lambda: not is_running(grandchild))


def test_what_a_dead_child_left_behind_is_killed_when_its_end_is_seen(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with Supervisor() as supervisor:
        supervisor.start("parent", shell(f"sleep 60 & echo $! > {note}; exit 1"), env=settings.environment(), cwd=HERE)
        assert supervisor.wait(10) == Ended("parent", 1)
        eventually(lambda: not is_running(int(note.read_text())))


def test_watched_processes_are_reported_and_left_alone() -> None:
    with subprocess.Popen(shell("exec sleep 60")) as foreign:
        with Supervisor({"foreign": foreign}) as supervisor:
            assert supervisor.check() is None
        assert foreign.poll() is None
        foreign.kill()
        assert Supervisor({"foreign": foreign}).wait(10) == Ended("foreign", -signal.SIGKILL)


def test_output_lines_come_behind_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    with Supervisor() as supervisor:
        script = "echo one; echo two >&2; printf unfinished"
        supervisor.start("child", shell(script), env=settings.environment(), cwd=HERE)
        supervisor.wait(10)
    assert capsys.readouterr().err == "child    | one\nchild    | two\nchild    | unfinished\n"


def test_names_are_coloured_apart_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with Supervisor(colour=True) as supervisor:
        for name in ("first", "second"):
            supervisor.start(name, shell("echo line"), env=settings.environment(), cwd=HERE).wait(10)
    first, second = sorted(capsys.readouterr().err.splitlines(), key=lambda line: "second" in line)
    assert first == "\x1b[36mfirst    | \x1b[0mline"
    assert second == "\x1b[32msecond   | \x1b[0mline"


def test_output_goes_to_the_end_of_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "child.log"
    log.write_text("before\n")
    with Supervisor() as supervisor:
        supervisor.start("child", shell("echo out; echo err >&2"), env=settings.environment(), cwd=HERE, log=log)
        supervisor.wait(10)
    assert log.read_text() == "before\nout\nerr\n"
    assert capsys.readouterr().err == ""


def test_a_missing_program_is_one_clear_line() -> None:
    with Supervisor() as supervisor, pytest.raises(EmbeddedError) as caught:
        supervisor.start("child", ["/no/such/program"], env=settings.environment(), cwd=HERE)
    assert "/no/such/program" in str(caught.value)
    assert "\n" not in str(caught.value)


SUPERVISOR = """
    import signal
    from pathlib import Path
    import settings
    from embedded.processes import Supervisor, unwind_on_signals
    # Whoever runs the tests behind nohup or in a shell's background has these ignored, and children inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unwind_on_signals()
    with Supervisor() as supervisor:
        child = supervisor.start("child", ["sleep", "60"], env=settings.environment(), cwd=Path("/"))
        print(child.pid, flush=True)
        supervisor.wait()
"""


@pytest.mark.parametrize(
    ("signum", "returncode"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_children_end_with_their_supervisor_whatever_ends_it(signum: signal.Signals, returncode: int) -> None:
    with python(SUPERVISOR) as supervisor:
        assert supervisor.stdout is not None
        child = int(supervisor.stdout.readline())
        assert is_running(child)
        supervisor.send_signal(signum)
        assert supervisor.wait(20) == returncode
    eventually(lambda: not is_running(child))


CLEAN_UP = """
    import signal, sys, time
    from embedded.processes import uninterrupted, unwind_on_signals
    unwind_on_signals()
    with uninterrupted():
        print("cleaning", flush=True)
        time.sleep(0.5)
        print("cleaned", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_waits_for_the_clean_up() -> None:
    with python(CLEAN_UP) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"cleaning\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == b"cleaned\n"
        assert process.wait(20) == 143
