"""`credits doctor`: is everything there that the service needs, and does it move?"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

import settings
from cli.main import ERROR
from cli.output import answer, json_option, out
from cli.session import INSTANCE, Session, session
from db import DatabaseError, one_line
from embedded import EmbeddedError
from refresh import doctor as domain
from refresh.doctor import Finding
from settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

SKEW_MAX_SECONDS = 5.0
"""Beat rings by its machine's clock and slots are cut by the database's; upkeep makes up for a minute between them."""
STATEMENT_TIMEOUT_SECONDS = 10

_STYLES = {"ok": "green", "wrong": "bold red", "info": "cyan", "unasked": "yellow"}


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, *, as_json: bool) -> None:
    """Look at everything that the service needs: a line each, which says ok or what to do. Nothing is changed.

    Exit code 1 when something is wrong. A question that finds no answer is a line of its own, and one that waits for
    another to be mended says so (unasked).

    \b
    With --json: ok, and checks (name, state, text, todo). The states are ok, wrong, info and unasked; todo is null
    where there is nothing to do.

    \b
    Examples:
      credits doctor
      credits doctor --json
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    with ExitStack() as stack:
        checks = _Examination(stack).run()
    healthy = all(finding.state != "wrong" for finding in checks.values())
    if as_json:
        answer("", {"ok": healthy, "checks": [_facts(name, finding) for name, finding in checks.items()]}, as_json=True)
    else:
        _print(checks)
    if not healthy:
        ctx.exit(ERROR)


def _facts(name: str, finding: Finding) -> dict[str, Any]:
    return {"name": name, "state": finding.state, "text": finding.text, "todo": finding.todo}


def _print(checks: dict[str, Finding]) -> None:
    width = max(len(name) for name in checks)
    for name, finding in checks.items():
        state = Text(f"{finding.state:<8}", style=_STYLES[finding.state])
        out.print(state + Text(f"{name:<{width}}  {finding.sentence}"), soft_wrap=True)


class _Examination:
    """Asks one question after the other; none that fails keeps the others from their answer.

    Args:
        stack: what a question opens and later ones use stays open as long as this.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._checks: dict[str, Finding] = {}
        self._opened: Session | None = None
        self._connection: psycopg.Connection[Any] | None = None

    def run(self) -> dict[str, Finding]:
        """All findings by name, in the order of their dependence."""
        self._ask("settings", _settings)
        self._ask("servers", self._servers, after="settings")
        self._ask("database", self._database, after="servers")
        self._ask("clock", lambda: _clock(self.connection), after="database")
        self._ask("connections", lambda: domain.connections(self.connection), after="database")
        self._ask("lock waits", lambda: domain.lock_waits(self.connection), after="database")
        self._ask("migration", self._migration, after="database")
        self._ask("partitions", lambda: domain.partitions(self.connection), after="migration")
        self._ask("default partitions", lambda: domain.default_partitions(self.connection), after="migration")
        self._ask("switch", lambda: domain.switch(self.connection, self.settings), after="migration")
        self._ask("spend trigger", lambda: domain.spend_trigger(self.connection), after="migration")
        self._ask("scheduled run", lambda: domain.scheduled_run(self.connection, self.settings), after="migration")
        self._ask("pace", lambda: domain.pace(self.connection, self.settings), after="migration")
        self._ask("stuck runs", lambda: domain.stuck_runs(self.connection), after="migration")
        self._ask("overdue users", lambda: domain.overdue_users(self.connection, self.settings), after="migration")
        self._ask("webhooks", lambda: domain.webhooks(self.connection), after="migration")
        self._ask_celery()
        return self._checks

    def _ask_celery(self) -> None:
        if self._opened is None:
            for name in ("broker", "queues", "dead letters", "workers", "beat"):
                self._ask(name, _settings, after="servers")
            return
        # With settings that are wrong, importing the Celery app ends the process.
        from cli import doctor_celery as celery  # noqa: PLC0415

        folders = (self.settings.credits_state_dir, self.settings.credits_state_dir / INSTANCE)
        self._ask("broker", partial(celery.broker, self.settings.broker_url))
        self._ask("queues", celery.queues, after="broker")
        self._ask("dead letters", celery.dead_letters, after="broker")
        self._ask("workers", partial(celery.workers, folders), after="broker")
        on_time = self._checks["scheduled run"].state == "ok"
        self._ask("beat", partial(celery.beat, folders, on_time=on_time))

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """To the database, for questions that come after it."""
        assert self._connection is not None  # noqa: S101 - asked after "database" alone
        return self._connection

    @property
    def settings(self) -> settings.Settings:
        """With their URLs, for questions that come after the servers."""
        assert self._opened is not None  # noqa: S101 - asked after "servers" alone
        return self._opened.settings

    def _ask(self, name: str, question: Callable[[], Finding], *, after: str | None = None) -> None:
        if after is not None and self._checks[after].state in ("wrong", "unasked"):
            self._checks[name] = Finding("unasked", f"not asked before {after} is mended")
            return
        try:
            self._checks[name] = question()
        except (SettingsError, DatabaseError, EmbeddedError) as error:
            self._checks[name] = Finding("wrong", str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer to this question alone
            self._checks[name] = Finding("wrong", f"no answer ({type(error).__name__}): {one_line(error)}")

    def _servers(self) -> Finding:
        self._opened = self._stack.enter_context(session(broker=True, migrated=False))
        given = settings.load()
        broker = "CELERY_BROKER_URL" if given.celery_broker_url else "REDIS_URL"
        urls = {"DATABASE_URL": given.database_url, broker: given.broker_url}
        absent = [name for name, url in urls.items() if url is None]
        if absent:
            return Finding("ok", f"embedded, for want of {' and '.join(absent)}")
        return Finding("ok", f"DATABASE_URL and {broker} name them")

    def _database(self) -> Finding:
        assert self._opened is not None  # noqa: S101 - asked after "servers" alone
        self._connection = self._stack.enter_context(self._opened.database.statements())
        self._connection.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'")
        return domain.server_version(self._connection)

    def _migration(self) -> Finding:
        assert self._opened is not None  # noqa: S101 - asked after "database" alone
        self._opened.database.require_migrated()
        return Finding("ok", f"the tables in schema {self.settings.database_schema} are this release's")


def _settings() -> Finding:
    settings.load()
    return Finding("ok", "the environment's values are valid")


def _clock(connection: psycopg.Connection[Any]) -> Finding:
    before = datetime.now(UTC)
    theirs = domain.clock(connection)
    after = datetime.now(UTC)
    skew = (theirs - (before + (after - before) / 2)).total_seconds()
    said = f"this machine's and the database's clocks are {abs(skew):.1f} s apart"
    if abs(skew) > SKEW_MAX_SECONDS + (after - before).total_seconds():
        return Finding("wrong", said, "have both keep time by NTP; beat rings by its machine's clock")
    return Finding("ok", said)
