"""The file of rejects."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cli.rejects import RejectFile, harmless, reject_file
from refresh.errors import RefusedError
from refresh.imports import Reject
from settings import CHECKOUT


@pytest.mark.parametrize(
    "cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\tx", "\rx", "  =1", "\n=1", "-", "+1 2", "\uff1d1+1"]
)
def test_formulas_are_disarmed(cell: str) -> None:
    assert harmless(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["", "-5", "+5", " -5.25 ", "-5,25", "u1", "a=b", "ada@example.com", " x"])
def test_numbers_and_text_stay(cell: str) -> None:
    assert harmless(cell) == cell


def test_no_csv_is_written_without_it() -> None:
    """Whoever writes another one writes cells of other people's too."""
    writers = {
        path.relative_to(CHECKOUT).as_posix(): "harmless(" in path.read_text()
        for folder in ("", "api", "cli", "refresh", "tasks")
        for path in (CHECKOUT / folder).glob("*.py")
        if re.search(r"\bcsv\.(writer|DictWriter)\b|FORMAT csv", path.read_text())
    }
    # The demo's sample is made up here, cell by cell.
    assert writers == {"cli/rejects.py": True, "cli/user_list.py": True, "cli/sample.py": False}


def test_the_file_appears_when_all_has_gone_well(tmp_path: Path) -> None:
    path = tmp_path / "rejects.csv"
    with reject_file(path, ["external_id", "email"]) as rejects:
        rejects.add(Reject(7, "because", ["=x", "a,\udcff"]))
        rejects.flush()
        assert not path.exists()
    assert path.read_bytes() == b'line,reason,external_id,email\n7,because,\'=x,"a,\xff"\n'
    assert list(tmp_path.iterdir()) == [path]


def test_without_rejects_there_is_no_file(tmp_path: Path) -> None:
    with reject_file(tmp_path / "rejects.csv", []) as rejects:
        rejects.flush()
    assert list(tmp_path.iterdir()) == []


def fail(path: Path) -> None:
    with reject_file(path, []) as rejects:
        rejects.add(Reject(1, "", []))
        raise KeyError


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail(tmp_path / "rejects.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_taken_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.symlink_to("nowhere")
    for path in (taken, tmp_path, tmp_path / "missing" / "rejects.csv"):
        with pytest.raises(RefusedError, match=path.name), reject_file(path, []):
            pass


def test_a_full_disk_is_told_before_the_commit() -> None:
    full = Path("/dev/full")
    file = full.open("w")
    rejects = RejectFile(full, file, ["external_id"])
    with pytest.raises(RefusedError, match="cannot be written: No space left"):
        rejects.flush()
    with pytest.raises(OSError, match="No space left"):
        file.close()
