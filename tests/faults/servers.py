"""The two servers, in hands that let them die and come back: over embedded/, which only starts and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg
import redis
from psycopg import sql

from embedded import leftovers, postgres_server, redis_server

if TYPE_CHECKING:
    from collections.abc import Iterable

    from embedded.folders import Folders

_GONE_SECONDS = 60.0
_READY_SECONDS = 120.0
_POLL_SECONDS = 0.05
_SHARED_MEMORY = "/dev/shm/PostgreSQL."  # noqa: S108 - PostgreSQL's


class ServerError(RuntimeError):
    """A server does not do as it is told. The text is one line for people."""


class PostgresServer:
    """PostgreSQL, as durable as in production.

    Args:
        folders: where it keeps what.

    Attributes:
        url: psycopg's, by its unix socket, as superuser.
        log: of the present start; those before it are in `logs/`.
        settings: set once more at each start, and kept.
    """

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._running: postgres_server.Postgres | None = None
        self.url = postgres_server.url(folders)
        self.socket: Path = folders.postgres_socket / ".s.PGSQL.5432"
        self.log = folders.state / "postgres.log"
        # Checkpoints in plenty: a crash finds some of them half done.
        self.settings = {"checkpoint_timeout": "30s"}

    def clear_leftovers(self) -> None:
        """Stop what a suite that was killed has left behind, Redis too."""
        accounts = [os.geteuid(), *([self._folders.account.uid] if self._folders.account else [])]
        leftovers.clear(self._folders.marker, accounts)

    def wipe(self) -> None:
        """Remove all data."""
        postgres_server.wipe(self._folders)

    @property
    def running(self) -> bool:
        """Whether its first process lives."""
        return self._running is not None and self._running.process.poll() is None

    def start(self) -> None:
        """Start it on the data that are there, unless it runs, and wait until it answers.

        Raises:
            EmbeddedError: it does not start.
        """
        if self.running:
            return
        _append(self.log, self._folders.state / "logs/postgres.log")
        self._running = postgres_server.Postgres.start(self._folders, options={}, programs=None)
        with psycopg.connect(self.url, autocommit=True) as connection:
            for name, value in self.settings.items():
                connection.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
            connection.execute("SELECT pg_reload_conf()")

    def wait_ready(self) -> None:
        """Wait until it takes connections, as after it has restarted itself.

        Raises:
            ServerError: it does not.
        """
        deadline = time.monotonic() + _READY_SECONDS
        while not (self.running and postgres_server.answers(self.url)):
            if time.monotonic() > deadline:
                raise ServerError(f"PostgreSQL does not answer: see {self.log}")
            time.sleep(_POLL_SECONDS)

    def kill(self, signum: signal.Signals) -> None:
        """Send a signal to its first process; SIGKILL hits all of its processes, and returns when they are gone."""
        process = self._process()
        if signum is not signal.SIGKILL:
            process.send_signal(signum)
            return
        first = psutil.Process(process.pid)
        first.suspend()  # lest it start others meanwhile
        family = first.children(recursive=True)
        shared = _shared_by([first, *family])
        for member in (first, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(_GONE_SECONDS)
        _, left = psutil.wait_procs(family, _GONE_SECONDS)
        if left:
            raise ServerError(f"PostgreSQL's process {left[0].pid} survives SIGKILL")
        _forget(shared, self._folders.cluster / "postgres/postmaster.pid")

    def stop_immediately(self) -> None:
        """Shut down without a checkpoint: the next start recovers from the log, as after a crash."""
        self.kill(signal.SIGQUIT)
        self._process().wait(_GONE_SECONDS)

    def stop(self) -> None:
        """Shut down in order, unless it is down already."""
        if self._running is not None:
            self._running.stop()

    def _process(self) -> subprocess.Popen[bytes]:
        if self._running is None:
            raise ServerError("PostgreSQL was never started")
        return self._running.process


class RedisServer:
    """Redis with an append-only file, synchronised each second.

    Args:
        folders: where it keeps what.

    Attributes:
        settings: of CONFIG SET, set once more at each start.
    """

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._running: redis_server.Redis | None = None
        self.socket: Path = folders.redis_socket / "redis.sock"
        self.log = folders.state / "redis.log"
        self.settings: dict[str, str] = {}

    def wipe(self) -> None:
        """Remove all data, as when a server that keeps nothing on disk ends; only while it is down."""
        redis_server.wipe(self._folders)

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._running is not None and self._running.process.poll() is None

    def start(self) -> None:
        """Start it on the data that are there, unless it runs, and wait until it answers.

        Raises:
            EmbeddedError: it does not start.
        """
        if self.running:
            return
        _append(self.log, self._folders.state / "logs/redis.log")
        self._running = redis_server.Redis.start(self._folders)
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            for name, value in self.settings.items():
                client.config_set(name, value)

    def wait_ready(self) -> None:
        """Wait until it takes commands.

        Raises:
            ServerError: it does not.
        """
        deadline = time.monotonic() + _READY_SECONDS
        while not (self.running and redis_server.answers(self._folders)):
            if time.monotonic() > deadline:
                raise ServerError(f"Redis does not answer: see {self.log}")
            time.sleep(_POLL_SECONDS)

    def kill(self, signum: signal.Signals) -> None:
        """Send a signal; SIGKILL takes effect before this returns."""
        process = self._process()
        process.send_signal(signum)
        if signum is signal.SIGKILL:
            process.wait(_GONE_SECONDS)

    def stop_immediately(self) -> None:
        """End it at once; what was not synchronised yet is lost."""
        self.kill(signal.SIGKILL)

    def stop(self) -> None:
        """Shut down in order, unless it is down already."""
        if self._running is not None:
            self._running.stop()

    def _process(self) -> subprocess.Popen[bytes]:
        if self._running is None:
            raise ServerError("Redis was never started")
        return self._running.process


def _append(log: Path, to: Path) -> None:
    """Keep a log that the next start puts aside."""
    if log.exists():
        with to.open("ab") as file:
            file.write(log.read_bytes())


def _shared_by(family: Iterable[psutil.Process]) -> set[Path]:
    shared: set[Path] = set()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            shared.update(Path(part.path) for part in member.memory_maps() if part.path.startswith(_SHARED_MEMORY))
    return shared


def _forget(shared: Iterable[Path], note: Path) -> None:
    """Remove the shared memory of a server that was killed, as its machine would have: the next start looks for none.

    Args:
        shared: the files that it had mapped.
        note: its postmaster.pid, whose seventh line names the segment that keeps others off its data.
    """
    for file in shared:
        file.unlink(missing_ok=True)
    segment = note.read_text().splitlines()[6].split()[1]
    subprocess.run(["ipcrm", "--shmem-id", segment], check=True)
