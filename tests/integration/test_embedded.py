"""The embedded servers, for real: what ends them, what they survive, and who may use them.

Every instance lies in a deep folder with spaces in its path, since nothing may depend on a short plain one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
import redis

import embedded
from embedded import leftovers
from embedded.folders import Folders, locate
from embedded.redis_server import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME = "test"

# Runs the servers in a process of its own, so that it can be killed. Prints their addresses and waits.
OWNER = textwrap.dedent("""
    import json, sys, threading, time
    from pathlib import Path
    import embedded
    from embedded.processes import unwind_on_signals

    def run():
        fast = embedded.FLEETING
        with embedded.servers("test", Path(sys.argv[1]), postgres_options=fast, share="share" in sys.argv) as running:
            pids = {name: process.pid for name, process in running.processes.items()}
            print(json.dumps([running.database_url, running.redis_url, pids]), flush=True)
            time.sleep(600)

    unwind_on_signals()
    if "thread" in sys.argv:
        threading.Thread(target=run, daemon=True).start()
        time.sleep(600)
    run()
""")


class Owner:
    """A process that runs (or shares) the instance's servers."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.process = process
        line = process.stdout.readline()
        assert line, "it ended before the servers were ready"
        self.database_url, self.redis_url, self.pids = json.loads(line)


@contextmanager
def owner(state_dir: Path, *options: str) -> Iterator[Owner]:
    command = [sys.executable, "-c", OWNER, str(state_dir), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            yield Owner(process)
        finally:
            process.terminate()


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "a folder with spaces" / ("deep" * 30)
    yield folder
    embedded.remove(NAME, folder)


@pytest.fixture
def folders(state_dir: Path) -> Folders:
    return locate(NAME, state_dir, os.environ.get("XDG_RUNTIME_DIR"))  # noqa: TID251 - what servers() itself sees


def server_processes(folders: Folders) -> list[int]:
    return [pid for uid in {os.geteuid(), account(folders)} for pid in leftovers.find(folders.marker, uid)]


def account(folders: Folders) -> int:
    return folders.account.uid if folders.account else os.geteuid()


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def client(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url.replace("redis+socket://", "unix://").partition("?")[0])


def write(running: embedded.Servers) -> None:
    with psycopg.connect(running.database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    with client(running.redis_url) as broker:
        broker.set("kept", 42)


def read(running: embedded.Servers) -> tuple[object, object]:
    with psycopg.connect(running.database_url) as connection:
        there = connection.execute("SELECT to_regclass('kept')").fetchone()
        answer = connection.execute("SELECT answer FROM kept").fetchone() if there != (None,) else None
    with client(running.redis_url) as broker:
        return answer, broker.get("kept")


def read_answer(running: embedded.Servers) -> object:
    with psycopg.connect(running.database_url) as connection:
        row = connection.execute("SELECT 1").fetchone()
    return row[0] if row else None


def test_data_last_from_one_run_to_the_next_until_a_fresh_one(state_dir: Path, folders: Folders) -> None:
    with embedded.servers(NAME, state_dir) as running:
        assert set(running.processes) == {"postgres", "redis"}
        write(running)
    assert server_processes(folders) == []
    assert not folders.postgres_socket.exists()
    assert not folders.redis_socket.exists()
    with embedded.servers(NAME, state_dir) as running:
        assert read(running) == ((42,), b"42")
    with embedded.servers(NAME, state_dir, fresh=True) as running:
        assert read(running) == (None, None)


def test_servers_are_set_up_as_the_service_needs_them(state_dir: Path, folders: Folders) -> None:
    with embedded.servers(NAME, state_dir) as running:
        with psycopg.connect(running.database_url) as connection:
            wanted = {
                "server_encoding": "UTF8",
                "TimeZone": "UTC",
                "log_timezone": "UTC",
                "listen_addresses": "",
                "fsync": "on",
                "max_connections": "100",
            }
            for name, value in wanted.items():
                assert connection.execute("SELECT current_setting(%s)", (name,)).fetchone() == (value,)
            assert connection.execute("SELECT current_database()").fetchone() == ("credits",)
        with client(running.redis_url) as broker:
            found = broker.config_get("*")
            assert found["maxmemory-policy"] == "noeviction"
            assert (found["appendonly"], found["appendfsync"], found["port"]) == ("yes", "everysec", "0")
        for folder in (folders.postgres_socket, folders.redis_socket):
            assert folder.stat().st_mode & 0o077 == 0


def test_every_role_can_be_used_by_the_one_who_started_it(state_dir: Path) -> None:
    with embedded.servers(NAME, state_dir, redis=False, postgres_options=embedded.FLEETING) as running:
        assert running.redis_url == ""
        with psycopg.connect(running.database_url, autocommit=True) as connection:
            connection.execute("CREATE ROLE app LOGIN")
        with psycopg.connect(running.database_url.replace("postgres@", "app@")) as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("app",)


@pytest.mark.parametrize(("signum", "returncode"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_stops_the_servers_in_order(
    signum: signal.Signals, returncode: int, state_dir: Path, folders: Folders
) -> None:
    with owner(state_dir) as running:
        assert server_processes(folders)
        running.process.send_signal(signum)
        assert running.process.wait(30) == returncode
    assert server_processes(folders) == []
    assert "database system is shut down" in (folders.state / "postgres.log").read_text()
    assert not folders.redis_socket.exists()


def test_a_killed_owner_takes_its_servers_along_and_blocks_nobody(state_dir: Path, folders: Folders) -> None:
    with owner(state_dir) as first:
        first.process.kill()
    with owner(state_dir) as second:
        assert second.database_url == first.database_url
        second.process.kill()
        second.process.wait(10)
        eventually(lambda: server_processes(folders) == [])


def test_servers_left_running_by_a_killed_owner_are_stopped(state_dir: Path, folders: Folders) -> None:
    with owner(state_dir, "thread") as first:  # in a thread, so that the kernel does not stop them for us
        first.process.kill()
        first.process.wait(10)
    assert {psutil.Process(pid).is_running() for pid in first.pids.values()} == {True}
    with embedded.servers(NAME, state_dir) as running:
        assert not set(server_processes(folders)) & set(first.pids.values())
        write(running)


def test_a_stale_pid_file_whose_number_lives_on_blocks_nobody(state_dir: Path, folders: Folders) -> None:
    with owner(state_dir) as running:
        os.kill(running.pids["postgres"], signal.SIGKILL)
        running.process.kill()
    with subprocess.Popen(["sleep", "600"], user=account(folders)) as bystander:
        pid_file = folders.cluster / "postgres" / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
        pid_file.write_text("\n".join([str(bystander.pid), *lines[1:]]))
        try:
            with embedded.servers(NAME, state_dir) as again:
                assert read(again) == (None, None)
            assert bystander.poll() is None, "a bystander was stopped"
        finally:
            bystander.kill()


def test_a_half_made_cluster_is_made_anew(state_dir: Path, folders: Folders) -> None:
    command = [sys.executable, "-c", OWNER, str(state_dir)]
    draft = folders.cluster / f"initdb-{folders.marker}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        eventually((draft / "base").exists)
        process.kill()
    assert draft.exists()
    with embedded.servers(NAME, state_dir, redis=False) as running:
        assert read_answer(running) == 1
    assert not draft.exists()


def test_a_queue_that_redis_cannot_read_is_put_aside(state_dir: Path, folders: Folders) -> None:
    with embedded.servers(NAME, state_dir, postgres=False) as running, client(running.redis_url) as broker:
        broker.set("kept", 42)
    for path in (folders.state / "redis").rglob("*"):
        if path.is_file():
            path.write_bytes(b"*not what Redis writes\r\n" * 100)
    with embedded.servers(NAME, state_dir, postgres=False) as running, client(running.redis_url) as broker:
        assert broker.get("kept") is None
    assert any((folders.state / "redis-unreadable").iterdir())


def test_a_server_that_does_not_start_is_one_line_with_the_reason(state_dir: Path, folders: Folders) -> None:
    with embedded.servers(NAME, state_dir, redis=False):
        pass
    with (folders.cluster / "postgres" / "postgresql.conf").open("a") as file:
        file.write("nonsense = 1\n")
    with pytest.raises(embedded.EmbeddedError) as caught, embedded.servers(NAME, state_dir, redis=False):
        pass
    assert re.search(r"PostgreSQL does not start: .*nonsense.*postgres\.log", str(caught.value))
    assert "\n" not in str(caught.value)


def test_an_instance_in_use_is_shared_on_request_alone(state_dir: Path) -> None:
    with owner(state_dir) as running:
        pid = running.process.pid
        with pytest.raises(embedded.EmbeddedError, match=f"in use by process {pid}: stop it"):
            embedded.servers(NAME, state_dir).__enter__()
        with pytest.raises(embedded.EmbeddedError, match=f"in use by process {pid}: stop it"):
            embedded.servers(NAME, state_dir, fresh=True, share=True).__enter__()
        with pytest.raises(embedded.EmbeddedError, match=f"in use by process {pid}"):
            embedded.remove(NAME, state_dir)
        with embedded.servers(NAME, state_dir, share=True) as shared:
            assert (shared.database_url, shared.redis_url) == (running.database_url, running.redis_url)
            assert not shared.processes
            write(shared)
        with embedded.servers(NAME, state_dir, share=True) as shared:
            assert read(shared) == ((42,), b"42"), "sharing stopped or changed what it does not own"


def test_two_that_begin_at_once_share_what_one_of_them_starts(state_dir: Path) -> None:
    with owner(state_dir, "share") as one, owner(state_dir, "share") as other:
        assert one.database_url == other.database_url
        assert [bool(one.pids), bool(other.pids)].count(True) == 1


def test_sharing_waits_for_an_owner_that_stops_and_then_owns(state_dir: Path) -> None:
    with owner(state_dir) as running:
        running.process.terminate()
        with embedded.servers(NAME, state_dir, share=True) as mine:
            assert read_answer(mine) == 1


def test_what_the_running_one_lacks_is_said(state_dir: Path) -> None:
    with (
        embedded.servers(NAME, state_dir, postgres=False),
        pytest.raises(embedded.EmbeddedError, match=f"process {os.getpid()} runs 'test' without PostgreSQL"),
    ):
        embedded.servers(NAME, state_dir, share=True).__enter__()


def test_an_error_in_the_block_stops_the_servers_and_passes_on(state_dir: Path, folders: Folders) -> None:
    with pytest.raises(ZeroDivisionError), embedded.servers(NAME, state_dir, postgres_options=embedded.FLEETING):
        raise ZeroDivisionError
    assert server_processes(folders) == []


def test_removing_an_instance_leaves_nothing(state_dir: Path, folders: Folders) -> None:
    with embedded.servers(NAME, state_dir, postgres_options=embedded.FLEETING):
        pass
    embedded.remove(NAME, state_dir)
    assert not folders.state.exists()
    assert not folders.cluster.exists()


def test_a_redis_on_the_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "valkey-server"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program() == program
