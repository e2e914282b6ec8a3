"""A file of the host app's user ids: for bulk refreshes and rollbacks of the users that somebody has a list of.

    lines → checked in Python → COPY into a temporary table → joined to the users in SQL

No id stays in Python, so a million of them take no more memory than ten. The tables live as long as the session: load,
show, ask and open the run on one connection.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from db import one, transaction
from refresh.errors import RefusedError
from refresh.import_columns import MAX_KEY_CHARACTERS, shown
from refresh.import_file import BOM, UTF16, Lines, read_rows
from refresh.imports import STATEMENT_TIMEOUT_SECONDS
from refresh.selection import LISTED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import psycopg

COLUMNS = ("external_id", "externalId", "userId", "user_id")
"""What a CSV may call the column of ids: as our tables, our exports, and other people's do."""

SAMPLE = 10
"""Unknown ids that are named one by one."""

UNKNOWN = "unlisted_ids"
"""The temporary table of the ids that are nobody's."""


class UserList:
    """A file of ids, one per line, or a CSV whose header names a column of them; its first line has been read.

    Blank lines are left out, whitespace around an id is cut off.

    Args:
        file: open for reading bytes, at its beginning, seekable.
        name: what messages call it.

    Raises:
        RefusedError: empty, UTF-16, or a CSV without a column of ids.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self._file = file
        begins = file.read(len(BOM))
        if begins.startswith(UTF16):
            raise RefusedError(f"{name} is UTF-16: save it in UTF-8")
        self._start = len(BOM) if begins == BOM else 0
        self._column = self._find_column()

    def _find_column(self) -> int | None:
        """The column of ids by the first line that is not blank; None where the file has one id per line."""
        first = next(self._lines(), None)
        if first is None:
            raise RefusedError(f"{self.name} has no ids: it needs one per line, or a CSV with a column {COLUMNS[0]}")
        cells = _cells_of(first.text)
        found = [number for number, cell in enumerate(cells) if cell in COLUMNS]
        place = f"{self.name}, line {first.line}"
        if len(found) > 1:
            raise RefusedError(f"{place}: more than one column of ids: {', '.join(cells[n] for n in found)}")
        if found:
            return found[0]
        separated = {cell.strip() for cell in first.text.replace(";", "\t").split("\t")}
        if separated & {*COLUMNS}:
            raise RefusedError(f"{place}: cells are separated by commas")
        if len(cells) > 1:
            raise RefusedError(
                f"{place}: this looks like a CSV, and no column of it is called {', '.join(COLUMNS[:-1])} or "
                f"{COLUMNS[-1]}"
            )
        return None

    def ids(self) -> Iterator[tuple[int, str]]:
        """Each id with the number of its line.

        Raises:
            RefusedError: a line that is no id. All of it stands or falls together: whom a line was meant for is not for
                us to guess.
        """
        for line, text in self._lines() if self._column is None else self._cells(self._column):
            if len(text) > MAX_KEY_CHARACTERS:
                raise RefusedError(
                    f"{self.name}, line {line}: {shown(text)} is longer than {MAX_KEY_CHARACTERS} characters"
                )
            yield line, text

    def _lines(self) -> Iterator[_Line]:
        lines = Lines(self._file, self._start)
        while True:
            lines.begin()
            try:
                text = next(lines).strip()
            except StopIteration:
                return
            except csv.Error as error:
                raise RefusedError(f"{self.name}, line {lines.number}: {error}") from None
            if lines.problem is not None:
                raise RefusedError(f"{self.name}, line {lines.number}: {lines.problem}")
            if text:
                yield _Line(lines.number, text)

    def _cells(self, column: int) -> Iterator[_Line]:
        rows = read_rows(Lines(self._file, self._start))
        width = None
        for row in rows:
            place = f"{self.name}, line {row.line}"
            if row.problem is not None:
                raise RefusedError(f"{place}: {row.problem}")
            if not "".join(row.cells).strip() and len(row.cells) == 1:
                continue
            if width is None:
                width = len(row.cells)
                continue
            if len(row.cells) != width:
                raise RefusedError(f"{place}: the row has {len(row.cells)} cells, the header has {width}")
            text = row.cells[column].strip()
            if not text:
                raise RefusedError(f"{place}: the id is empty")
            yield _Line(row.line, text)


class _Line(NamedTuple):
    line: int
    text: str


def _cells_of(text: str) -> list[str]:
    """The cells of a line that may be a CSV's header, or an id with a quote in it."""
    try:
        return [cell.strip() for cell in next(csv.reader([text]))]
    except csv.Error:
        return []


@dataclass(frozen=True, slots=True)
class Listed:
    """What a file's ids are.

    Attributes:
        name: of the file.
        rows: ids in the file.
        duplicates: of these, ids that stand further up already.
        known: different ids that are users.
        unknown: different ids that are nobody's.
        sample: the first few of the unknown, in the file's order.
        digest: over all different ids, known or not, in whatever order they come.
    """

    name: str
    rows: int
    duplicates: int
    known: int
    unknown: int
    sample: list[str]
    digest: str

    def content(self) -> dict[str, Any]:
        """What makes it this list and no other, for `Selection.listed`; users who come and go do not change it."""
        return {"ids": self.known + self.unknown, "digest": self.digest}

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "file": self.name,
            "rows": self.rows,
            "duplicates": self.duplicates,
            "known": self.known,
            "unknown": self.unknown,
            "unknownSample": self.sample,
        }


# COPY of a million ids takes seconds, and waits for whoever writes the file into a pipe.
_PATIENCE = "SELECT set_config('statement_timeout', %s, true)"
_CREATE = f"""
DROP TABLE IF EXISTS pg_temp.listed_ids, pg_temp.{UNKNOWN}, pg_temp.{LISTED};
CREATE TEMPORARY TABLE listed_ids (line bigint NOT NULL, external_id text NOT NULL);
CREATE TEMPORARY TABLE {LISTED} (user_id bigint PRIMARY KEY);
CREATE TEMPORARY TABLE {UNKNOWN} (line bigint NOT NULL, external_id text NOT NULL)
"""
_COPY = "COPY pg_temp.listed_ids (line, external_id) FROM STDIN"
_ANALYZE = "ANALYZE pg_temp.listed_ids"
_KNOWN = f"""
INSERT INTO pg_temp.{LISTED} (user_id)
SELECT u.id FROM users AS u WHERE u.external_id IN (SELECT external_id FROM pg_temp.listed_ids) ORDER BY u.id
"""  # noqa: S608 - the table's name is a constant
_UNKNOWN = f"""
INSERT INTO pg_temp.{UNKNOWN} (line, external_id)
SELECT min(l.line), l.external_id FROM pg_temp.listed_ids AS l
WHERE NOT EXISTS (SELECT FROM users AS u WHERE u.external_id = l.external_id)
GROUP BY l.external_id ORDER BY min(l.line)
"""  # noqa: S608 - the same
# By hashes of the ids: no collation and no separator has a say. In two steps: the text of all hashes in one value would
# end at PostgreSQL's gigabyte, some 30 million ids.
_DIGEST = """
SELECT encode(sha256(coalesce(string_agg(part, ''::bytea ORDER BY bucket), '')), 'hex')
FROM (
    SELECT get_byte(hash, 0) AS bucket, sha256(string_agg(hash, ''::bytea ORDER BY hash)) AS part
    FROM (SELECT DISTINCT sha256(convert_to(external_id, 'UTF8')) AS hash FROM pg_temp.listed_ids) AS h
    GROUP BY get_byte(hash, 0)
) AS parts
"""
_SAMPLE = f"SELECT external_id FROM pg_temp.{UNKNOWN} ORDER BY line LIMIT %s"  # noqa: S608 - the same
_ALL_UNKNOWN = f"SELECT external_id FROM pg_temp.{UNKNOWN} ORDER BY line"  # noqa: S608 - the same


class Ids(Protocol):
    """Somebody's list of ids: a file, or what came with a request."""

    name: str
    """What messages call it."""

    def ids(self) -> Iterable[tuple[int, str]]:
        """Each id with its place in the list."""


def load_users(connection: psycopg.Connection[Any], file: Ids) -> Listed:
    """Load a file of ids, and leave its users in `pg_temp.listed_users (user_id)` for as long as the session lives.

    Args:
        connection: in autocommit, or in a transaction: the same that then opens the run.
        file: freshly opened.

    Raises:
        RefusedError: a line is no id, or none of the ids is a user's.
    """
    with transaction(connection):
        connection.execute(_PATIENCE, (f"{STATEMENT_TIMEOUT_SECONDS}s",))
        connection.execute(_CREATE)
        rows = 0
        with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
            for line in file.ids():
                copy.write_row(line)
                rows += 1
        connection.execute(_ANALYZE)
        known = connection.execute(_KNOWN).rowcount
        unknown = connection.execute(_UNKNOWN).rowcount
        (digest,) = one(connection.execute(_DIGEST))
        sample = [id_ for (id_,) in connection.execute(_SAMPLE, (SAMPLE,))]
        connection.execute(f"ANALYZE pg_temp.{LISTED}")
        connection.execute("DROP TABLE pg_temp.listed_ids")
    if rows == 0:
        raise RefusedError(f"{file.name} has no ids under its header")
    if known == 0:
        first = ", ".join(map(shown, sample[:3]))
        raise RefusedError(f"none of the {unknown:,} ids in {file.name} is a user's, which begin with {first}")
    return Listed(file.name, rows, rows - known - unknown, known, unknown, sample, digest)


def unknown_ids(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """The ids of the loaded file that are nobody's, in the file's order, in bounded memory."""
    with transaction(connection), connection.cursor(name="unlisted_ids") as cursor:
        cursor.itersize = 1_000
        for (external_id,) in cursor.execute(_ALL_UNKNOWN):
            yield external_id
