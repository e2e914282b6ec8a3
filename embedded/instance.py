"""The lock of an instance, and the note by which other processes find a running one.

The lock is the kernel's (`flock`), so a crashed owner leaves none behind. Not for locking between hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_LOCK = "lock"
_NOTE = "servers.json"


@contextlib.contextmanager
def lock(state: Path) -> Iterator[bool]:
    """Hold the instance's lock for the block. Yields False, at once, when another process holds it.

    The owner leaves its process id in the file for `owner()`, and no note of an earlier owner remains.
    """
    descriptor = _acquire(state / _LOCK)
    if descriptor is None:
        yield False
        return
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        withdraw(state)
        yield True
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_same_file(descriptor, path):
            return descriptor
        os.close(descriptor)  # removed between open and flock: this lock would hold nobody off


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def owner(state: Path) -> str:
    """The process id of the lock's present or last owner, for people to read."""
    try:
        return (state / _LOCK).read_text() or "unknown"
    except FileNotFoundError:
        return "unknown"


def announce(state: Path, note: Mapping[str, str]) -> None:
    """Write the owner's note, complete from its first instant, readable by us alone."""
    draft = state / f"{_NOTE}.new"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({**note, "pid": str(os.getpid())}, file)
    draft.replace(state / _NOTE)


def withdraw(state: Path) -> None:
    """Take the note away; one that is not there is fine."""
    (state / _NOTE).unlink(missing_ok=True)


def read_note(state: Path) -> dict[str, str] | None:
    """The present owner's note; None while it starts or stops."""
    try:
        note: dict[str, str] = json.loads((state / _NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return note if note.get("pid") == owner(state) else None
