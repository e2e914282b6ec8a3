"""What a benchmark found: tables on the terminal, and tables, plots and all figures as files in bench/results."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import psutil
import psycopg
from matplotlib.figure import Figure

import embedded
import settings
from cli.output import err, out, table
from embedded import Servers
from embedded.processes import unwind_on_signals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

RESULTS = settings.CHECKOUT / "bench" / "results"

_POSTGRES_SETTINGS = (
    "server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size", "autovacuum",
)  # fmt: skip


class Report:
    """Collects what a benchmark found; `write()` leaves it in bench/results.

    Args:
        name: of the benchmark, and of its files.
        facts: of the machine and the servers.
    """

    def __init__(self, name: str, facts: Mapping[str, object]) -> None:
        self._stem = RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._facts: dict[str, Any] = {"benchmark": name, "machine": dict(facts)}
        self._tables: list[str] = []

    def table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Show a table; every row has the same keys, which head the columns."""
        out.print(table(title, [dict(row) for row in rows]))
        self._facts.setdefault("tables", {})[title] = [dict(row) for row in rows]
        heads = list(rows[0])
        lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
        self._tables.append("\n".join([f"**{title}**\n", *("| " + " | ".join(line) + " |" for line in lines)]))

    def figures(self, name: str, values: object) -> None:
        """Keep unrounded figures for whoever reads the JSON."""
        self._facts[name] = values

    def bars(self, name: str, title: str, axis: str, values: Mapping[str, float], *, bar: float | None = None) -> None:
        """Draw a horizontal bar for each value, the first on top.

        Args:
            name: of the plot, in its file's name.
            title: above it.
            axis: what the values are.
            values: by what they belong to.
            bar: a limit that is to be seen, as a dashed line.
        """
        figure = Figure(figsize=(8, 0.5 + 0.4 * len(values)), layout="constrained")
        axes = figure.subplots()
        drawn = axes.barh(list(values), list(values.values()), color="#4c72b0")
        axes.bar_label(drawn, fmt="{:,.2f}", padding=3)
        axes.invert_yaxis()
        axes.set(title=title, xlabel=axis)
        if bar is not None:
            axes.axvline(bar, color="#c44e52", linestyle="--")
        self._draw(name, figure)

    def lines(  # noqa: PLR0913 - what a plot has
        self,
        name: str,
        title: str,
        axes_names: tuple[str, str],
        lines: Mapping[str, Sequence[tuple[float, float]]],
        *,
        log: str = "",
        bar: float | None = None,
    ) -> None:
        """Draw a line through each list of points.

        Args:
            name: of the plot, in its file's name.
            title: above it.
            axes_names: what x and y are, units included.
            lines: by what they stand for.
            log: the axes that are logarithmic: '', 'x', 'y' or 'xy'.
            bar: a limit on y that is to be seen, as a dashed line.
        """
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axes.set(title=title, xlabel=axes_names[0], ylabel=axes_names[1])
        if "x" in log:
            axes.set_xscale("log")
        if "y" in log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if bar is not None:
            axes.axhline(bar, color="#c44e52", linestyle="--")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
        self._draw(name, figure)

    def write(self) -> None:
        """Write what was found so far; again, after more was found, over it."""
        RESULTS.mkdir(exist_ok=True)
        self._stem.with_suffix(".json").write_text(json.dumps(self._facts, indent=2, default=str) + "\n")
        self._stem.with_suffix(".md").write_text("\n\n".join(self._tables) + "\n")
        err.print(f"Written to {self._stem.relative_to(settings.CHECKOUT)}.*")

    def _draw(self, name: str, figure: Figure) -> None:
        RESULTS.mkdir(exist_ok=True)
        # Texts stay texts, and no date goes in: a plot of the same figures is the same file.
        figure.savefig(f"{self._stem}-{name}.svg", metadata={"Date": None})


@contextmanager
def benchmark(name: str, **postgres_options: str) -> Iterator[tuple[Servers, Report]]:
    """The servers to measure on, and the report of what is found, written at the end whatever happens.

    DATABASE_URL and REDIS_URL where both are given, whose role may create databases; else embedded ones, durable.

    Args:
        name: of the benchmark.
        postgres_options: settings of the embedded PostgreSQL that differ from those of every other benchmark.
    """
    unwind_on_signals()
    loaded = settings.load()
    if loaded.database_url and loaded.redis_url:
        state = loaded.credits_state_dir / "bench"
        state.mkdir(parents=True, exist_ok=True)
        yield from _reported(name, Servers(loaded.database_url, loaded.redis_url, state))
        return
    with embedded.servers("bench", loaded.credits_state_dir, fresh=True, postgres_options=postgres_options) as running:
        yield from _reported(name, running)


def _reported(name: str, running: Servers) -> Iterator[tuple[Servers, Report]]:
    report = Report(name, _facts(running))
    try:
        yield running, report
    finally:
        report.write()


def _facts(running: Servers) -> dict[str, object]:
    with psycopg.connect(running.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        rows = connection.execute(
            "SELECT name, current_setting(name) FROM pg_settings WHERE name = ANY (%s)", (list(_POSTGRES_SETTINGS),)
        ).fetchall()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        cwd=settings.CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("celery", "kombu", "psycopg", "redis", "sqlalchemy")},
        "postgresql": dict(rows),
        "commit": commit.stdout.strip(),
    }
