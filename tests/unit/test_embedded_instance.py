"""The instance's lock and the note beside it, between real processes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

from embedded import instance

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import sys, time
from pathlib import Path
from embedded import instance
with instance.lock(Path(sys.argv[1])) as owned:
    instance.announce(Path(sys.argv[1]), {"database_url": "there"})
    print(owned, flush=True)
    time.sleep(60)
"""


def test_one_process_holds_the_lock_until_it_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        with instance.lock(tmp_path) as owned:
            assert not owned
            assert instance.owner(tmp_path) == str(holder.pid)
            assert instance.read_note(tmp_path) == {"database_url": "there", "pid": str(holder.pid)}
        holder.kill()
    with instance.lock(tmp_path) as owned:
        assert owned
        assert instance.owner(tmp_path) == str(os.getpid())
        assert instance.read_note(tmp_path) is None, "a dead owner's note was believed"


def test_a_lock_file_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    with instance.lock(tmp_path) as owned:
        assert owned
        (tmp_path / "lock").unlink()
        with instance.lock(tmp_path) as again:
            assert again


def test_the_note_is_for_its_owner_alone(tmp_path: Path) -> None:
    with instance.lock(tmp_path):
        instance.announce(tmp_path, {"database_url": "x"})
    (note,) = tmp_path.glob("*.json")
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    instance.withdraw(tmp_path)
    instance.withdraw(tmp_path)
    assert instance.read_note(tmp_path) is None
