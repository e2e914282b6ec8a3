"""The command group, and the one place where errors become lines and exit codes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

ERROR = 1
REFUSED = 2
FINISHED_WITH_FAILURES = 3

# Imported when they are called: `credits --help` need not load Celery and a database driver. Each with its help line.
_COMMANDS = {
    "bulk-refresh": ("cli.bulk", "Refresh a plan, a file of users, or all who are due."),
    "completion": ("cli.completion", "Print the script that makes a shell complete commands."),
    "db": ("cli.database", "Prepare the database and check it."),
    "dead-letters": ("cli.dead_letters", "Show the messages that the workers have refused."),
    "demo": ("cli.demo", "Refresh sample users by real servers, workers and beat."),
    "doctor": ("cli.doctor", "Look at everything that the service needs; say what to do."),
    "forecast": ("cli.forecast", "Show the refreshes and credits of the days ahead, by plan."),
    "history": ("cli.history", "Show what a user was granted, and what not."),
    "hold": ("cli.hold", "Keep a user from being refreshed."),
    "keys": ("cli.keys", "Make, list and revoke keys of the HTTP API."),
    "pause": ("cli.switch", "Grant nothing on any path until `credits resume`."),
    "plans": ("cli.plans", "Show, preview and change what a tier grants, and when."),
    "refresh": ("cli.refresh", "Refresh one user, there and then."),
    "release": ("cli.hold", "End a user's hold."),
    "resume": ("cli.switch", "End a pause."),
    "retention": ("cli.retention", "Drop what is older than somebody wants to keep."),
    "runs": ("cli.runs", "List, show and watch runs; apply, roll back, retry and cancel them."),
    "scan": ("cli.scan", "Find all due users and have the workers refresh them."),
    "stats": ("cli.stats", "Show how runs went: success, durations, failures by cause."),
    "up": ("cli.up", "Run workers, beat, the HTTP API and Flower until Ctrl-C."),
    "users": ("cli.users", "Import users, show one, give dates to those who have none."),
    "verify": ("cli.verify", "Check that the books are right."),
    "webhooks": ("cli.webhooks", "Look at Stripe's events; tell others what happens here."),
    "why": ("cli.why", "Say why a user is, or is not, refreshed."),
}


class _Commands(click.Group):
    """Loads commands on demand; turns the errors that people can mend into one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return sorted(_COMMANDS)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names and help lines, without loading what is behind them."""
        names = [CompletionItem(n, help=line) for n, (_, line) in sorted(_COMMANDS.items()) if n.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(_COMMANDS[cmd_name][0]), cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_module, line) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            line = _line(error)
            if line is None:
                raise
            raise line from error


def _line(error: Exception) -> click.ClickException | None:
    """What people read instead of a traceback; None for an error that is ours to mend."""
    # Imported here, where the command has them loaded already: `credits --help` has no use for them.
    import psycopg  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from db import DatabaseError, one_line  # noqa: PLC0415
    from embedded import EmbeddedError  # noqa: PLC0415
    from refresh.errors import RefusedError  # noqa: PLC0415
    from settings import SettingsError  # noqa: PLC0415

    if isinstance(error, RefusedError):
        return _Refused(str(error))
    if isinstance(error, SettingsError | DatabaseError | EmbeddedError):
        return _Failed(str(error))
    if isinstance(error, UnicodeEncodeError):  # as an argument that is no UTF-8 fails on its way to the database
        return _Refused("a value is no text: it has bytes that are not UTF-8")
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return _Failed(f"{one_line(error)}: another session holds the lock; try again")
    if isinstance(error, psycopg.Error | DBAPIError):
        return _Failed(f"The database refused: {one_line(error)}")
    return None


class _Line(click.ClickException):
    """One line, whatever somebody has typed that it repeats: nothing in it moves the cursor or colours the terminal."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class _Failed(_Line):
    exit_code = ERROR


class _Refused(_Line):
    exit_code = REFUSED


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="credit-refresh")
def main() -> None:
    """Give every user their periodic credits, exactly once per window.

    Settings come from the environment. Without DATABASE_URL and REDIS_URL, commands use embedded servers, which live
    in .state; `credits up` keeps them running.

    Exit codes: 0 done, 1 error, 2 usage or refused, 3 finished with failed users or with findings.
    """
