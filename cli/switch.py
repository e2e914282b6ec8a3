"""`credits pause | resume`."""

from __future__ import annotations

import click

from cli.output import answer, json_option
from cli.session import actor, session
from refresh.switch import turn


@click.command()
@json_option
def pause(*, as_json: bool) -> None:
    """Grant nothing on any path until `credits resume`. Batches already in a worker's hands are finished."""
    with session() as opened, opened.database.transaction() as connection:
        changed = turn(connection, enabled=False, actor=actor())
        text = "Paused: nothing is granted until `credits resume`." if changed else "It was paused already."
        answer(text, {"enabled": False, "changed": changed}, as_json=as_json)


@click.command()
@json_option
def resume(*, as_json: bool) -> None:
    """End a pause. The next scan refreshes whoever fell due meanwhile, once each."""
    with session() as opened, opened.database.transaction() as connection:
        changed = turn(connection, enabled=True, actor=actor())
        text = "Resumed: the next scan refreshes whoever is due." if changed else "It was not paused."
        answer(text, {"enabled": True, "changed": changed}, as_json=as_json)
