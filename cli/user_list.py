"""`--users FILE`: the users whom a command acts on, as a list of the host app's ids."""

from __future__ import annotations

import csv
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from cli.output import err
from cli.rejects import harmless
from cli.words import counted
from refresh.errors import RefusedError
from refresh.import_columns import shown
from refresh.user_files import Listed, UserList, load_users, unknown_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

READ_BUFFER_BYTES = 1_048_576

users_option = click.option(
    "--users",
    "users_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="The users whose ids are in FILE: one per line, or a CSV with a column external_id, externalId, userId or "
    "user_id; - reads them from stdin.",
)
unknown_option = click.option(
    "--unknown",
    "unknown_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the ids of --users that are nobody's there, one per line; for a spreadsheet where FILE ends in .csv, "
    "in which what begins like a formula gets an apostrophe. The file must not exist yet; without unknown ids none is "
    "written.",
)


@contextmanager
def opened_list(path: Path, unknown_file: Path | None) -> Iterator[UserList]:
    """A list of ids, its first line read; before any server is asked.

    Raises:
        RefusedError: it cannot be read, or is no list; the place for unknown ids is taken.
    """
    if unknown_file is not None and os.path.lexists(unknown_file):
        raise RefusedError(f"{unknown_file} is there already: give the unknown ids a new name")
    with ExitStack() as stack:
        try:
            if path == Path("-"):
                file: BinaryIO = sys.stdin.buffer
            else:
                file = stack.enter_context(path.open("rb", buffering=READ_BUFFER_BYTES))
            if not file.seekable():  # the first line is read twice
                spool: Any = stack.enter_context(tempfile.TemporaryFile(buffering=READ_BUFFER_BYTES))
                shutil.copyfileobj(file, spool, READ_BUFFER_BYTES)
                file = spool
            file.seek(0)
        except OSError as error:
            raise RefusedError(f"{path} cannot be read: {error.strerror}") from error
        yield UserList(file, "stdin" if path == Path("-") else str(path))


def load(connection: psycopg.Connection[Any], users: UserList, unknown_file: Path | None) -> Listed:
    """Load a list for the session of the connection, and say which ids are nobody's.

    Raises:
        RefusedError: a line is no id, none of the ids is a user's, or `unknown_file` cannot be written.
    """
    listed = load_users(connection, users)
    if listed.unknown:
        if unknown_file is not None:
            _write_unknown(connection, unknown_file)
        named = ", ".join(map(shown, listed.sample))
        more = f" and {listed.unknown - len(listed.sample):,} more" if listed.unknown > len(listed.sample) else ""
        place = f" (all of them: {unknown_file})" if unknown_file is not None else ""
        text = f"{counted(listed.unknown, 'id')} in {listed.name} not a user's: {named}{more}{place}."
        err.print(text, soft_wrap=True, markup=False)
    return listed


def _write_unknown(connection: psycopg.Connection[Any], path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with unfinished.open("x", newline="", encoding="utf-8", buffering=READ_BUFFER_BYTES) as file:
                if path.suffix.lower() == ".csv":
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(["external_id"])
                    writer.writerows([harmless(external_id)] for external_id in unknown_ids(connection))
                else:
                    file.writelines(f"{external_id}\n" for external_id in unknown_ids(connection))
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise RefusedError(f"{path} cannot be written: {error.strerror}") from error
