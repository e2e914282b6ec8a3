"""What a run of the suite showed: tables on stdout, all figures as JSON and a plot in the state folder."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

import psutil
from matplotlib.figure import Figure

from cli.output import err, out, table
from cli.words import counted
from tests.faults.recovery import LIMIT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.faults.engine import Injection, Story


def tell(story: Story, folder: Path) -> None:
    """Print the tables and write the files.

    Args:
        story: of a run, whether or not it came to its end.
        folder: for the files.
    """
    if story.injections:
        out.print(table("Faults", [_row(name, found) for name, found in _by_name(story).items()]))
    if story.not_run:
        out.print(table("Not run here", [{"fault": name, "why": why} for name, why in story.not_run.items()]))
    if left := sorted(story.aims.keys() - {injection.name for injection in story.injections}):
        out.print(f"Not reached in this time: {', '.join(left)}", soft_wrap=True, markup=False)
    if story.did:
        out.print(table("Meanwhile", [{"what": what, "times": times} for what, times in story.did.items()]))
    for finding in story.findings:
        out.print(f"{finding.rule}: {finding.text}", style="red", markup=False, soft_wrap=True)
    out.print(_sentence(story), soft_wrap=True, markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-seed-{story.seed}"
    stem.with_suffix(".json").write_text(json.dumps({**asdict(story), "cores": psutil.cpu_count()}, indent=2) + "\n")
    if story.injections:
        _draw(story, stem.with_suffix(".svg"))
    err.print(f"Written to {stem}.*", soft_wrap=True, markup=False, highlight=False)


def _by_name(story: Story) -> dict[str, list[Injection]]:
    found: dict[str, list[Injection]] = {}
    for injection in story.injections:
        found.setdefault(injection.name, []).append(injection)
    return found


def _row(name: str, injections: Sequence[Injection]) -> dict[str, object]:
    hits = sum((Counter(injection.hits) for injection in injections), Counter[str]())
    seconds = [injection.recovery_seconds for injection in injections]
    recovered = [each for each in seconds if each is not None]
    return {
        "fault": name,
        "times": len(injections),
        "hits": ", ".join(f"{times:,} {what}" for what, times in hits.items()),
        "due at its end": max(injection.users_due for injection in injections),
        "recovery, median s": f"{statistics.median(recovered):.1f}" if recovered else "",
        "max s": f"over {LIMIT_SECONDS:.0f}" if None in seconds else f"{max(recovered):.1f}",
    }


def _sentence(story: Story) -> str:
    faults = sum(1 for injection in story.injections if injection.name in story.aims)
    kinds = len({injection.name for injection in story.injections} & story.aims.keys())
    replay = f"--minutes {story.minutes:g} --seed {story.seed}" + (f" --break {story.broken}" if story.broken else "")
    verdict = counted(len(story.findings), "finding") if story.findings else "the books are right"
    if not story.ended:
        verdict = f"cut short, {verdict} so far"
    return f"{faults} faults of {kinds} kinds: {verdict}. Again with: make faults ARGS='{replay}'"


def _draw(story: Story, path: Path) -> None:
    found = _by_name(story)
    figure = Figure(figsize=(9, 1 + 0.3 * len(found)), layout="constrained")
    axes = figure.subplots()
    for number, injections in enumerate(found.values()):
        seconds = [LIMIT_SECONDS if each.recovery_seconds is None else each.recovery_seconds for each in injections]
        axes.plot(seconds, [number] * len(seconds), "o", color="#4c72b0", alpha=0.7)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(
        title=f"Recovery after each fault, seed {story.seed}",
        xlabel="seconds from a fault's end until everybody who was due then is refreshed",
    )
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
