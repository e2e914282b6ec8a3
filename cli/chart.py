"""A small bar chart on the terminal."""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable

LINES = 31
"""A month fits day by day; longer spans get several days to a line."""
WIDTH = 40


def bars(title: str, days: Iterable[tuple[date, int]]) -> Table:
    """Numbers by day, a line each; a long span is cut into at most `LINES` lines of equal width.

    Args:
        title: above the chart.
        days: at least one; the same day may come more than once.
    """
    counted = list(days)
    first, last = min(day for day, _ in counted), max(day for day, _ in counted)
    width = -(-((last - first).days + 1) // LINES)
    lines = [0] * ((last - first).days // width + 1)
    for day, number in counted:
        lines[(day - first).days // width] += number
    chart = Table.grid(padding=(0, 2))
    chart.title, chart.title_justify, chart.title_style = title, "left", "bold"
    chart.add_column()
    chart.add_column(justify="right")
    chart.add_column(width=WIDTH)
    for place, number in enumerate(lines):
        chart.add_row(
            str(first + timedelta(days=place * width)), f"{number:,}", Bar(max(lines), 0, number, width=WIDTH)
        )
    return chart
