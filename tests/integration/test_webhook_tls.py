"""TLS to an address that we have looked up: the certificate has to be the name's, all the same."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from refresh.webhook_post import Sender
from tests.integration.hooks import deliver, endpoint, outbox, write
from tests.receiver import receiving

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.world import World


class Certificate:
    """Self-signed for some names, and the contexts of a server that has it and of a client that believes it."""

    def __init__(self, folder: Path, *names: x509.GeneralName) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        self.file = folder / "certificate.pem"
        self.file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + made.public_bytes(serialization.Encoding.PEM)
        )
        self.seen: list[str | None] = []

    @property
    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.file)

        def note_name(_socket: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
            self.seen.append(name)

        context.sni_callback = note_name
        return context

    def sender(self) -> Sender:
        return Sender(
            allow_private=True,
            look_up=lambda _host, _port: ["127.0.0.1"],
            tls=ssl.create_default_context(cafile=self.file),
        )


def test_the_certificate_is_the_names_and_not_the_addresss(world: World, tmp_path: Path) -> None:
    certificate = Certificate(tmp_path, x509.DNSName("hooks.example"))
    with receiving(certificate.server) as receiver:
        added, secret = endpoint(world, "run.finished", url=receiver.url(host="hooks.example"))
        write(world, added)
        assert deliver(world, certificate.sender()).counts["delivered"] == 1
        (request,) = receiver.requests
        request.verified(secret)
        assert request.headers["host"] == f"hooks.example:{receiver.port}"
    assert certificate.seen == ["hooks.example"]


def test_a_certificate_of_another_name_is_refused(world: World, tmp_path: Path) -> None:
    certificate = Certificate(
        tmp_path, x509.DNSName("other.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    )
    with receiving(certificate.server) as receiver:
        added, _ = endpoint(world, "run.finished", url=receiver.url(host="hooks.example"))
        write(world, added)
        assert deliver(world, certificate.sender()).counts["failed"] == 1
        assert receiver.requests == []
    assert "CERTIFICATE_VERIFY_FAILED" in outbox(world)[0]["last_error"]


def test_an_address_has_to_be_in_the_certificate_itself(world: World, tmp_path: Path) -> None:
    certificate = Certificate(tmp_path, x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    with receiving(certificate.server) as receiver:
        added, _ = endpoint(world, "run.finished", url=receiver.url())
        write(world, added)
        assert deliver(world, certificate.sender()).counts["delivered"] == 1


@pytest.mark.parametrize("known", [False, True])
def test_whom_nobody_vouches_for_is_refused_unless_the_environment_does(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    certificate = Certificate(tmp_path, x509.DNSName("hooks.example"))
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    sender = Sender(allow_private=True, look_up=lambda _host, _port: ["127.0.0.1"], tls=httpx.create_ssl_context())
    with receiving(certificate.server) as receiver:
        added, _ = endpoint(world, "run.finished", url=receiver.url(host="hooks.example"))
        write(world, added)
        assert deliver(world, sender).counts["delivered"] == known
