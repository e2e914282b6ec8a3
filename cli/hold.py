"""`credits hold` and `credits release`: keep a user from being refreshed, and let go."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - Click's decorators keep the annotations company
from typing import TYPE_CHECKING

import click

from cli.output import answer, json_option
from cli.session import actor, session
from cli.types import Instant
from cli.why import explanation
from cli.words import moment
from refresh import holds
from refresh.verdict import explain_user

if TYPE_CHECKING:
    from refresh.verdict import Verdict


@click.command()
@click.argument("user", metavar="USER")
@click.option("--reason", required=True, help="For whoever asks why; lands in the audit log.")
@click.option("--until", type=Instant(), metavar="T", help="The hold ends by itself then; otherwise, when released.")
@json_option
def hold(*, user: str, reason: str, until: datetime | None, as_json: bool) -> None:
    """Keep a user from being refreshed. USER is your app's own id of them.

    Of a user who is held already, the reason and the end are replaced by the ones given. A window that falls due
    meanwhile is noted; after the hold, the next scan refreshes the user once, for the window current then.

    \b
    Examples:
      credits hold user-42 --reason 'fraud check'
      credits hold user-42 --reason 'chargeback' --until 2026-12-01T00:00:00Z
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.transaction() as connection:
        held = holds.hold(connection, user, reason=reason, until=until, actor=actor())
        verdict = explain_user(connection, user)
    end = f"until {moment(until)}" if until else "until released"
    if not held.changed:
        text = f"{user} was held like that already, {end}."
    elif held.was_held:
        text = f"{user} stays held, now {end}: {reason.strip()}."
    else:
        text = f"{user} is held {end}: {reason.strip()}."
    answer(text, _facts(verdict, changed=held.changed, was_held=held.was_held), as_json=as_json)


@click.command()
@click.argument("user", metavar="USER")
@json_option
def release(*, user: str, as_json: bool) -> None:
    """End a user's hold. The next scan refreshes them if they are due.

    \b
    Example:
      credits release user-42
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session() as opened, opened.database.transaction() as connection:
        was_held = holds.release(connection, user, actor=actor())
        verdict = explain_user(connection, user)
    text = f"{user} is released. {explanation(verdict)}" if was_held else f"{user} was not held."
    answer(text, _facts(verdict, changed=was_held, was_held=was_held), as_json=as_json)


def _facts(verdict: Verdict, *, changed: bool, was_held: bool) -> dict[str, object]:
    facts = verdict.facts()
    return {
        "userId": verdict.external_id,
        "held": verdict.held,
        "wasHeld": was_held,
        "changed": changed,
        "verdict": verdict.verdict,
        "hold": facts["hold"],
        "next": facts["next"],
    }
