"""Stop servers that a killed earlier run left behind.

Only for servers of our own instances, under the instance's lock: each has the instance's marker in its
command line. Pid files are not asked: after a crash their numbers may belong to anybody.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from embedded.errors import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Iterable

_PROC = Path("/proc")
_POLL_SECONDS = 0.02
_STEPS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
# PostgreSQL reads SIGINT as "roll back and stop", Redis as SIGTERM.


def find(marker: str, uid: int) -> list[int]:
    """The server processes of an account whose command line holds `marker`; none where there is no /proc."""
    return sorted(_find(marker, uid))


def _find(marker: str, uid: int) -> dict[int, bytes]:
    server = re.compile(rb"(postgres|initdb|redis|valkey).*" + re.escape(marker.encode()), re.DOTALL)
    found = {}
    for entry in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # The command line is readable without privileges, unlike cwd or exe, which a container's root may not see.
            if entry.stat().st_uid == uid and server.search(command := (entry / "cmdline").read_bytes()):
                found[int(entry.name)] = command
    return found


def clear(marker: str, uids: Iterable[int]) -> None:
    """Stop the servers of an instance whose owner is gone, and wait until they are.

    Call it before any server of the instance is started: it cannot tell those of the present run apart.

    Raises:
        EmbeddedError: one of them survives SIGKILL.
    """
    accounts = set(uids)
    for signum, seconds in _STEPS:
        deadline = time.monotonic() + seconds
        signalled: set[int] = set()
        while left := {pid: command for uid in accounts for pid, command in _find(marker, uid).items()}:
            for pid in left.keys() - signalled:
                _signal(pid, left, signum)
            signalled.update(left)
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise EmbeddedError(f"a server of an earlier run (process {min(left)}) cannot be stopped; stop it by hand")


def _signal(pid: int, family: dict[int, bytes], signum: signal.Signals) -> None:
    """Signal a server. Its helpers are its own business until it is time to kill; orphaned ones must just go.

    PostgreSQL's checkpointer, for one, takes SIGINT as the order to write the last checkpoint of all.
    """
    with contextlib.suppress(OSError):  # it ended meanwhile
        if signum is not signal.SIGKILL:
            if _parent(pid) in family:
                return
            if family[pid].startswith(b"postgres: "):
                signum = signal.SIGQUIT
        os.kill(pid, signum)


def _parent(pid: int) -> int:
    # pid (name) state parent ...; the name may hold anything, so count from its closing bracket.
    return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
