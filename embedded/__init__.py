"""A real PostgreSQL and a real Redis on this machine, for as long as a command runs.

For `credits demo`, `credits up`, the tests, the benchmark, and every command on a machine where neither
DATABASE_URL nor REDIS_URL is set. Not for production: nothing backs these servers up, nothing restarts
them, and one account of one machine alone can reach them.

    with embedded.servers("up", settings.credits_state_dir, share=True) as running:
        connect(running.database_url)
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import settings
from embedded import instance, leftovers, postgres_server, redis_server
from embedded.errors import EmbeddedError
from embedded.folders import Folders, claim_cluster, locate, remove_tree
from embedded.postgres_server import FLEETING
from embedded.processes import uninterrupted

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["FLEETING", "EmbeddedError", "Servers", "remove", "servers"]

_SHARE_SECONDS = 60.0  # how long to wait for an owner that is starting or stopping
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the servers of an instance answer. A URL is empty when that server was not asked for."""

    database_url: str
    """libpq's form: postgresql://postgres@/credits?host=/folder/of/the/socket."""
    redis_url: str
    """kombu's form: redis+socket:///path/of/the/socket?virtual_host=0."""
    state: Path
    """The instance's own folder: logs, data, and room for files of the command that runs on it."""
    processes: Mapping[str, subprocess.Popen[bytes]] = field(
        default_factory=lambda: MappingProxyType({}), repr=False, compare=False
    )
    """The server processes by name, for `Supervisor(watch=...)`; empty when another command runs them."""


@contextlib.contextmanager
def servers(  # noqa: PLR0913 - each is a switch of its own, named by every caller
    name: str,
    state_dir: Path,
    *,
    postgres: bool = True,
    redis: bool = True,
    fresh: bool = False,
    postgres_options: Mapping[str, str] = MappingProxyType({}),
    share: bool = False,
    postgres_programs: Path | None = None,
) -> Iterator[Servers]:
    """Run the servers of an instance for the block, or find them running.

    Start it from the main thread: then the servers stop even when this process is killed. The database
    `credits` exists, empty at first; data last until the next start with `fresh`. Call
    `processes.unwind_on_signals()` before, so that SIGTERM stops them too.

    Args:
        name: of the instance, such as 'up' or 'demo'.
        state_dir: the folder that holds the instances.
        postgres: start PostgreSQL.
        redis: start Redis.
        fresh: begin with no data.
        postgres_options: settings of PostgreSQL that differ from ours, by name; for tests, `FLEETING`.
        share: when another process runs the instance, yield its servers without owning them.
        postgres_programs: the `bin` folder of another PostgreSQL than the embedded one.

    Raises:
        EmbeddedError: a server does not start, or the instance is in use and cannot be shared.
    """
    folders = locate(name, state_dir, settings.environment().get("XDG_RUNTIME_DIR"))
    deadline = time.monotonic() + _SHARE_SECONDS
    while True:
        with instance.lock(folders.state) as owned:
            if owned:
                with _own(
                    folders,
                    postgres=postgres,
                    redis=redis,
                    fresh=fresh,
                    options=postgres_options,
                    programs=postgres_programs,
                ) as running:
                    yield running
                return
        holder = f"process {instance.owner(folders.state)}"
        if fresh or not share:
            raise EmbeddedError(f"the embedded servers '{name}' in {state_dir} are in use by {holder}: stop it first")
        found = _find_running(folders, postgres=postgres, redis=redis)
        if found is not None:
            yield found
            return
        if time.monotonic() > deadline:
            raise EmbeddedError(f"{holder} holds {folders.state}, but its servers do not answer: stop it first")
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _own(  # noqa: PLR0913 - servers()'s own arguments
    folders: Folders,
    *,
    postgres: bool,
    redis: bool,
    fresh: bool,
    options: Mapping[str, str],
    programs: Path | None,
) -> Iterator[Servers]:
    claim_cluster(folders)
    _clear_leftovers(folders)
    if fresh:
        postgres_server.wipe(folders)
        redis_server.wipe(folders)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_socket_folders, folders)
        urls = {"database_url": "", "redis_url": ""}
        processes: dict[str, subprocess.Popen[bytes]] = {}
        if postgres:
            database = postgres_server.Postgres.start(folders, options=options, programs=programs)
            stack.callback(_stop, database)
            urls["database_url"] = database.url
            processes["postgres"] = database.process
        if redis:
            broker = redis_server.Redis.start(folders)
            stack.callback(_stop, broker)
            urls["redis_url"] = broker.url
            processes["redis"] = broker.process
        instance.announce(folders.state, urls)
        stack.callback(instance.withdraw, folders.state)
        yield Servers(**urls, state=folders.state, processes=MappingProxyType(processes))


def _stop(server: postgres_server.Postgres | redis_server.Redis) -> None:
    with uninterrupted():
        server.stop()


def _find_running(folders: Folders, *, postgres: bool, redis: bool) -> Servers | None:
    """The servers that another process runs; None while they do not answer (yet)."""
    note = instance.read_note(folders.state)
    if note is None:
        return None
    for wanted, url, what in ((postgres, note["database_url"], "PostgreSQL"), (redis, note["redis_url"], "Redis")):
        if wanted and not url:
            raise EmbeddedError(f"process {note['pid']} runs '{folders.state.name}' without {what}: stop it first")
    if (postgres and not postgres_server.answers(note["database_url"])) or (
        redis and not redis_server.answers(folders)
    ):
        return None
    return Servers(note["database_url"] if postgres else "", note["redis_url"] if redis else "", folders.state)


def remove(name: str, state_dir: Path) -> None:
    """Remove an instance with all its data, also what lies outside the state folder when we are root.

    Raises:
        EmbeddedError: it is in use, or something cannot be removed.
    """
    folders = locate(name, state_dir, settings.environment().get("XDG_RUNTIME_DIR"))
    with instance.lock(folders.state) as owned:
        if not owned:
            raise EmbeddedError(f"'{name}' in {state_dir} is in use by process {instance.owner(folders.state)}")
        _clear_leftovers(folders)
        if folders.cluster != folders.state:
            remove_tree(folders.cluster)
        remove_tree(folders.redis_socket)
        remove_tree(folders.postgres_socket)
        remove_tree(folders.state)


def _clear_leftovers(folders: Folders) -> None:
    uids = [os.geteuid(), *([folders.account.uid] if folders.account else [])]
    leftovers.clear(folders.marker, uids)


def _remove_socket_folders(folders: Folders) -> None:
    """Leave nothing under /tmp. A folder that still holds something stays, and the next start looks at it."""
    for folder in {folders.postgres_socket, folders.redis_socket}:
        with contextlib.suppress(OSError):
            folder.rmdir()
