"""Which addresses webhooks may go to."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refresh import webhook_targets
from refresh.webhook_targets import TargetError, check_target, read_target, require_allowed

if TYPE_CHECKING:
    from collections.abc import Callable

PUBLIC = [
    "1.1.1.1", "8.8.8.8", "93.184.216.34", "172.15.255.255", "172.32.0.1", "2606:4700::1111", "2a00:1450::1",
    "::ffff:8.8.8.8", "64:ff9b::808:808",
]  # fmt: skip
PRIVATE = [
    "127.0.0.1", "127.255.0.9", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "192.0.2.1",
    "198.18.0.1", "203.0.113.7", "::1", "fc00::1", "fdff::1", "2001:db8::1",
    # IPv4 addresses in the clothes of IPv6.
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::1",
    "2001:0:53aa:64c:0:0:80ff:fffe",
]  # fmt: skip
NOBODYS = [
    "0.0.0.0",  # noqa: S104 - nothing is bound to it here
    "169.254.169.254", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.1",
    "::", "fe80::1", "fe80::1%eth0", "ff02::1", "fec0::1", "::ffff:169.254.169.254", "::ffff:0.0.0.0",
    "64:ff9b::a9fe:a9fe", "::127.0.0.1",
    # Clouds' metadata outside of the link's own network.
    "fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "192.0.0.192", "168.63.129.16", "::ffff:100.100.100.200",
]  # fmt: skip


def found(*addresses: str) -> Callable[[str, int], list[str]]:
    return lambda _host, _port: list(addresses)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_may_be_called(address: str) -> None:
    for allow_private in (False, True):
        check_target("https://example.com/", allow_private=allow_private, look_up=found(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_one_may_be_where_a_setting_allows_it(address: str) -> None:
    with pytest.raises(TargetError, match="no public address: private networks are refused unless WEBHOOKS_ALLOW"):
        check_target("https://example.com/", allow_private=False, look_up=found(address))
    check_target("https://example.com/", allow_private=True, look_up=found(address))


@pytest.mark.parametrize("address", NOBODYS)
@pytest.mark.parametrize("allow_private", [False, True])
def test_what_is_nobodys_or_the_links_may_never_be(address: str, allow_private: bool) -> None:  # noqa: FBT001 - a parameter
    with pytest.raises(TargetError, match="no public address"):
        check_target("https://example.com/", allow_private=allow_private, look_up=found(address))


def test_one_bad_address_among_good_ones_is_enough() -> None:
    with pytest.raises(TargetError, match=r"example.com leads to 10\.0\.0\.1"):
        check_target("https://example.com/", allow_private=False, look_up=found("1.1.1.1", "10.0.0.1"))


REFUSED = {
    "http://example.com/": "must begin with https://",
    "ftp://example.com/": "must begin with https://",
    "file:///etc/passwd": "must begin with https://",
    "example.com": "must begin with https://",
    "": "must begin with https://",
    "//example.com/": "must begin with https://",
    "https://": "names no host",
    "https:///path": "names no host",
    "https://exa mple.com/": "names no host",
    "https://[fe80::1%25eth0]/": "names no host",
    "https://user:secret@example.com/": "no user and password",
    "https://example.com@127.0.0.1/": "no user and password",
    "https://example.com/#part": "no fragment",
    "https://example.com:0/": "names no port",
    "https://example.com:65536/": "names no port",
    "https://example.com:x/": "cannot be read",
    "https://exa\nmple.com/": "one line",
    "https://example.com/" + "x" * 2_000: "one line",
    "https://127.0.0.1/": "127.0.0.1, which is no public address",
    "https://[::1]/": "::1, which is no public address",
    "https://[::ffff:7f00:1]/": "no public address",
    "https://169.254.169.254/latest/meta-data/": "no public address",
}


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_no_address_for_a_webhook_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(TargetError, match=REFUSED[url]) as caught:
        check_target(url, allow_private=False, look_up=found("1.1.1.1"))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost"])
def test_whatever_the_system_reads_as_loopback_is_refused(host: str) -> None:
    """By the system's own look-up, which knows more forms of an address than any list."""
    with pytest.raises(TargetError, match=r"no public address|cannot be read"):
        check_target(f"https://{host}/", allow_private=False)


def test_what_is_allowed_besides_where_private_networks_are() -> None:
    target = check_target("http://127.0.0.1:8080/hooks?a=b", allow_private=True)
    assert (target.host, target.port, target.named) == ("127.0.0.1", 8_080, False)
    target = check_target("https://[::1]/", allow_private=True)
    assert (target.host, target.port) == ("::1", 443)
    target = read_target("https://münchen.example/", allow_private=False)
    assert (target.host, target.named) == ("xn--mnchen-3ya.example", True)


def test_a_name_that_leads_nowhere_is_looked_up_again_before_each_delivery() -> None:
    def unknown(_host: str, _port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert check_target("https://example.com/", allow_private=False, look_up=unknown).named
    assert check_target(f"https://{'x' * 300}/", allow_private=False).named  # no label is that long


def test_a_look_up_that_hangs_does_not_hang_whoever_adds_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_targets, "LOOKUP_SECONDS", 0.05)

    def slow(_host: str, _port: int) -> list[str]:
        time.sleep(0.5)
        return ["127.0.0.1"]

    began = time.monotonic()
    check_target("https://example.com/", allow_private=False, look_up=slow)
    assert time.monotonic() - began < 0.4


@given(st.ip_addresses().map(str))
def test_what_is_not_allowed_with_private_networks_is_not_allowed_without(address: str) -> None:
    target = read_target("https://example.com/", allow_private=False)
    try:
        require_allowed(target, [address], allow_private=True)
    except TargetError:
        with pytest.raises(TargetError):
            require_allowed(target, [address], allow_private=False)


@given(st.text())
def test_any_text_is_a_target_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://example.com{text}"):
        try:
            target = read_target(url, allow_private=False)
        except TargetError:
            continue
        assert target.url.scheme == "https"
        assert target.host
