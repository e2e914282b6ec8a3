"""Where webhooks may go: an address is checked when it is given, and again after each look-up of its name.

Whoever may add an endpoint could otherwise have this service, which stands inside, call what stands there beside it
(server-side request forgery): the database's neighbours, a cloud's metadata. A name is looked up by us, what came of
it is checked, and the connection goes to that very address (webhook_post.py): looked up again by the client, the name
could by then lead elsewhere.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from refresh.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Look = Callable[[str, int], list[str]]

URL_MAX = 2_000
_PORT_MAX = 65_535
LOOKUP_SECONDS = 3.0
"""How long whoever adds an endpoint waits for its name. Before each delivery it is looked up anyway."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Relays between IPv4 and IPv6, which lead who knows where.
_RELAYS = (ipaddress.ip_network("192.88.99.0/24"), ipaddress.ip_network("64:ff9b:1::/48"))
# Where clouds keep their metadata beside the link's own addresses: AWS and Google by IPv6, Alibaba, Oracle, Azure.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
)
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class TargetError(RefusedError):
    """Nothing may be sent to this address. The text is one line for people, without the address' path."""


@dataclass(frozen=True, slots=True)
class Target:
    """An address that may be called, as far as it says itself; where its name leads is `require_allowed()`'s."""

    url: httpx.URL

    @property
    def host(self) -> str:
        """The host as it is looked up: a name in ASCII, or an IP address without brackets."""
        return self.url.raw_host.decode("ascii").strip("[]")

    @property
    def port(self) -> int:
        """The port, named or not."""
        if self.url.port is not None:
            return self.url.port
        return 443 if self.url.scheme == "https" else 80

    @property
    def named(self) -> bool:
        """Whether the host is a name, which a certificate has to carry."""
        return _address(self.host) is None


def read_target(url: str, *, allow_private: bool) -> Target:
    """Read and check a URL; nothing is looked up.

    Raises:
        TargetError: it is none, or one that nothing may be sent to.
    """
    if not url.isprintable() or len(url) > URL_MAX:
        raise TargetError(f"the URL must be one line of {URL_MAX:,} characters at most")
    try:
        read = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise TargetError(f"the URL cannot be read: {error}") from None
    if read.scheme != "https" and not (read.scheme == "http" and allow_private):
        raise TargetError(
            "the URL must begin with https://"
            + ("" if allow_private else "; http:// is for private networks, with WEBHOOKS_ALLOW_PRIVATE=true")
        )
    if read.userinfo or "@" in read.netloc.decode("ascii"):
        raise TargetError("the URL must hold no user and password")
    if read.fragment:
        raise TargetError("the URL must have no fragment (#…)")
    target = Target(read)
    if not target.host or "%" in target.host:
        raise TargetError("the URL names no host that can be looked up")
    if not 0 < target.port <= _PORT_MAX:
        raise TargetError(f"the URL names no port: {target.port}")
    if not target.named:
        require_allowed(target, [target.host], allow_private=allow_private)
    return target


def require_allowed(target: Target, addresses: Iterable[str], *, allow_private: bool) -> None:
    """Check where a host's name leads.

    Raises:
        TargetError: one of the addresses is none that may be called. One is enough: which of them a client takes is
            not ours to say.
    """
    for text in addresses:
        address = _address(text)
        if address is None or not (_is_public(address) or (allow_private and _is_private(address))):
            leads = f"{target.host} leads to {text}" if target.named else text
            raise TargetError(
                f"{leads}, which is no public address"
                + ("" if allow_private else ": private networks are refused unless WEBHOOKS_ALLOW_PRIVATE=true")
            )


def check_target(url: str, *, allow_private: bool, look_up: Look | None = None) -> Target:
    """Check a URL that somebody gives, and where its name leads at present.

    A name that leads nowhere is accepted, and so is one that nobody answers for within `LOOKUP_SECONDS`: this process
    may stand where names of the internet are unknown, and before each delivery it is looked up and checked again.

    Raises:
        TargetError: nothing may be sent there.
    """
    target = read_target(url, allow_private=allow_private)
    if target.named:
        require_allowed(target, _within_time(look_up or lookup, target), allow_private=allow_private)
    return target


def lookup(host: str, port: int) -> list[str]:
    """The addresses that a name leads to, in the order in which they are to be tried.

    Raises:
        OSError: the name is unknown, or nobody answers for it.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _within_time(look_up: Look, target: Target) -> list[str]:
    """The system's own look-up takes no time limit: it is left to itself when it takes too long."""
    found: list[str] = []

    def look() -> None:
        try:
            found.extend(look_up(target.host, target.port))
        except (OSError, UnicodeError):
            return

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(LOOKUP_SECONDS)
    return list(found)


def _address(text: str) -> _Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _innermost(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 one stands for, where a gateway or the system itself would go there."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        return inner or address
    return address


def _is_public(address: _Address) -> bool:
    inner = _innermost(address)
    return inner.is_global and not _is_nobodys(inner) and not (inner.version == 6 and inner.is_site_local)  # noqa: PLR2004 - IPv6


def _is_private(address: _Address) -> bool:
    """Of a network of one's own, or this machine itself."""
    inner = _innermost(address)
    return not inner.is_global and not _is_nobodys(inner)


def _is_nobodys(address: _Address) -> bool:
    """No single machine's, or that of the link alone, or another one where clouds keep their metadata."""
    return (
        address in _METADATA
        or address.is_multicast
        or address.is_unspecified
        or address.is_link_local
        or (address.is_reserved and not address.is_loopback)
        or any(address in relay for relay in _RELAYS)
    )
