"""Rate limits: exact in each storage, shared by processes, and in nobody's way when Redis is."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import redis
from structlog.testing import capture_logs

from api import limits
from api.limits import Limiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from embedded import Servers
    from tests.acceptance.nodes import Launcher

NOBODY = "redis://:s3cret@127.0.0.1:1/0"


@pytest.fixture
def name() -> str:
    """A caller whom no other test knows."""
    return f"api:user:{uuid4()}"


@pytest.fixture(params=["redis", "memory", "rabbitmq"])
def url(request: pytest.FixtureRequest, servers: Servers) -> str | None:
    urls: dict[str, str | None] = {
        "redis": servers.redis_url,
        "memory": None,
        "rabbitmq": "amqp://a:b@mq1/;amqp://mq2/",
    }
    return urls[request.param]


def test_so_many_in_the_window_and_then_the_seconds_to_wait(url: str | None, name: str) -> None:
    limiter = Limiter("3/second", url)
    began = time.monotonic()
    assert [limiter.hit(name) for _ in range(3)] == [None, None, None]
    wait = limiter.hit(name)
    assert wait is not None
    assert 0 < wait <= 1
    assert limiter.hit(f"{name}-other") is None
    # Asking again does not put it off: refused requests do not count.
    time.sleep(wait / 2)
    assert limiter.hit(name) is not None
    time.sleep(wait / 2 + 0.02)
    assert limiter.hit(name) is None
    assert time.monotonic() - began > 1


def test_the_window_moves(url: str | None, name: str) -> None:
    """At no instant more than so many lie behind: not twice as many around a full second."""
    limiter = Limiter("4/second", url)
    taken: list[float] = []
    ends = time.monotonic() + 2.5
    while time.monotonic() < ends:
        at = time.monotonic()
        if limiter.hit(name) is None:
            taken.append(at)
        time.sleep(0.01)
    assert 8 <= len(taken) <= 12
    # Ours is the time before the request, theirs that during it.
    assert [late - early for early, late in zip(taken, taken[4:], strict=False) if late - early < 0.95] == []


def test_none_is_let_through_too_many_by_requests_at_once(url: str | None, name: str) -> None:
    limiters = [Limiter("50/minute", url)] * 4
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda number: limiters[number % 4].hit(name), range(400)))
    assert answers.count(None) == 50
    assert all(0 < wait <= 60 for wait in answers if wait is not None)


def test_processes_share_the_count_in_redis(servers: Servers, name: str) -> None:
    first, second = (Limiter("2/minute", servers.redis_url) for _ in range(2))
    assert first.hit(name) is None
    assert second.hit(name) is None
    assert first.hit(name) is not None
    assert second.hit(name) is not None


def test_callers_who_are_gone_are_forgotten(servers: Servers, name: str) -> None:
    limiter = Limiter("5/second", servers.redis_url)
    limiter.hit(name)
    client: redis.Redis = redis.Redis(connection_pool=limits.connections(servers.redis_url))
    (key,) = client.scan_iter(f"{limits.KEY_PREFIX}:*{name}*")
    assert 0 < client.pttl(key) <= 1_000
    here = Limiter("5/second", None)
    for number in range(1_000):
        here.hit(f"{name}-{number}")
    time.sleep(1.05)
    here.hit(name)
    assert list(vars(here._window)["_windows"]) == [name]  # noqa: SLF001 - what it remembers shows nowhere else


# --- Redis in all its forms ------------------------------------------------------------------------------------------


def test_a_redis_with_a_password_and_a_number(launcher: Launcher, name: str) -> None:
    node = launcher.redis()
    node.lock("p@ss/wörd")
    limiter = Limiter("1/minute", f"redis://:p%40ss%2Fw%C3%B6rd@127.0.0.1:{node.port}/3")
    assert limiter.hit(name) is None
    assert limiter.hit(name) is not None
    client: redis.Redis = redis.Redis(port=node.port, db=3, password="p@ss/wörd")  # noqa: S106 - the test's own
    assert len(list(client.scan_iter(f"{limits.KEY_PREFIX}:*"))) == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", {"host": "127.0.0.1", "port": 6_379, "db": 0, "username": None, "password": None}),
        ("redis://redis", {"host": "redis"}),
        ("redis://app:se%2Fcret@redis:6380/7?visibility_timeout=5",
         {"host": "redis", "port": 6_380, "db": 7, "username": "app", "password": "se/cret"}),
        ("redis://[::1]:6380/", {"host": "::1", "db": 0}),
        ("redis+socket:///run/my%20redis.sock?virtual_host=4", {"path": "/run/my redis.sock", "db": 4}),
        ("redis+socket:///run/redis.sock?virtual_host=/4", {"db": 4}),
        ("redis+socket://:secret@/run/redis.sock", {"path": "/run/redis.sock", "password": "secret", "db": 0}),
        ("rediss://redis:6380/1", {"port": 6_380, "db": 1, "ssl_cert_reqs": "required", "ssl_check_hostname": True}),
        ("rediss://redis/1?ssl_cert_reqs=CERT_NONE", {"ssl_cert_reqs": "none"}),
        ("rediss://redis/1?ssl_cert_reqs=optional&ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=False",
         {"ssl_cert_reqs": "optional", "ssl_ca_certs": "/etc/ca.pem", "ssl_check_hostname": False}),
    ],
)  # fmt: skip
def test_it_reads_a_url_as_celery_does(url: str, expected: dict[str, Any]) -> None:
    pool = limits.connections(url)
    assert expected.items() <= pool.connection_kwargs.items()
    kinds = {"redis": redis.Connection, "rediss": redis.SSLConnection, "redis+socket": redis.UnixDomainSocketConnection}
    assert type(pool.make_connection()) is kinds[url.partition("://")[0]]


# --- availability before limits --------------------------------------------------------------------------------------


def stopped(launcher: Launcher) -> None:
    launcher.processes[0].kill("SIGSTOP")


def killed(launcher: Launcher) -> None:
    launcher.processes[0].kill()


def full(launcher: Launcher) -> None:
    redis.Redis(port=_port(launcher)).config_set("maxmemory", "1")


def locked(launcher: Launcher) -> None:
    client: redis.Redis = redis.Redis(port=_port(launcher))
    client.config_set("requirepass", "another")
    client.client_kill_filter(_type="normal", skipme=True)


def _port(launcher: Launcher) -> int:
    argv = vars(launcher.processes[0])["_argv"]
    return int(argv[argv.index("--port") + 1])


@pytest.mark.parametrize("breaks", [stopped, killed, full, locked])
def test_a_redis_that_does_not_serve_lets_everybody_through_at_once(
    launcher: Launcher, name: str, breaks: Callable[[Launcher], None]
) -> None:
    limiter = Limiter("1/minute", launcher.redis().url)
    assert limiter.hit(name) is None
    assert limiter.hit(name) is not None
    breaks(launcher)
    began = time.monotonic()
    with capture_logs() as logged:
        assert [limiter.hit(f"{name}-other") for _ in range(200)] == [None] * 200
    assert time.monotonic() - began < 3 * limits.REDIS_TIMEOUT_SECONDS
    (line,) = logged
    assert line["event"] == "[CreditRefresh] Redis does not answer: requests are not limited"
    assert "\n" not in line["error"]


def test_once_it_answers_the_limit_holds_again(launcher: Launcher, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REDIS_PAUSE_SECONDS", 0.2)
    limiter = Limiter("1/minute", launcher.redis().url)
    assert limiter.hit(name) is None
    stopped(launcher)
    with capture_logs() as logged:
        for _ in range(3):
            assert limiter.hit(name) is None
            time.sleep(0.25)
    assert len(logged) == 1  # a minute has not passed
    launcher.processes[0].kill("SIGCONT")
    assert limiter.hit(name) is not None


def test_connections_that_redis_has_closed_are_no_outage(launcher: Launcher, name: str) -> None:
    node = launcher.redis()
    limiter = Limiter("1/minute", node.url)
    assert limiter.hit(name) is None
    redis.Redis(port=node.port).client_kill_filter(_type="normal", skipme=True)
    with capture_logs() as logged:
        assert limiter.hit(name) is not None
    assert logged == []


def test_the_next_of_several_takes_over(servers: Servers, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REDIS_PAUSE_SECONDS", 0.1)
    limiter = Limiter("1/minute", f"{NOBODY};{servers.redis_url}")
    with capture_logs() as logged:
        assert limiter.hit(name) is None
    assert "s3cret" not in str(logged)
    time.sleep(0.15)
    assert limiter.hit(name) is None
    assert limiter.hit(name) is not None


def test_nothing_is_asked_of_redis_at_the_start() -> None:
    with capture_logs() as logged:
        Limiter("1/minute", NOBODY)
    assert logged == []
