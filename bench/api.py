"""The HTTP API: requests per second and latencies of one process, beside the same statements without HTTP."""

from __future__ import annotations

import http.client
import secrets
import socket
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import click
import jwt

from bench.load import Call, Load, apart, call_database, call_http, request
from bench.report import benchmark
from bench.worlds import Worlds, verify
from cli.output import err
from cli.processes import Service
from embedded import Servers
from embedded.processes import Supervisor
from refresh import runs
from refresh.at_once import do_at_once
from refresh.single import open_single, read_single
from refresh.verdict import explain_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg

PATIENCE_SECONDS = 60.0
WARM_UP = 200
"""Requests before the first one that counts: threads, connections and prepared statements are there then."""
TOKEN_SECONDS = 86_400

_BARE_READ = "next-refresh, the bare SQL"
_BARE_REFRESH = "single refresh, the bare SQL"
_SECRETS = {"ADMIN_TOKEN": secrets.token_hex(16), "JWT_SECRET": secrets.token_hex(32)}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is asked."""

    users: int
    requests: int
    connections: int

    def user(self, number: int) -> int:
        """Whom the request of this number is about."""
        return number % self.users + 1


@dataclass(frozen=True, slots=True)
class Way:
    """One way of asking.

    Attributes:
        name: of the row.
        ask: does it in the database of that URL.
        refreshes: each user is refreshed by a run of their own.
        yardstick: the way that its ratio is to, perhaps itself; None: it has none.
    """

    name: str
    ask: Callable[[str], Load]
    refreshes: bool = False
    yardstick: str | None = None


@click.command()
@click.option("--users", default=2_000, show_default=True, type=click.IntRange(10), help="Each refreshed alone once.")
@click.option("--requests", default=10_000, show_default=True, type=click.IntRange(10), help="Of what only reads.")
@click.option("--connections", default=8, show_default=True, type=click.IntRange(1, 10), help="Busy at the same time.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each way, interleaved.")
def api(users: int, requests: int, connections: int, repetitions: int) -> None:
    """One uvicorn process on loopback, as `credits up` starts it, beside psycopg on as many connections.

    It shares the machine with PostgreSQL, Redis and the client, whose own load is in the table. The rate limit is out
    of reach, and counted in Redis as ever.
    """
    sizes = Sizes(users, requests, connections)
    with benchmark("api") as (running, report):
        worlds = Worlds(running, users, name="api")
        ways = _ways(running, sizes)
        loads = _measure(worlds, ways, repetitions)
        title = f"One API process, {connections} connections, {users:,} users, medians of {repetitions}"
        report.table(title, [_row(way, loads) for way in ways])
        rates = {name: statistics.median(load.per_second for load in found) for name, found in loads.items()}
        report.bars("rates", title, "requests per second", rates)
        report.figures("sizes", asdict(sizes))
        report.figures("loads", {name: [_facts(load) for load in found] for name, found in loads.items()})


def _ways(running: Servers, sizes: Sizes) -> list[Way]:
    def over_http(calls: list[Call], url: str) -> Load:
        with _api(running, url) as port:
            alive = Call(request("GET", "/healthz"), b"alive")
            warm = [_next_refresh(sizes.user(n)) for n in range(WARM_UP)] + [alive] * WARM_UP
            apart(call_http, port, warm, sizes.connections)
            return apart(call_http, port, calls, sizes.connections)

    def bare(call: Callable[[psycopg.Connection[Any], int], None], numbers: list[int], url: str) -> Load:
        return apart(call_database, url, call, numbers, sizes.connections)

    readers = [sizes.user(n) for n in range(sizes.requests)]
    everybody = list(range(1, sizes.users + 1))
    alive = [Call(request("GET", "/healthz"), b"alive")] * sizes.requests
    return [
        Way(_BARE_READ, partial(bare, _explain, readers), yardstick=_BARE_READ),
        Way("GET next-refresh", partial(over_http, list(map(_next_refresh, readers))), yardstick=_BARE_READ),
        Way(_BARE_REFRESH, partial(bare, _refresh, everybody), refreshes=True, yardstick=_BARE_REFRESH),
        Way(
            "POST refresh-credits",
            partial(over_http, list(map(_refresh_credits, everybody))),
            refreshes=True,
            yardstick=_BARE_REFRESH,
        ),
        Way("GET /healthz: HTTP alone", partial(over_http, alive)),
    ]


def _measure(worlds: Worlds, ways: list[Way], repetitions: int) -> dict[str, list[Load]]:
    loads: dict[str, list[Load]] = {way.name: [] for way in ways}
    for repetition in range(1, repetitions + 1):
        for way in ways:
            with worlds.copy() as url:
                load = way.ask(url)
                if way.refreshes:
                    verify(url, worlds.users, alone=True)
            loads[way.name].append(load)
            err.print(f"{repetition}/{repetitions}  {way.name}: {load.per_second:,.0f}/s", highlight=False)
    return loads


@contextmanager
def _api(running: Servers, url: str) -> Iterator[int]:
    """One process of it on a database, ready; gives its port."""
    servers = Servers(database_url=url, redis_url=running.redis_url, state=running.state)
    port = _free_port()
    with Supervisor() as supervisor:
        service = Service(
            supervisor, servers, logs=running.state, LOG_FORMAT="json", API_RATE_LIMIT="100000/second", **_SECRETS
        )
        service.start_api(port)
        _until_ready(supervisor, port)
        yield port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until_ready(supervisor: Supervisor, port: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _is_ready(port):
        ended = supervisor.check()
        if ended is not None or time.monotonic() > deadline:
            raise SystemExit(f"the API does not get ready: {ended or 'no end in sight'}")
        time.sleep(0.05)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def _next_refresh(number: int) -> Call:
    """User `number` began with number % 1000 credits (worlds.py)."""
    claims = {"sub": f"user-{number}", "aud": "credits", "exp": int(time.time()) + TOKEN_SECONDS}
    token = jwt.encode(claims, _SECRETS["JWT_SECRET"], algorithm="HS256")
    wanted = f'"creditBalance":{number % 1000},'.encode()
    return Call(request("GET", "/api/user/credits/next-refresh", token), wanted)


def _refresh_credits(number: int) -> Call:
    path = f"/api/admin/users/user-{number}/refresh-credits"
    return Call(request("POST", path, _SECRETS["ADMIN_TOKEN"]), b'"outcome":"refreshed"')


def _explain(connection: psycopg.Connection[Any], number: int) -> None:
    """What `next-refresh` asks."""
    if explain_user(connection, f"user-{number}").credit_balance != number % 1000:
        raise SystemExit(f"user-{number} has other credits than they began with")


def _refresh(connection: psycopg.Connection[Any], number: int) -> None:
    """What `refresh-credits` does."""
    user = f"user-{number}"
    run = open_single(connection, runs.Request("cli", "bench", 100), explain_user(connection, user))
    if isinstance(run, runs.NotOpened):
        raise SystemExit(run.text)
    left = do_at_once(connection, run.run_id)
    outcome = read_single(connection, run, user, left).outcome
    if outcome != "refreshed":
        raise SystemExit(f"{user} is not refreshed, but {outcome}: {left}")


def _row(way: Way, loads: dict[str, list[Load]]) -> dict[str, object]:
    found = loads[way.name]
    rates = [load.per_second for load in found]
    ratio = ""
    if way.yardstick:
        limits = [load.per_second for load in loads[way.yardstick]]
        ratio = f"{statistics.median(rate / limit for rate, limit in zip(rates, limits, strict=True)):.2f}"
    return {
        "way": way.name,
        "requests/s": f"{statistics.median(rates):,.0f}",
        "slowest to fastest": f"{min(rates):,.0f} to {max(rates):,.0f}",
        "p50 ms": f"{statistics.median(load.percentile_ms(50) for load in found):.1f}",
        "p99 ms": f"{statistics.median(load.percentile_ms(99) for load in found):.1f}",
        "ratio": ratio,
        "CPU of who asks": f"{statistics.median(load.cpu_seconds / load.seconds for load in found):.0%}",
    }


def _facts(load: Load) -> dict[str, float]:
    return {
        "per_second": load.per_second,
        "p50_ms": load.percentile_ms(50),
        "p99_ms": load.percentile_ms(99),
        "cpu_seconds": load.cpu_seconds,
        "seconds": load.seconds,
    }
