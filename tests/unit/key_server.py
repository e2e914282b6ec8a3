"""A key server on loopback, as an identity provider runs one: what it answers is the test's to say."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

if TYPE_CHECKING:
    from collections.abc import Iterator

RSA_BITS = 2048


@dataclass(frozen=True)
class Signer:
    """A key pair with its name and algorithm."""

    kid: str
    algorithm: str
    private: Any

    @classmethod
    def make(cls, algorithm: str, kid: str = "first", *, bits: int = RSA_BITS) -> Signer:
        private: Any
        if algorithm.startswith("ES"):
            private = ec.generate_private_key(ec.SECP256R1())
        elif algorithm == "EdDSA":
            private = ed25519.Ed25519PrivateKey.generate()
        else:
            private = rsa.generate_private_key(65_537, bits)
        return cls(kid, algorithm, private)

    def sign(self, claims: dict[str, Any], **header: Any) -> str:
        return jwt.encode(claims, self.private, header.pop("alg", self.algorithm), {"kid": self.kid, **header})

    def published(self, **more: Any) -> dict[str, Any]:
        """The public key as the server shows it."""
        public = self.private.public_key()
        if isinstance(public, ec.EllipticCurvePublicKey):
            shown = ECAlgorithm.to_jwk(public, as_dict=True)
        elif isinstance(public, ed25519.Ed25519PublicKey):
            shown = OKPAlgorithm.to_jwk(public, as_dict=True)
        else:
            shown = RSAAlgorithm.to_jwk(public, as_dict=True)
        return {**shown, "kid": self.kid, "alg": self.algorithm, "use": "sig", **more}


@dataclass
class KeyServer:
    """What it answers, and how often it was asked."""

    url: str = ""
    keys: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """In the place of the keys."""
    delay_seconds: float = 0.0
    asked: int = 0

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked += 1
        time.sleep(self.delay_seconds)
        body = json.dumps({"keys": self.keys}).encode() if self.body is None else self.body
        handler.send_response(self.status)
        for name, value in {"Content-Length": str(len(body)), **self.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


@contextmanager
def running() -> Iterator[KeyServer]:
    """The server, in a thread, for the block."""
    server = KeyServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                server.answer(self)
            except ConnectionError:
                self.close_connection = True  # whoever asked has given up

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}/jwks"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
