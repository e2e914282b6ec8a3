"""The file of rows that an import left out, for people who open it in a spreadsheet."""

from __future__ import annotations

import csv
import os
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from refresh.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from io import TextIOWrapper
    from pathlib import Path

    from refresh.imports import Reject

# What a spreadsheet would run as a formula; a number is none.
# The last four are the same signs in full width, which some of them take too.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r]")
_NUMBER = re.compile(r"\s*[+-]?[0-9]+([.,][0-9]+)?\s*")


def harmless(cell: str) -> str:
    """A cell that no spreadsheet runs: what begins like a formula gets an apostrophe, numbers stay."""
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


class RejectFile:
    """Takes rejects; written under another name until all has gone well (`reject_file()`)."""

    def __init__(self, path: Path, file: TextIOWrapper, columns: Sequence[str]) -> None:
        self.path = path
        self.rows = 0
        self._file = file
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(["line", "reason", *map(harmless, columns)])

    def add(self, reject: Reject) -> None:
        """Write one row."""
        with _told(self.path):
            self._writer.writerow([reject.line, harmless(reject.reason), *map(harmless, reject.cells)])
        self.rows += 1

    def flush(self) -> None:
        """Bring all to the disk. Call it before the commit: a full disk must not lose rows that were left out."""
        with _told(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def reject_file(path: Path, columns: Sequence[str]) -> Iterator[RejectFile]:
    """A file of rejects that appears at `path` when the block ends well and there were any.

    Raises:
        RefusedError: the path is taken, or cannot be written.
    """
    if os.path.lexists(path):
        raise RefusedError(f"{path} is there already: give the rejects a new name")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _told(path):
        # Bytes that are no UTF-8 go out as they came in.
        file = unfinished.open("x", newline="", encoding="utf-8", errors="surrogateescape")
    try:
        rejects = RejectFile(path, file, columns)
        yield rejects
        with _told(path):
            file.close()
            if rejects.rows:
                unfinished.rename(path)
    finally:
        with suppress(OSError):  # told already
            file.close()
        unfinished.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RefusedError(f"{path} cannot be written: {error.strerror}") from error
