"""The `credits` command as a process of its own, forked from one that has loaded the libraries already.

They are most of what a command takes to start, and the suite starts a thousand. Nothing of ours is loaded before the
fork: each process imports it anew, under its own environment.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LIBRARIES = [
    "alembic.command",
    "celery",
    "celery.signals",
    "kombu",
    "psycopg.types.json",
    "pydantic_settings",
    "redis",
    "rich.console",
    "rich.progress",
    "rich.table",
    "sqlalchemy.dialects.postgresql.psycopg",
    "structlog",
]
_SECONDS = 60.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_LIBRARIES)


def credits(  # noqa: A001
    arguments: Sequence[str], environment: Mapping[str, str], *, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run()` gives for the command, without anything on its standard input.

    Raises:
        subprocess.TimeoutExpired: it has not ended after a minute; it is killed then.
    """
    with TemporaryDirectory() as answers:
        asked = (answers, list(arguments), dict(environment), folder or Path.cwd())
        process = _context.Process(target=_command, args=asked)
        process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["credits", *arguments], _SECONDS)
        said = [(Path(answers) / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(["credits", *arguments], process.exitcode, *said)


def _command(answers: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    files = (os.devnull, os.O_RDONLY), (f"{answers}/stdout", os.O_WRONLY), (f"{answers}/stderr", os.O_WRONLY)
    for number, (path, flags) in enumerate(files):
        os.dup2(os.open(path, flags | os.O_CREAT, 0o600), number)
    os.chdir(folder)
    os.environ.clear()  # noqa: TID251 - it is made here
    os.environ.update(environment)  # noqa: TID251
    time.tzset()
    sys.argv = ["credits", *arguments]
    from cli.main import main  # noqa: PLC0415 - not before the fork

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # noqa: SLF001 - multiprocessing's processes end without
