"""`make faults`: the whole service under load, one fault after the other, and a checker that looks at the books."""

from __future__ import annotations

import sys
from random import SystemRandom

import click

import settings
from cli.output import err, out, table
from embedded.processes import unwind_on_signals
from tests.faults import report
from tests.faults.arena import Arena, ArenaError
from tests.faults.breaks import BREAKS
from tests.faults.engine import Engine, Story
from tests.faults.faults.catalogue import FAULTS

SEED_MAX = 1_000_000


@click.command()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="How long faults begin; the last one's recovery, and the rest of the work, come on top.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of a run that is to be replayed; without, a new one.")
@click.option("--only", multiple=True, type=click.Choice(sorted(FAULTS)), metavar="NAME", help="Only these faults.")
@click.option(
    "--break",
    "broken",
    type=click.Choice(sorted(BREAKS)),
    metavar="NAME",
    help="Take a guard out of the service; the suite must find that.",
)
@click.option("--list", "listing", is_flag=True, help="Show the faults and the guards by name.")
def faults(*, minutes: float, seed: int | None, only: tuple[str, ...], broken: str | None, listing: bool) -> None:
    """Break everything that can break, at random instants, and see that the books are right all the same.

    PostgreSQL, Redis, workers, beats and operators are processes of their own; a host app spends meanwhile. The exit
    code is 1 when something was found. Tables are here, all figures and logs in .state/faults.

    \b
    Examples:
      make faults
      make faults ARGS='--minutes 2 --seed 7'
      make faults ARGS='--minutes 1 --only worker-killed'
      make faults ARGS='--minutes 1 --break unique-key'
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    if listing:
        _list()
        return
    unwind_on_signals()
    story = Story(SystemRandom().randrange(SEED_MAX) if seed is None else seed, minutes, broken)
    err.print(f"Seed {story.seed}", highlight=False)
    state = settings.load().credits_state_dir
    try:
        with Arena(state, seed=story.seed, broken=broken) as arena:
            Engine(arena, story, only).run()
    except ArenaError as error:
        raise click.ClickException(str(error)) from error
    finally:
        report.tell(story, state / "faults")
    sys.exit(bool(story.findings))


def _list() -> None:
    out.print(table("Faults", [{"name": fault.name, "what happens": fault.about} for fault in FAULTS.values()]))
    out.print(table("Guards that --break takes out", [
        {"name": name, "what is taken out": each.guard, "under the faults": ", ".join(each.faults)}
        for name, each in BREAKS.items()
    ]))  # fmt: skip


if __name__ == "__main__":
    faults()
