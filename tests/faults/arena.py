"""The arena: the whole service as processes of this machine, with each server and each wire in the suite's hands.

    PostgreSQL ── to_postgres ──┐                        the suite itself (faults, host, checker) goes past the
                                ├── 3 workers, 2 beats,  proxies: `admin_url`, `host_url`, `redis_admin`
    Redis ─────── to_redis ─────┘   operators

    with Arena(state, seed=7) as arena:
        arena.workers[0].signal(signal.SIGKILL)  # its keeper starts it again within a second

Enter it from the main thread, before other threads are started: PostgreSQL's data lie on a file system that this
process and its children alone see (disk.py). The faults are in faults/, what they have in common is in looking.py.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psycopg
import redis

import settings
from embedded import instance
from embedded.folders import claim_cluster, locate, remove_tree
from tests.faults import disk
from tests.faults.processes import Keeper, Kept
from tests.faults.proxy import Proxy
from tests.faults.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from collections.abc import Sequence

WORKERS = 3
BEATS = 2
INTERVAL_SECONDS = 2
BATCH_SIZE = 20
DISK_BYTES = 4 * 2**30  # at most; memory is used for what is written alone

_SETTINGS = {
    "CREDIT_REFRESH_INTERVAL_SECONDS": str(INTERVAL_SECONDS),
    "CREDIT_REFRESH_BATCH_SIZE": str(BATCH_SIZE),
    "DATABASE_SCHEMA": "credits",
}
_READY_SECONDS = 60.0
_POLL_SECONDS = 0.05


class ArenaError(RuntimeError):
    """The arena cannot be set up. The text is one line for people."""


class Arena:
    """Everything that runs, for the `with` block.

    Args:
        state: a folder for data and logs; what an earlier arena left in it is removed.
        seed: for whoever wants to know it; the arena itself decides nothing by chance.
        broken: the guard that `tests.faults.broken` takes out of workers and beats; None: the product as it is.

    Attributes:
        workers: three, each over all queues.
        beats: two, each with a timetable file of its own.
        operators: none at first: whoever has a program for them appends what `keep()` returns.
        to_postgres: the proxy through which the service, and it alone, reaches the database.
        to_redis: the same for the broker.
        admin_url: psycopg's URL, as superuser and past the proxy.
        host_url: the host app's; no fault of the wire touches it.
        redis_admin: a client past the proxy; it raises while the server is down.
        disk: what PostgreSQL's data lie on; None where mounts are refused, and `disk_refused` says why.
    """

    def __init__(self, state: Path, *, seed: int, broken: str | None = None) -> None:
        self.seed = seed
        self.broken = broken
        self.folders = locate("faults", state, None)
        self.logs = self.folders.state / "logs"
        self._homes = self.folders.state / "homes"
        self.postgres = PostgresServer(self.folders)
        self.redis = RedisServer(self.folders)
        self.to_postgres = Proxy(self.postgres.socket)
        self.to_redis = Proxy(self.redis.socket)
        self.admin_url = self.postgres.url
        self.host_url = self.postgres.url
        self.redis_admin: redis.Redis = redis.Redis(unix_socket_path=str(self.redis.socket), socket_timeout=5)
        self.disk: disk.Disk | None = None
        self.disk_refused: str | None = None
        self.workers: list[Kept] = []
        self.beats: list[Kept] = []
        self.operators: list[Kept] = []
        self._keeper = Keeper(self.logs)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(instance.lock(self.folders.state)):
                owner = instance.owner(self.folders.state)
                raise ArenaError(f"another fault suite runs in {self.folders.state}: process {owner}")
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        for folder in (self.logs, self._homes):
            remove_tree(folder)
            folder.mkdir()
        claim_cluster(self.folders)
        self.postgres.clear_leftovers()
        try:
            self.disk = stack.enter_context(disk.mounted(self.folders.cluster, DISK_BYTES))
        except disk.RefusedError as error:
            self.disk_refused = str(error)
        for server in (self.postgres, self.redis):
            server.wipe()
            server.log.unlink(missing_ok=True)
            stack.callback(server.stop)
            server.start()
        stack.callback(self.redis_admin.close)
        stack.enter_context(self.to_postgres)
        stack.enter_context(self.to_redis)
        self.credits("db", "upgrade")
        stack.enter_context(self._keeper)
        options = ("--without-gossip", "--without-mingle")
        names = [f"worker{number}" for number in range(1, WORKERS + 1)]
        self.workers = [self._celery(name, "worker", "--hostname", f"{name}@%h", *options) for name in names]
        self.beats = [self._celery(f"beat{number}", "beat") for number in range(1, BEATS + 1)]
        for kept in self.workers:
            self._await_line(kept, b" ready.")

    def _celery(self, name: str, *arguments: str) -> Kept:
        app = "tasks" if self.broken is None else "tests.faults.broken"
        return self.keep(name, [sys.executable, "-m", "celery", "-A", app, *arguments])

    @staticmethod
    def _await_line(kept: Kept, text: bytes) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while text not in kept.log.read_bytes():
            if time.monotonic() > deadline:
                raise ArenaError(f"{kept.name} does not get ready: see {kept.log}")
            time.sleep(_POLL_SECONDS)

    def keep(self, name: str, argv: Sequence[str], **variables: str) -> Kept:
        """Run a program under the keeper, which starts it again whenever it ends.

        Args:
            name: what people call it, unique; its output goes to `logs/<name>.log`.
            argv: program and arguments, run in the checkout.
            variables: further environment variables, over the service's own.
        """
        return self._keeper.keep(name, argv, self.environment(name, **variables))

    def environment(self, name: str, **variables: str) -> dict[str, str]:
        """What a process of the service finds: both servers behind their proxies, and a state folder of its own."""
        broken = {} if self.broken is None else {"FAULTS_BREAK": self.broken}
        return settings.environment(
            DATABASE_URL=self.postgres_url(self.to_postgres),
            REDIS_URL=self.redis_url,
            CELERY_BROKER_URL=self.redis_url,  # before REDIS_URL, and before a broker of our own environment
            CREDITS_STATE_DIR=str(self._homes / name),
            **_SETTINGS,
            **broken,
            **variables,
        )

    @staticmethod
    def postgres_url(proxy: Proxy) -> str:
        """The database as it is seen through a proxy."""
        return f"postgresql://postgres@127.0.0.1:{proxy.port}/credits?sslmode=disable&gssencmode=disable"

    @property
    def redis_url(self) -> str:
        """The broker as the service sees it."""
        return f"redis://127.0.0.1:{self.to_redis.port}/0"

    def command(self, *arguments: str) -> list[str]:
        """A command line of `credits`."""
        return [str(Path(sys.executable).with_name("credits")), *arguments]

    def credits(self, *arguments: str, timeout_seconds: float = 60.0) -> str:
        """Run a command of `credits` as an operator would, through the proxies, and return what it prints.

        Raises:
            CalledProcessError: it failed; its output is in the error.
            TimeoutExpired: it took too long.
        """
        done = self.call(*arguments, timeout_seconds=timeout_seconds)
        done.check_returncode()
        return done.stdout

    def call(self, *arguments: str, timeout_seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
        """The same for a command that may fail.

        Raises:
            TimeoutExpired: it took too long.
        """
        return subprocess.run(
            self.command(*arguments),
            check=False,
            cwd=settings.CHECKOUT,
            env=self.environment("operator"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )

    def connect(self) -> psycopg.Connection[Any]:
        """A connection of the suite's own, in autocommit, past the proxy and with the schema `credits` in its path.

        Raises:
            psycopg.OperationalError: the server is down.
        """
        return psycopg.connect(self.admin_url, autocommit=True, connect_timeout=5, options="-c search_path=credits")
