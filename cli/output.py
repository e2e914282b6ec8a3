"""Output: answers on stdout, progress and notices on stderr, JSON where it was asked for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

import settings

if TYPE_CHECKING:
    from rich.console import JustifyMethod

# NO_COLOR in Rich still prints bold and dim; people who set it want neither.
_PLAIN = "NO_COLOR" in settings.environment()

out = Console(no_color=_PLAIN, highlight=False, color_system=None if _PLAIN else "auto")
err = Console(stderr=True, no_color=_PLAIN, highlight=False, color_system=None if _PLAIN else "auto")

json_option = click.option("--json", "as_json", is_flag=True, help="Answer in JSON on stdout.")


def answer(text: str, facts: dict[str, Any], *, as_json: bool) -> None:
    """Print an answer: a sentence, or its facts as one JSON object."""
    if as_json:
        click.echo(json.dumps(facts, default=str))
    else:
        out.print(text, soft_wrap=True, markup=False)


class _Rate(ProgressColumn):
    """How fast it goes, lately."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="progress.data.speed")


def progress(*, in_bytes: bool = False) -> Progress:
    """A bar on stderr; nothing at all where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        *(() if in_bytes else (_Rate(),)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=False,
    )


def table(title: str, rows: list[dict[str, Any]], *, whole: str | None = None) -> Table:
    """A table of rows whose keys are its headings.

    Args:
        title: above it.
        rows: all with the same keys.
        whole: the heading of what people copy into another command: it is not folded for the others' sake.
    """
    drawn = _titled(title)
    for heading, value in rows[0].items() if rows else ():
        side: JustifyMethod = "right" if isinstance(value, int) else "left"
        drawn.add_column(heading, justify=side, overflow="fold", no_wrap=heading == whole)
    for row in rows:
        drawn.add_row(*("" if value is None else _text(value) for value in row.values()))
    return drawn


def facts(title: str, pairs: dict[str, Any]) -> Table:
    """One thing's facts, a line each."""
    drawn = _titled(title)
    drawn.show_header = False
    drawn.add_column()
    drawn.add_column(overflow="fold")
    for name, value in pairs.items():
        drawn.add_row(name, _text(value))
    return drawn


def _titled(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def _text(value: object) -> str:
    """A cell; brackets in it are nobody's markup."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(str(value))
