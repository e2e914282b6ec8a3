"""Words that several commands share, and the question before something is changed."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from refresh.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from refresh.windows import Window

yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def moment(at: datetime) -> str:
    """An instant, to the minute, in UTC."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def counted(number: int, thing: str) -> str:
    """1 user, 2 users."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def window_rows(windows: Iterable[Window]) -> list[dict[str, object]]:
    """Windows as rows of a table, in local time and in UTC."""
    return [
        {
            f"local ({window.zone})": f"{window.local:%a %Y-%m-%d %H:%M %z}",
            "UTC": f"{window.starts_at.astimezone(UTC):%Y-%m-%d %H:%M}",
            "amount": window.amount,
        }
        for window in windows
    ]


def confirm(question: str, *, yes: bool) -> None:
    """Ask on the terminal, unless the answer was given beforehand.

    Raises:
        RefusedError: the answer is no, or nobody is there to give one.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise RefusedError(f"{question} Without a terminal to answer on, say so with --yes; nothing was changed")
    if not click.confirm(question, err=True):
        raise RefusedError("nothing was changed")
