"""pytest-celery without Docker: each of its "containers" is a process of this machine, and runs the real service.

pytest-celery asks little of docker-py: start, stop, kill, status and logs. `LocalProcess` answers that for a child
process; the node classes add a command each. Not for other kinds of test: those call the code itself.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest
import redis
from pytest_celery import CeleryTestContainer, CeleryTestNode, CeleryWorkerContainer, RedisContainer

from embedded.processes import spawn, stop
from embedded.redis_server import find_program
from settings import CHECKOUT

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence
    from pathlib import Path

START_SECONDS = 30.0
POLL_SECONDS = 0.02

FLOWER_CREDENTIALS = "credits:acceptance"


class LocalProcess:
    """The part of docker-py's Container that pytest-celery calls, over a child process.

    Args:
        name: what people call it, unique within a test.
        argv: program and arguments; `%h` stands for the node's hostname, as Celery writes it.
        env: its whole environment.
        cwd: its working folder.
        logs: a folder for its output: one file for each start.
    """

    # Empty maps: there is no network of containers whose addresses somebody could wait for.
    attrs: ClassVar[dict[str, Any]] = {
        "Config": {"Hostname": "127.0.0.1", "Env": []},
        "HostConfig": {"PortBindings": {}},
        "NetworkSettings": {"Networks": {}, "Ports": {}},
    }

    def __init__(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, logs: Path) -> None:
        self.id = uuid.uuid4().hex
        self.name = name
        self.starts = 0
        self._argv = [argument.replace("%h", self.hostname) for argument in argv]
        self._env = env
        self._cwd = cwd
        self._folder = logs
        self.process = self._start()

    @property
    def hostname(self) -> str:
        """What Docker makes of a container's id, and pytest-celery expects in a worker's name."""
        return self.id[:12]

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        with self._log(self.starts).open("ab") as output:
            return spawn(self._argv, env=self._env, cwd=self._cwd, stdout=output)

    def _log(self, start: int) -> Path:
        return self._folder / f"{self.name}.{start}.log"

    @property
    def status(self) -> str:
        """In Docker's words."""
        return "running" if self.process.poll() is None else "exited"

    def reload(self) -> None:
        """Nothing is cached."""

    def logs(self) -> bytes:
        """The output since the last start: an earlier one's would hold a "ready" of its own."""
        return self._log(self.starts).read_bytes()

    def all_logs(self) -> str:
        """The output of all starts, for people."""
        texts = (self._log(number + 1).read_text(errors="replace") for number in range(self.starts))
        return "--- started again ---\n".join(texts)

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal; SIGKILL, which also ends what the process forked, takes effect before this returns."""
        number = _signal_number(signal)
        if self.process.poll() is not None:
            return  # its number may be another's by now
        if number == _signal_number(None):
            stop(self.process, ())
        else:
            self.process.send_signal(number)

    def stop(self, timeout: float = 10) -> None:
        """Ask it to stop, then kill it."""
        if self.process.poll() is None:
            stop(self.process, ((signal.SIGTERM, timeout),))

    def restart(self, timeout: float = 10) -> None:
        """Stop it and start it again under the same name."""
        self.stop(timeout)
        self.process = self._start()


def _signal_number(wanted: str | int | None) -> signal.Signals:
    if isinstance(wanted, str):
        return signal.Signals[wanted]
    return signal.SIGKILL if wanted is None else signal.Signals(wanted)


class _Quick:
    """pytest-celery looks once a second, and for a minute and a half at a process that is gone; this looks closer."""

    ready_prompt: str | None = None
    name: str
    status: str
    _container: LocalProcess

    def _wait_ready(self, timeout: float = START_SECONDS) -> bool:
        if self.ready_prompt is not None:
            self.wait_for(self.ready_prompt, timeout)
        return True

    def wait_for(self, text: str, timeout: float = START_SECONDS) -> None:
        """Until the log has this text; a process that ends will not write it any more."""
        deadline = time.monotonic() + timeout
        while text not in self.logs():
            if self.status == "exited" or time.monotonic() > deadline:
                pytest.fail(f"{self.name} ({self.status}) did not log {text!r}")
            time.sleep(POLL_SECONDS)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; a signal's number, negative, when that ended it."""
        code: int | None = self._container.process.poll()
        return code

    def logs(self) -> str:
        return super().logs()  # type: ignore[misc, no-any-return] # the container's, mixed in after this


# The plugin ships no types: to mypy its classes are Any, hence the ignores below.
class LocalRedis(_Quick, RedisContainer):  # type: ignore[misc]
    """The broker. It keeps nothing on disk: stopped, it has lost all messages, which is the worst that can happen."""

    ready_prompt = "Ready to accept connections"
    port: int = 0
    password: str = ""

    def lock(self, password: str) -> None:
        """Have it ask for a password, which is nobody's argument."""
        redis.Redis(port=self.port).config_set("requirepass", password)
        self.password = password

    @classmethod
    def arguments(cls, port: int) -> list[str]:
        """The plugin's own command line, on loopback alone."""
        return [str(find_program()), *cls.command()[1:], "--bind", "127.0.0.1", "--port", str(port)]

    @property
    def url(self) -> str:
        """Of the broker; it is the same inside and outside."""
        login = f":{self.password}@" if self.password else ""
        return f"{self.prefix()}{login}127.0.0.1:{self.port}/{self.vhost}"

    host_url = url


class LocalWorker(_Quick, CeleryWorkerContainer):  # type: ignore[misc]
    """A worker as `credits up` and docker-compose.yml start it."""

    def __init__(self, container: LocalProcess) -> None:
        super().__init__(container)
        # In full: a mere "ready." would also be found in "already.".
        self.ready_prompt = f"{self.worker_name()}@{container.hostname} ready."

    @classmethod
    def worker_name(cls) -> str:
        """Celery's name for it is `worker@` and the container's id."""
        return "worker"

    @classmethod
    def command(cls, *args: str, **_options: object) -> list[str]:
        """The real app, in place of the plugin's sample app."""
        return celery("worker", f"--hostname={cls.worker_name()}@%h", "--without-gossip", "--without-mingle", *args)


class LocalBeat(_Quick, CeleryTestContainer):  # type: ignore[misc]
    """Beat."""

    ready_prompt = "beat: Starting..."


class LocalFlower(_Quick, CeleryTestContainer):  # type: ignore[misc]
    """Flower, for looking only."""

    ready_prompt = "Connected to redis://"
    port: int = 0


class LocalApi(_Quick, CeleryTestContainer):  # type: ignore[misc]
    """The HTTP API: one uvicorn process."""

    ready_prompt = "Uvicorn running on"
    port: int = 0

    @property
    def url(self) -> str:
        """Of its root."""
        return f"http://127.0.0.1:{self.port}"

    def all_logs(self) -> str:
        """What it has written, all starts together."""
        return self._container.all_logs()


def celery(*arguments: str) -> list[str]:
    """The command line of one of the service's processes."""
    return [sys.executable, "-m", "celery", "-A", "tasks", *arguments]


Node = TypeVar("Node", LocalRedis, LocalWorker, LocalBeat, LocalFlower, LocalApi)


class Launcher:
    """Starts a test's processes and takes them down at its end.

    Args:
        folder: of the test's own, for logs and state folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[LocalProcess] = []

    def redis(self) -> LocalRedis:
        """A broker on a free port of its own."""
        port = free_port()
        raw = self._run("redis", LocalRedis.arguments(port), env={}, cwd=self.folder)
        node = LocalRedis(raw)
        node.port = port
        return _ready(node)

    def worker(self, env: Mapping[str, str], command: Sequence[str] | None = None) -> LocalWorker:
        """One more worker."""
        number = sum(process.name.startswith("worker") for process in self.processes) + 1
        return _ready(LocalWorker(self._run(f"worker{number}", command or LocalWorker.command(), env=env)))

    def beat(self, env: Mapping[str, str], name: str = "beat") -> CeleryTestNode:
        """One more beat."""
        return CeleryTestNode(_ready(LocalBeat(self._run(name, celery("beat"), env=env))))

    def flower(self, env: Mapping[str, str]) -> LocalFlower:
        """Flower as `credits up` starts it."""
        port = free_port()
        arguments = ("flower", "--address=127.0.0.1", f"--port={port}", "--read-only", "--purge-offline-workers=10")
        node = LocalFlower(
            self._run("flower", celery(*arguments), env={**env, "FLOWER_BASIC_AUTH": FLOWER_CREDENTIALS})
        )
        node.port = port
        return _ready(node)

    def api(self, env: Mapping[str, str]) -> LocalApi:
        """The HTTP API on a free port."""
        number = sum(process.name.startswith("api") for process in self.processes) + 1
        port = free_port()
        options = ("--no-access-log", "--no-server-header", "--timeout-graceful-shutdown=1")
        argv = [sys.executable, "-m", "uvicorn", "api:app", f"--port={port}", *options]
        node = LocalApi(self._run(f"api{number}", argv, env=env))
        node.port = port
        return _ready(node)

    def _run(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path = CHECKOUT) -> LocalProcess:
        process = LocalProcess(name, argv, env=env, cwd=cwd, logs=self.folder)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """Kill all: how they end of their own accord is a test's business, not every test's."""
        for process in reversed(self.processes):
            process.kill()


def _ready(node: Node) -> Node:
    node.ready()
    return node


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
