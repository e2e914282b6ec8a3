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

from embedded.errors import EmbeddedError

_PROC = Path("/proc")
_POLL_SECONDS = 0.02
_STEPS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
# PostgreSQL reads SIGINT as "roll back and stop"; Redis reads it as SIGTERM.


def find(marker: str, uid: int) -> list[int]:
    """The server processes of an account whose command line holds `marker`; none where there is no /proc."""
    server = re.compile(rb"(postgres|initdb|redis|valkey).*" + re.escape(marker.encode()), re.DOTALL)
    found = []
    for entry in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # The command line is readable without privileges, unlike cwd or exe, which a container's root may not see.
            if entry.stat().st_uid == uid and server.search((entry / "cmdline").read_bytes()):
                found.append(int(entry.name))
    return found


def clear(marker: str, uid: int) -> None:
    """Stop the servers of an instance whose owner is gone, and wait until they are.

    Raises:
        EmbeddedError: one of them survives SIGKILL.
    """
    for signum, seconds in _STEPS:
        deadline = time.monotonic() + seconds
        signalled: set[int] = set()
        while left := [pid for pid in find(marker, uid) if pid != os.getpid()]:
            for pid in set(left) - signalled:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            signalled.update(left)
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise EmbeddedError(f"a server of an earlier run (process {left[0]}) cannot be stopped; stop it by hand")
