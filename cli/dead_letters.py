"""`credits dead-letters`: the messages that workers have refused."""

from __future__ import annotations

import click

from celeryconfig import DEAD_LETTERS_MAX
from cli.output import answer, json_option, out, table
from cli.session import session
from cli.words import confirm, counted, yes_option
from tasks import dead_letters as domain
from tasks.app import check_broker, use_broker

SHOWN_CHARACTERS = 60


@click.command()
@click.option("--drop", is_flag=True, help="Delete them all, once they have been looked at.")
@yes_option
@json_option
def dead_letters(*, drop: bool, yes: bool, as_json: bool) -> None:
    """Show the messages that workers have refused because they are none of ours, the oldest first.

    A worker takes its own tasks, with their own arguments, in JSON. Whatever else somebody sends to its queues is kept
    here with the reason, the last 1,000 of them, each with the first 4,096 characters of what it held. Nothing is owed
    for them: what has to be done is in the database, and upkeep publishes it again. Find out who sends them: the
    broker should know nobody but workers, beat and Flower.

    \b
    With --json: letters (each with refusedAt, queue, reason, headers, body), dropped (their number, with --drop).

    \b
    Examples:
      credits dead-letters
      credits dead-letters --json
      credits dead-letters --drop
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with session(broker=True, migrated=False) as opened:
        use_broker(opened.settings.broker_url)
        check_broker()
        letters = domain.letters()
        if letters and not as_json:
            out.print(table("Refused messages", [_row(letter) for letter in letters]))
        dropped = 0
        if drop and letters:
            confirm(f"{counted(len(letters), 'message')} will go for good. Go on?", yes=yes)
            dropped = domain.drop()
    said = counted(len(letters), "refused message")
    more = f" (only the last {DEAD_LETTERS_MAX:,} are kept)" if len(letters) >= DEAD_LETTERS_MAX else ""
    gone = ", deleted" if drop and letters else ""
    answer(f"{said}{more}{gone}.", {"letters": letters, "dropped": dropped}, as_json=as_json)


def _row(letter: dict[str, str | None]) -> dict[str, object]:
    body = letter["body"] or ""
    return {
        "refused": letter["refusedAt"],
        "queue": letter["queue"],
        "reason": letter["reason"],
        # As Python writes it: what is shown moves no cursor and colours nothing.
        "body": repr(body[:SHOWN_CHARACTERS])[1:-1] + ("…" if len(body) > SHOWN_CHARACTERS else ""),
    }
