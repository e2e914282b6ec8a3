"""`credits up`: the whole stack in the foreground."""

from __future__ import annotations

import secrets
import socket
from typing import TYPE_CHECKING

import click

import embedded
import settings
from cli.database import migrate
from cli.output import err
from cli.processes import Service
from cli.session import INSTANCE
from db import Database
from embedded.processes import Supervisor, unwind_on_signals

if TYPE_CHECKING:
    from embedded import Servers

API_PORT = 8000
FLOWER_PORT = 5555


@click.command()
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 64), help="Worker processes.")
@click.option("--api-port", type=click.IntRange(1, 65_535), help="Default: 8000, or any free one.")
@click.option("--flower-port", type=click.IntRange(1, 65_535), help="Default: 5555, or any free one.")
@click.pass_context
def up(ctx: click.Context, *, workers: int, api_port: int | None, flower_port: int | None) -> None:
    """Run workers, beat, the HTTP API and Flower until Ctrl-C, on embedded servers.

    The HTTP API takes ADMIN_TOKEN from the environment; without, one is made for this time and shown.

    PostgreSQL and Redis are started too, and their data kept in .state, unless DATABASE_URL and REDIS_URL (or
    CELERY_BROKER_URL) name servers of yours. Other commands given meanwhile in this checkout find these servers.

    \b
    Example, in a second terminal:
      credits users import users.csv
      credits scan --wait
    """  # noqa: D301 - \b is Click's mark for a block that is not to be wrapped
    unwind_on_signals()
    loaded = settings.load()
    port = flower_port or _free_port("--flower-port", FLOWER_PORT)
    http = api_port or _free_port("--api-port", API_PORT)
    password, token = secrets.token_urlsafe(18), secrets.token_urlsafe(24)
    own = loaded.database_url is None, loaded.broker_url is None
    with embedded.servers(INSTANCE, loaded.credits_state_dir, postgres=own[0], redis=own[1]) as running:
        servers = _with_given(running, loaded)
        migrate(Database(servers.database_url, loaded.database_schema))
        with Supervisor(watch=running.processes) as supervisor:
            service = Service(supervisor, servers)
            service.start_beat()
            for number in range(1, workers + 1):
                service.start_worker(f"worker{number}")
            service.start_webhooks()
            service.start_api(http, **({"ADMIN_TOKEN": token} if loaded.admin_token is None else {}))
            service.start_flower(port, f"credits:{password}")
            shown = "that of ADMIN_TOKEN" if loaded.admin_token is not None else f"{token}  (shown once)"
            err.print(
                f"Database  {running.database_url or 'DATABASE_URL'}\n"
                f"API       http://127.0.0.1:{http}/docs  admin token: {shown}\n"
                f"Flower    http://127.0.0.1:{port}  user credits, password {password}  (shown once; read-only)\n"
                "Ctrl-C ends it all.",
                soft_wrap=True,
                markup=False,
            )
            ended = supervisor.wait()
    if ended is not None:
        err.print(f"{ended}: everything else was stopped.", soft_wrap=True, markup=False)
        ctx.exit(1)


def _with_given(running: Servers, loaded: settings.Settings) -> Servers:
    """The servers that run, and those that the environment names."""
    return embedded.Servers(
        database_url=running.database_url or str(loaded.database_url),
        redis_url=running.redis_url or str(loaded.broker_url),
        state=running.state,
    )


def _free_port(option: str, wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise click.ClickException(f"no free port on 127.0.0.1: name one with {option}")
