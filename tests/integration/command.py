"""The `credits` command as people run it: a process, its answer, its errors and its exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import settings
from tests.integration.forked import credits  # noqa: A004

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

CREDITS = Path(sys.executable).parent / "credits"


class Cli:
    """Runs `credits` against this test's servers."""

    def __init__(self, database_url: str, redis_url: str) -> None:
        self.environment = settings.environment(DATABASE_URL=database_url, REDIS_URL=redis_url, COLUMNS="200")

    def __call__(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return credits(arguments, {**self.environment, **variables})

    def says(self, *arguments: str) -> str:
        """The answer of a command that succeeds."""
        done = self(*arguments)
        assert done.returncode == 0, done
        return done.stdout

    def facts(self, *arguments: str) -> Any:
        """The answer in JSON of a command that succeeds."""
        return json.loads(self.says(*arguments, "--json"))


def refused(done: subprocess.CompletedProcess[str], code: int, says: str) -> None:
    """One clear line at the end of stderr, no traceback, nothing on stdout."""
    assert done.returncode == code, done
    assert says in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def names_of(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    """Every command that there is, each by all of its words."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from names_of(command, *above, name)
        else:
            yield (*above, name)
