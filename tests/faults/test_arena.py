"""The suite's own tools: the wire that is cut, frozen and listened to, and the keeper of processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.looking import backend, client_ports
from tests.faults.processes import Keeper
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECONDS = 10.0


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Proxy]:
    """Before a server that answers each message with the same."""
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        with Proxy(path) as proxy:
            yield proxy
        server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(1024):
                connection.sendall(data)
        except ConnectionError:
            return


@pytest.fixture
def client(wire: Proxy) -> Iterator[socket.socket]:
    with dial(wire) as made:
        yield made


def dial(wire: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", wire.port), SECONDS)


def ask(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    return client.recv(1024)


def silent(client: socket.socket) -> bool:
    """Whether nothing comes for a moment; what comes is left where it is."""
    client.settimeout(0.1)
    try:
        client.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        client.settimeout(SECONDS)
    return False


def is_reset(client: socket.socket) -> bool:
    try:
        return ask(client, b"anybody?") == b""
    except ConnectionError:
        return True


def is_refused(wire: Proxy) -> bool:
    """Whether newcomers are reset: as they come, or with their first word."""
    try:
        with dial(wire) as newcomer:
            return is_reset(newcomer)
    except ConnectionError:
        return True


def test_a_wire_passes_everything_both_ways(client: socket.socket) -> None:
    assert ask(client, b"one") == b"one"
    assert ask(client, b"two") == b"two"


def test_what_is_sent_over_a_frozen_wire_arrives_later(wire: Proxy, client: socket.socket) -> None:
    wire.freeze()
    client.sendall(b"one")
    with dial(wire) as newcomer:
        newcomer.sendall(b"two")
        assert silent(client)
        assert silent(newcomer)
        wire.restore()
        assert client.recv(1024) == b"one"
        assert newcomer.recv(1024) == b"two"


@pytest.mark.parametrize("silently", [False, True])
def test_a_wire_that_is_cut_resets_old_and_new_clients(wire: Proxy, client: socket.socket, *, silently: bool) -> None:
    assert ask(client, b"one") == b"one"
    wire.cut(silently=silently)
    assert is_reset(client)
    assert is_refused(wire)
    wire.restore()
    with dial(wire) as newcomer:
        assert ask(newcomer, b"two") == b"two"


def test_a_trap_holds_one_message_and_what_follows_it(wire: Proxy, client: socket.socket) -> None:
    with wire.trap(rb"t..p") as trap:
        assert ask(client, b"one") == b"one"
        assert trap.wait(0) is None
        client.sendall(b"a trap")
        link = trap.wait(SECONDS)
        assert link is not None
        assert link.trapped == b"a trap"
        assert silent(client)
    assert client.recv(1024) == b"a trap"


def test_a_trap_is_for_one_process(wire: Proxy, client: socket.socket) -> None:
    port = client.getsockname()[1]
    with dial(wire) as other, wire.trap(rb"mine", lambda asked: asked == port) as trap:
        assert ask(other, b"mine") == b"mine"
        client.sendall(b"mine")
        link = trap.wait(SECONDS)
        assert link is not None
        assert link.client_port == port


def test_what_is_dropped_in_a_trap_never_arrives(wire: Proxy, client: socket.socket) -> None:
    with wire.trap(rb"trap") as trap:
        client.sendall(b"trap")
        link = trap.wait(SECONDS)
        assert link is not None
        link.drop()
        assert is_reset(client)
    assert link.head == b""


def test_an_answer_can_be_kept_from_its_caller(wire: Proxy, client: socket.socket) -> None:
    assert ask(client, b"one") == b"one"
    (link,) = wire.links()
    link.mute()
    client.sendall(b"two")
    until(lambda: link.head == b"onetwo", "the server answered")
    assert silent(client)
    link.drop()
    assert is_reset(client)


def test_the_ports_of_a_process_are_known(wire: Proxy, client: socket.socket) -> None:
    assert client_ports(os.getpid(), wire) == {client.getsockname()[1]}


def test_a_backend_is_known_by_postgresqls_first_answers(wire: Proxy, client: socket.socket) -> None:
    text = b"R\x00\x00\x00\x08\x00\x00\x00\x00K\x00\x00\x00\x0c\x00\x01\x00\x02key!Z"
    assert ask(client, text) == text
    (link,) = wire.links()
    assert backend(link) == 65_538


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with Keeper(tmp_path) as made:
        yield made


SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def test_a_process_that_ends_is_started_again(keeper: Keeper) -> None:
    kept = keeper.keep("sleeper", SLEEPER, {})
    first = kept.pid
    until(lambda: kept.log.read_bytes() == b"up\n", "it runs")
    assert kept.signal(signal.SIGKILL)
    assert kept.wait_started(1, SECONDS)
    assert kept.pid != first
    assert kept.running
    until(lambda: kept.log.read_bytes() == b"up\nup\n", "its log goes on")


def test_a_process_that_is_held_stays_down_until_it_is_released(keeper: Keeper) -> None:
    kept = keeper.keep("sleeper", SLEEPER, {})
    kept.hold()
    assert kept.running
    kept.signal(signal.SIGKILL)
    until(lambda: not kept.running, "it ended")
    assert not kept.wait_started(1, 1.0)
    assert not kept.signal(signal.SIGKILL)
    kept.release()
    assert kept.wait_started(1, SECONDS)


def test_the_next_start_finds_another_environment(keeper: Keeper) -> None:
    kept = keeper.keep(
        "teller", [sys.executable, "-c", "import os; print(os.environ['SAID'], flush=True)"], {"SAID": "a"}
    )
    kept.environment["SAID"] = "b"
    assert kept.wait_started(2, SECONDS)
    assert kept.log.read_text().startswith("a\nb\n")


def test_a_process_that_stands_still_ends_with_its_keeper(tmp_path: Path) -> None:
    with Keeper(tmp_path) as keeper:
        kept = keeper.keep("sleeper", SLEEPER, {})
        kept.signal(signal.SIGSTOP)
    assert not kept.running


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not in {SECONDS:.0f} seconds: {what}")
        time.sleep(0.01)
