"""An operator: somebody who types commands, and types them again when no answer came.

    python -m tests.faults.operator --host URL --name operator-1

A real process that runs the real commands against the servers that its environment names, one after the other, as
`credits` would: importing it anew for each would cost two cores more than everything else here. What to ask for stands
in `host.asked` (population.py), which the operator reaches without the proxies. Killed, frozen or cut off at any
point, whoever comes next finds the ask unanswered and asks again, with the same idempotency key.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

import click
import psycopg
from click.testing import CliRunner
from psycopg.types.json import Jsonb

import settings
from embedded.processes import unwind_on_signals

POLL_SECONDS = 0.2
AGAIN_SECONDS = 1.0
"""After an error, which says nothing of what became of the request."""
PATIENCE_SECONDS = 120
"""After which an ask that another operator has taken is anybody's."""

SIGNALLED = 128
"""Exit codes above it are of a signal: the command was told to stop, and so is the operator."""
REFUSED = 2
FINISHED_WITH_FAILURES = 3

_GIVE_BACK = "UPDATE host.asked SET operator = NULL WHERE operator = %(name)s AND answered_at IS NULL"
_TAKE = """
UPDATE host.asked SET operator = %(name)s, taken_at = now(), attempts = attempts + 1
WHERE id = (
    SELECT id FROM host.asked
    WHERE answered_at IS NULL AND (
        operator IS NULL AND coalesce(taken_at < now() - make_interval(secs => %(again)s), true)
        OR taken_at < now() - make_interval(secs => %(patience)s)
    )
    ORDER BY id LIMIT 1
    FOR UPDATE SKIP LOCKED
)
RETURNING id, arguments
"""
_ANSWER = """
UPDATE host.asked SET
    operator = CASE WHEN %(final)s THEN operator END,
    answered_at = CASE WHEN %(final)s THEN now() END,
    exit_code = %(exit_code)s, answer = %(answer)s, said = %(said)s
WHERE id = %(id)s AND answered_at IS NULL
"""


class Answer(NamedTuple):
    """What a command said.

    Attributes:
        facts: its JSON; None where it gave none.
        said: its last line on stderr.
    """

    exit_code: int
    facts: Any
    said: str


@click.command()
@click.option("--host", "url", required=True, help="The database of the host app, for host.asked.")
@click.option("--name", required=True, help="Of the operator, the same after a restart.")
def main(url: str, name: str) -> None:
    """Ask for what stands in host.asked, until told to stop."""
    unwind_on_signals()
    if "FAULTS_BREAK" in settings.environment():
        import tests.faults.broken  # noqa: F401, PLC0415 - it takes the guard out of this process too
    while True:
        try:
            _work(url, name)
        except psycopg.Error as error:  # it restarts, or is not ready yet
            click.echo(f"{name}: {error}", err=True)
            time.sleep(AGAIN_SECONDS)


def _work(url: str, name: str) -> None:
    with psycopg.connect(url, autocommit=True, application_name="operator", connect_timeout=5) as connection:
        connection.execute(_GIVE_BACK, {"name": name})
        while True:
            values = {"name": name, "again": AGAIN_SECONDS, "patience": PATIENCE_SECONDS}
            taken = connection.execute(_TAKE, values).fetchone()
            if taken is None:
                time.sleep(POLL_SECONDS)
                continue
            ask_id, arguments = taken
            answer = run(arguments)
            final = answer.exit_code in {0, REFUSED, FINISHED_WITH_FAILURES}
            click.echo(f"{name}: {' '.join(arguments)} → {answer.exit_code} {answer.said}")
            connection.execute(
                _ANSWER,
                {
                    "id": ask_id,
                    "final": final,
                    "exit_code": answer.exit_code,
                    "answer": Jsonb(answer.facts),
                    "said": answer.said,
                },
            )


def run(arguments: list[str]) -> Answer:
    """Run a command in this process.

    Raises:
        SystemExit: a signal came meanwhile.
    """
    from cli import main as credits_command  # noqa: PLC0415 - after broken.py

    result = CliRunner().invoke(credits_command, arguments, prog_name="credits")
    if result.exit_code > SIGNALLED:
        raise SystemExit(result.exit_code)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return Answer(result.exit_code, None, repr(result.exception))
    try:
        facts = json.loads(result.stdout)
    except ValueError:
        facts = None
    lines = result.stderr.strip().splitlines()
    return Answer(result.exit_code, facts, lines[-1] if lines else "")


if __name__ == "__main__":
    main()
