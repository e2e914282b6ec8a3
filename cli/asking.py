"""What the commands that ask for a run have in common: why, under which key, and the answer no.

Apart from `publishing.py`: a command that does its run by itself need not load Celery.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from refresh.errors import RefusedError
from refresh.pacing import PACE_MAX

if TYPE_CHECKING:
    from refresh import runs


def _not_blank(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("it must not be blank")
    return value.strip() if value is not None else None


reason_option = click.option(
    "--reason",
    required=True,
    callback=_not_blank,
    help="For whoever asks why; lands in the run, in the users' history and in the audit log.",
)
key_option = click.option(
    "--idempotency-key",
    metavar="KEY",
    callback=_not_blank,
    help="Asked for again with the same key, the same run is the answer, and no second one is opened.",
)
pace_option = click.option(
    "--max-users-per-second",
    type=click.IntRange(1, PACE_MAX),
    metavar="N",
    help="Go no faster, so that the app keeps its database; without, as fast as the workers can.",
)
inherited_pace_option = click.option(
    "--max-users-per-second",
    type=click.IntRange(1, PACE_MAX),
    metavar="N",
    help="Go no faster; without, as RUN was told.",
)


def refuse(why: runs.NotOpened) -> RefusedError:
    """The error of a command that was to open a run and did not."""
    return RefusedError(f"nothing was opened: {why.text}")
