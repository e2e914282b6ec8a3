"""The most memory that processes and the broker take while something runs."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Event
from typing import TYPE_CHECKING, Any

import psutil

from celeryconfig import QueueNames
from tasks.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

SCAN = "scan"
WORKER = "worker"
BACKEND = "PostgreSQL backend"
REDIS = "Redis"
QUEUE = "messages"
KINDS = (SCAN, WORKER, BACKEND, REDIS, QUEUE)

_INTERVAL_SECONDS = 0.05
_MB = 1e6


@contextmanager
def sampled() -> Iterator[dict[str, float]]:
    """Peaks while the block runs, read every 50 ms: MB of the largest process of each kind, and messages that wait.

    Processes are our children: a PostgreSQL that somebody else has started is not among them. A process's memory is
    its resident one, a backend's without the buffers that all of them share; Redis tells its own.
    """
    peaks: dict[str, float] = defaultdict(float)
    ended = Event()
    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(_sample, peaks, ended)
        try:
            yield peaks
        finally:
            ended.set()
        sampling.result()


def _sample(peaks: dict[str, float], ended: Event) -> None:
    with app.connection_for_read() as broker:
        channel: Any = broker.default_channel
        redis = channel.client
        while not ended.wait(_INTERVAL_SECONDS):
            found = [*_processes(), (REDIS, redis.info("memory")["used_memory"] / _MB)]
            found.append((QUEUE, sum(redis.llen(queue) for queue in QueueNames.WORK)))
            for kind, value in found:
                peaks[kind] = max(peaks[kind], value)


def _processes() -> Iterator[tuple[str, float]]:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            command = " ".join(process.cmdline())
            memory: Any = process.memory_info()
            if "spawn_main" in command:
                yield SCAN, memory.rss / _MB
            elif command.startswith("postgres:"):  # before the next: it has parallel workers
                yield BACKEND, (memory.rss - memory.shared) / _MB
            elif " worker " in command:
                yield WORKER, memory.rss / _MB
