"""A private RabbitMQ on loopback, of Debian's package: for the benchmark of brokers and its acceptance test.

Nothing of it is the machine's own: not its service, its folders, its ports, its account or its cookie. Not for
production.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from typing import TYPE_CHECKING, Self

import amqp

from embedded.errors import EmbeddedError
from embedded.processes import spawn, stop

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

PACKAGE = "rabbitmq-server"
START_SECONDS = 60.0
_POLL_SECONDS = 0.1
# Debian's program of that name on PATH runs as the account `rabbitmq` in that account's folders alone; this is the
# script behind it.
_PROGRAMS = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server")


class RabbitMQ:
    """A broker that starts with the `with` block and is gone after it.

    Args:
        folder: for its queues, cookie and logs; made when it is not there.

    Raises:
        EmbeddedError: there is no RabbitMQ here, or it does not start.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {name: _free_port() for name in ("amqp", "distribution", "epmd")}
        self._log = folder / "rabbitmq.log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.url = f"amqp://guest:guest@127.0.0.1:{self._ports['amqp']}//"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, also after a `stop()`: with the queues that it had, at the same address."""
        program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
        if program is None:
            raise EmbeddedError(f"no RabbitMQ is installed: apt-get install {PACKAGE}")
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "plugins").write_text("[].\n")
        (self._folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self._ports['amqp']}\n")
        # Erlang's directory of nodes. Left to itself, RabbitMQ would start one for all addresses, and leave it behind.
        epmd = ["epmd", "-address", "127.0.0.1", "-port", str(self._ports["epmd"])]
        try:
            with self._log.open("ab") as log:
                for argv in (epmd, [program]):
                    child = spawn(argv, env=self._environment(), cwd=self._folder, stdout=log)
                    self._processes.append(child)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it as an operator does, and within 20 s."""
        while self._processes:
            stop(self._processes.pop(), ((signal.SIGTERM, 20.0),))

    def _environment(self) -> dict[str, str]:
        folder = str(self._folder)
        return {
            "PATH": f"{os.defpath}:/usr/sbin",
            "LC_ALL": "C.UTF-8",
            "HOME": folder,  # of the cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._ports["epmd"]),
            "RUNNING_UNDER_SYSTEMD": "true",  # no shell in between: our signals reach RabbitMQ itself
            "RABBITMQ_NODENAME": "credits@localhost",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_DIST_PORT": str(self._ports["distribution"]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with amqp.Connection(f"127.0.0.1:{self._ports['amqp']}", connect_timeout=5):
                    return
            except (amqp.exceptions.AMQPError, OSError) as error:
                ended = self._processes[-1].poll() is not None
                if ended or time.monotonic() > deadline:
                    last = self._log.read_text(errors="replace").strip().splitlines()[-5:]
                    raise EmbeddedError(f"RabbitMQ does not start ({error}): {' | '.join(last)}") from error
            time.sleep(_POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
