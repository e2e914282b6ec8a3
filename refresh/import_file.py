"""A CSV file of users, row by row, in bounded memory whatever the file holds.

The file is read in lines of bytes, so that each row has its line number and its place: a row that the database turns
out to refuse is read again from there, and nothing need be kept in memory.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from refresh.errors import RefusedError
from refresh.import_columns import COLUMNS, KEY, Column, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_ROW_BYTES = 1_048_576
"""A row of all columns takes some 200. The limit keeps a file without line ends, or a quote that is never closed, from
filling the memory; csv's own limit for one cell, 131,072 characters, ends most of these first."""

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")

_CSV_ERRORS = {
    "unexpected end of data": "a quote is opened and never closed",
    "expected after": "a quoted cell goes on after its closing quote (a quote inside is written twice)",
    "field limit": f"a cell is longer than {csv.field_size_limit():,} characters: is a quote never closed?",
    "new-line character": "a carriage return stands inside the row",
}


class Row(NamedTuple):
    """One row as it stands in the file.

    Attributes:
        line: the number of the line in which it starts.
        at: the byte at which it starts.
        cells: none where the row is no CSV.
        problem: why it cannot be read.
    """

    line: int
    at: int
    cells: list[str]
    problem: str | None


class Lines:
    """Feeds a csv.reader, and knows where the row began that it is in."""

    def __init__(self, file: BinaryIO, at: int, line: int = 0) -> None:
        file.seek(at)
        self._file = file
        self.number = line
        self.end = at
        self.begin()

    def begin(self) -> None:
        """The next line is a row's first."""
        self.start_line = self.number + 1
        self.start = self.end
        self.problem: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(MAX_ROW_BYTES)
        if not raw:
            raise StopIteration
        self.number += 1
        self.end += len(raw)
        if self.end - self.start >= MAX_ROW_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = self._file.readline(MAX_ROW_BYTES)
                self.end += len(raw)
            raise csv.Error(f"the row is longer than {MAX_ROW_BYTES:,} bytes")
        if b"\0" in raw:
            self.problem = "the row holds a NUL byte"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.problem = "the row is not UTF-8"
            return raw.decode(errors="surrogateescape")  # the file of rejects gives the same bytes back


class UserFile:
    """A CSV of users whose header has been read and checked.

    Args:
        file: open for reading bytes, at its beginning, seekable.
        name: what messages and the audit log call it.

    Attributes:
        columns: what the header names, in its order.
        size: in bytes.

    Raises:
        RefusedError: not a CSV, or not one of users.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        if not file.seekable():
            raise RefusedError(f"{name} cannot be read twice: save it as a file first")
        self._file = file
        self.name = name
        self.size = file.seek(0, 2)
        file.seek(0)
        start = file.read(len(BOM))
        if start.startswith(UTF16):
            raise RefusedError(f"{name} is UTF-16: save it as CSV in UTF-8")
        self._lines = Lines(file, len(BOM) if start == BOM else 0)
        self.columns = self._header()

    @property
    def read(self) -> int:
        """How many bytes have been read, for a progress bar."""
        return self._lines.end

    def _header(self) -> list[Column]:
        allowed = f"allowed columns: {', '.join(COLUMNS)}"
        row = next(read_rows(self._lines), None)
        if row is None:
            raise RefusedError(f"{self.name} is empty: it needs a header line; {allowed}")
        place = f"{self.name}, line {row.line}"
        if row.problem is not None:
            raise RefusedError(f"{place}: this is not a CSV file in UTF-8: {row.problem}; {allowed}")
        names = [cell.strip() for cell in row.cells]
        for number, name in enumerate(names, 1):
            if name not in COLUMNS:
                separators = ";" in name or "\t" in name
                hint = "; cells are separated by commas" if separators else ""
                unknown = f"unknown column {shown(name)}" if name else f"column {number} has no name"
                raise RefusedError(f"{place}: {unknown}{hint}; {allowed}")
            if name in names[: number - 1]:
                raise RefusedError(f"{place}: column {name} is there twice; {allowed}")
        if KEY not in names:
            raise RefusedError(f"{place}: column {KEY} is missing; {allowed}")
        return [COLUMNS[name] for name in names]

    def rows(self) -> Iterator[Row]:
        """The rows after the header, once. Blank lines are left out."""
        width = len(self.columns)
        for row in read_rows(self._lines):
            if row.problem is None and len(row.cells) != width:
                problem = f"the row has {len(row.cells)} cells, the header has {width}"
                if (last := self._lines.number) > row.line:
                    problem += f" (lines {row.line} to {last} read as one row: is a quote never closed?)"
                yield row._replace(problem=problem)
            else:
                yield row

    def cells_at(self, at: int) -> list[str]:
        """The cells of the row at a place, as they stand there; the text itself where the row is no CSV."""
        lines = Lines(self._file, at)
        row = next(read_rows(lines), None)
        if row is not None and row.cells:
            return row.cells
        self._file.seek(at)
        return [self._file.read(min(lines.end - at, MAX_ROW_BYTES)).decode(errors="surrogateescape").rstrip("\r\n")]


def read_rows(lines: Lines) -> Iterator[Row]:
    """The rows of a file, the bad ones with their problem."""
    # Strict: else csv guesses what stray quotes mean.
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            text = str(error)
            problem = next((said for part, said in _CSV_ERRORS.items() if part in text), text)
            if lines.number > lines.start_line:
                problem += f" (the row goes on to line {lines.number})"
            yield Row(lines.start_line, lines.start, [], problem)
            reader = csv.reader(lines, strict=True)
            continue
        if cells:
            yield Row(lines.start_line, lines.start, cells, lines.problem)
