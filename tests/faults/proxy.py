"""A wire that the suite can cut, freeze and wait at: a TCP port of loopback before a server's unix socket.

Frozen, nothing passes and nobody is told, as when a switch loses its mind. Cut, clients are reset, old ones and new
ones; and the server hears of it, or, cut silently, does not, as when a client's machine is gone.

A trap waits for a message on its way to the server and keeps it from going on: then its sender is at precisely that
point. What a killed sender had sent before passes, as on a real wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Result = TypeVar("Result")

_CHUNK_BYTES = 64 * 1024
_HEAD_BYTES = 4096
_CALL_SECONDS = 10.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Link:
    """One connection through the proxy.

    Attributes:
        client_port: by which the client's process is found.
        head: the first bytes of the server's answers; PostgreSQL's say which backend it is.
    """

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, client_port: int) -> None:
        self.client_port = client_port
        self.head = b""
        self.trapped = b""
        """What a trap keeps from going on."""
        self.server: asyncio.StreamWriter | None = None
        self.client = client
        self.may_ask = asyncio.Event()
        self.may_ask.set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._proxy = proxy

    def release(self) -> None:
        """Let pass what a trap has caught, and all that follows."""
        self._proxy.call(self.may_ask.set)

    def mute(self) -> None:
        """Keep the server's answers from the client, until it is dropped."""
        self._proxy.call(self.may_answer.clear)

    def drop(self) -> None:
        """Reset the client and close the server's side. What a trap has caught never arrives."""
        self._proxy.call(self.abort)

    def abort(self, *, server_too: bool = True) -> None:
        """End it; in the proxy's own thread."""
        reset(self.client)
        if server_too and self.server is not None:
            self.server.transport.abort()


class Trap:
    """Waits for a message to the server, see `Proxy.trap()`."""

    def __init__(self, pattern: bytes, whose: Callable[[int], bool]) -> None:
        self._pattern = re.compile(pattern)
        self._whose = whose
        self._sprung = threading.Event()
        self.link: Link | None = None

    def look(self, link: Link, data: bytes) -> None:
        """Catch a message that is the one; in the proxy's own thread."""
        if self.link is None and self._pattern.search(data) and self._whose(link.client_port):
            self.link, link.trapped = link, data
            link.may_ask.clear()
            self._sprung.set()

    def wait(self, seconds: float) -> Link | None:
        """The connection that it is on, held there; None when `seconds` pass before."""
        return self.link if self._sprung.wait(seconds) else None


class Proxy:
    """Forwards in a thread of its own, from the beginning of the `with` block; its port is known before.

    Only processes of our own account may use it: the servers ask for no password.

    Args:
        server: the unix socket of the server, which need not be there yet.
    """

    def __init__(self, server: Path) -> None:
        self._server = server
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"proxy of {server.name}", daemon=True)
        self._over = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._cut = False
        self._links: set[Link] = set()
        self._orphans: list[asyncio.StreamWriter] = []
        self._traps: list[Trap] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.call(self._over.set)
        self._thread.join()
        self._socket.close()
        self._loop.close()

    def call(self, function: Callable[[], Result]) -> Result:
        """Do something in the proxy's thread, and wait until it is done."""

        async def done() -> Result:
            return function()

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(_CALL_SECONDS)

    def freeze(self) -> None:
        """From now on nothing passes; connections stay, and new ones get no answer."""
        self.call(self._flowing.clear)

    def cut(self, *, silently: bool = False) -> None:
        """Reset all clients, and each new one until `restore()`.

        Args:
            silently: keep the server in the belief that they are there, until `restore()`.
        """

        def cut() -> None:
            self._cut = True
            for link in self._links:
                link.abort(server_too=not silently)
            if silently:
                self._orphans += [link.server for link in self._links if link.server is not None]

        self.call(cut)

    def restore(self) -> None:
        """Forward again, what was frozen first; the server hears of those who were cut off silently."""

        def restore() -> None:
            self._cut = False
            for server in self._orphans:
                server.transport.abort()
            self._orphans.clear()
            self._flowing.set()

        self.call(restore)

    def links(self) -> list[Link]:
        """The connections at present."""
        return self.call(lambda: list(self._links))

    @contextlib.contextmanager
    def trap(self, pattern: bytes, whose: Callable[[int], bool] = lambda _port: True) -> Iterator[Trap]:
        """Catch the first message to the server that is looked for; at the block's end it goes on.

        Args:
            pattern: a regular expression that is found in it.
            whose: whether it is the right one's, by its local port; asked where the pattern is found.
        """
        trap = Trap(pattern, whose)
        self.call(lambda: self._traps.append(trap))
        try:
            yield trap
        finally:
            self.call(lambda: self._traps.remove(trap))
            if trap.link is not None:
                trap.link.release()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        async with await asyncio.start_server(self._forward, sock=self._socket):
            await self._over.wait()
        # Links that are left end with the loop.
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        client_port = to_client.get_extra_info("peername")[1]
        link = Link(self, to_client, client_port)
        self._links.add(link)
        try:
            await self._flowing.wait()
            if self._cut or not _is_ours(client_port):
                return
            server, link.server = await asyncio.open_unix_connection(str(self._server))
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._ask(link, client, link.server))
                pumps.create_task(self._answer(link, server, to_client))
        except* (OSError, _EndError):
            pass  # either side is gone, or there is no server: the other side is told
        finally:
            self._links.discard(link)
            link.abort(server_too=link.server not in self._orphans)

    async def _ask(self, link: Link, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await client.read(_CHUNK_BYTES):
            for trap in self._traps:
                trap.look(link, data)
            await link.may_ask.wait()
            await self._pass(server, data)
        raise _EndError

    async def _answer(self, link: Link, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await server.read(_CHUNK_BYTES):
            link.head = (link.head + data)[:_HEAD_BYTES] if len(link.head) < _HEAD_BYTES else link.head
            await link.may_answer.wait()
            await self._pass(client, data)
        raise _EndError

    async def _pass(self, to: asyncio.StreamWriter, data: bytes) -> None:
        await self._flowing.wait()
        to.write(data)
        await to.drain()


class _EndError(Exception):
    """One side has closed, so the whole link ends: neither protocol half-closes."""


def reset(client: asyncio.StreamWriter) -> None:
    """Close a connection by a reset, as a wire that is cut looks from its end."""
    with contextlib.suppress(OSError):
        client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    client.transport.abort()


def _is_ours(port: int) -> bool:
    """Whether a connection from a local port is of our own account; where the kernel does not tell, it is."""
    try:
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    except FileNotFoundError:
        return True
    mine = f":{port:04X}"
    return any(fields[1].endswith(mine) and int(fields[7]) == os.geteuid() for fields in map(str.split, lines))
