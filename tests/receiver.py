"""A real HTTP server that plays whoever is told: it keeps what it gets, and answers as the test says."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from standardwebhooks import Webhook

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    Answering = Callable[["Handler"], None]


@dataclass(frozen=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def verified(self, secret: str) -> Any:
        """What it tells, if the library that receivers use finds its signature right."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass
class Receiver:
    """What came, and what is answered.

    Attributes:
        script: answers to the next requests, each a status or a function; 204 after them.
        hold: until it is set, every request waits.
    """

    server: ThreadingHTTPServer
    scheme: str
    requests: list[Received] = field(default_factory=list)
    script: list[int | Answering] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)
    connections: set[Any] = field(default_factory=set)

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def url(self, path: str = "/hooks", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    @property
    def ids(self) -> list[str]:
        """The message ids, in the order in which they came."""
        return [request.headers["webhook-id"] for request in self.requests]

    def told(self, type_: str) -> list[Any]:
        """What came of one type."""
        return [request.json["data"] for request in self.requests if request.json["type"] == type_]


class Handler(BaseHTTPRequestHandler):
    """Answers as the receiver's script says."""

    protocol_version = "HTTP/1.1"
    receiver: Receiver

    def do_POST(self) -> None:
        receiver = self.receiver
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        receiver.connections.add(self.client_address)
        receiver.requests.append(Received(self.path, headers, body))
        receiver.hold.wait(30)
        answer = receiver.script.pop(0) if receiver.script else 204
        with suppress(BrokenPipeError, ConnectionResetError):
            if callable(answer):
                answer(self)
            else:
                self.answer(answer)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A whole answer; `Retry_After` is Retry-After."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's own name
        """Nothing: the requests are kept."""


class Server(ThreadingHTTPServer):
    """Lets more callers wait for its loop than the library's five, whose successors the kernel drops."""

    request_queue_size = 128


@contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """A receiver on a free port of loopback."""
    handler = type("ItsHandler", (Handler,), {})
    server = Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    receiver = Receiver(server, "https" if tls else "http")
    receiver.hold.set()
    handler.receiver = receiver  # type: ignore[attr-defined] # made three lines above
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()
