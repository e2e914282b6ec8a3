"""A file system for PostgreSQL's data that can be full: in memory, in a mount namespace of this process.

Its children see it, nobody else does, and the kernel removes it with the last of them, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_CLONE_NEWNS = 0x00020000


class RefusedError(RuntimeError):
    """This machine, or this account, mounts nothing. The text is one line for people."""


class Disk:
    """A mounted file system.

    Args:
        folder: where it is.
        size_bytes: of the whole.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self.size_bytes = size_bytes

    def fill(self) -> None:
        """Leave no room: the file system shrinks to what is in it."""
        found = os.statvfs(self.folder)
        self._resize((found.f_blocks - found.f_bfree) * found.f_frsize)

    def free(self) -> None:
        """Give the room back."""
        self._resize(self.size_bytes)

    def _resize(self, size_bytes: int) -> None:
        _run("mount", "-o", f"remount,size={size_bytes}", str(self.folder))


@contextlib.contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[Disk]:
    """Lay an empty file system over a folder for the block.

    Call it from the main thread, before there are others: those would not see it.

    Raises:
        RefusedError: it cannot be done here.
    """
    if os.geteuid() != 0 or shutil.which("mount") is None:
        raise RefusedError("only root can mount a file system that is full")
    if threading.current_thread() is not threading.main_thread():
        raise RefusedError("a thread cannot give the whole process a mount namespace")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise RefusedError(f"the kernel refuses a mount namespace: {os.strerror(ctypes.get_errno())}")
    _run("mount", "--make-rprivate", "/")
    _run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0755", "credits-faults", str(folder))
    try:
        yield Disk(folder, size_bytes)
    finally:
        _run("umount", "--lazy", str(folder))


def _run(*argv: str) -> None:
    done = subprocess.run(_found(argv), check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RefusedError(f"{' '.join(argv)}: {done.stderr.strip()}")


def _found(argv: Sequence[str]) -> list[str]:
    return [shutil.which(argv[0]) or argv[0], *argv[1:]]
