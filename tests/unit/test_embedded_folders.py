"""Where an embedded instance keeps its files, and what it refuses to use."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from embedded import folders
from embedded.errors import EmbeddedError


def private(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


@pytest.mark.parametrize("name", ["", "Up", "a b", "../up", "-up", "x" * 33])
def test_an_instance_has_a_plain_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="instance name"):
        folders.locate(name, tmp_path, None)


def test_sockets_of_a_deep_folder_with_spaces_stay_short_and_plain(tmp_path: Path) -> None:
    deep = tmp_path / "with a space" / ("deep" * 40)
    found = folders.locate("x" * 32, deep, None)
    assert found.state == deep / ("x" * 32)
    assert stat.S_IMODE(found.state.stat().st_mode) == 0o700
    for socket in (found.postgres_socket / ".s.PGSQL.5432", found.redis_socket / "redis.sock"):
        assert len(os.fsencode(socket)) < 100
        assert " " not in str(socket)


def test_each_instance_has_sockets_of_its_own(tmp_path: Path) -> None:
    states = [folders.locate("up", tmp_path, None), folders.locate("demo", tmp_path, None)]
    states.append(folders.locate("up", tmp_path / "other", None))
    assert len({found.redis_socket for found in states}) == len({found.marker for found in states}) == 3


def test_the_runtime_folder_is_used_when_it_is_private_and_ours(tmp_path: Path) -> None:
    # A relative of the real one: short enough and with a plain name, as systemd makes it.
    runtime = private(tmp_path / "r")
    used = folders.locate("up", tmp_path, str(runtime)).redis_socket.parent == runtime
    assert used == (len(str(runtime)) <= 61)
    assert folders.locate("up", tmp_path, str(tmp_path / "missing")).redis_socket.parent == Path("/tmp")  # noqa: S108
    assert folders.locate("up", tmp_path, "/").redis_socket.parent == Path("/tmp")  # noqa: S108
    runtime.chmod(0o750)
    assert folders.locate("up", tmp_path, str(runtime)).redis_socket.parent == Path("/tmp")  # noqa: S108


def test_a_private_folder_is_made_or_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "sockets"
    folders.make_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folders.make_private(folder)


def test_a_folder_open_to_others_is_refused_and_not_touched(tmp_path: Path) -> None:
    folder = private(tmp_path / "sockets")
    folder.chmod(0o755)
    with pytest.raises(EmbeddedError, match="open to others"):
        folders.make_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_link_to_a_private_folder_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "sockets"
    link.symlink_to(private(tmp_path / "elsewhere"))
    with pytest.raises(EmbeddedError, match="belongs to somebody else"):
        folders.make_private(link)


def test_a_folder_of_somebody_else_is_refused() -> None:
    somebody_elses = Path("/proc/1") if os.geteuid() else Path("/proc/self")  # never private, and not to be changed
    with pytest.raises(EmbeddedError, match="belongs to somebody else"):
        folders.make_private(somebody_elses)


def test_a_state_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedError, match="cannot make the state folder"):
        folders.locate("up", tmp_path / "file", None)


def test_data_belong_to_one_state_folder(tmp_path: Path) -> None:
    found = folders.locate("up", tmp_path, None)
    try:
        folders.claim_cluster(found)
        (found.cluster / "data").touch()
        folders.claim_cluster(found)
        assert (found.cluster / "data").exists()
        folders.remove_tree(found.state)
        folders.claim_cluster(folders.locate("up", tmp_path, None))
        assert not (found.cluster / "data").exists()
    finally:
        folders.remove_tree(found.cluster)
