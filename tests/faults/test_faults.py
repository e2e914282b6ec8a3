"""The fault suite in two minutes, with seeds that once failed; and each guard, taken out, is missed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from settings import CHECKOUT, environment
from tests.faults.breaks import BREAKS
from tests.faults.faults.catalogue import FAULTS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.faults

SEEDS = (7,)
"""A seed that fails is mended in the product and comes here."""
MINUTES = 2
BREAK_MINUTES = 2
"""At most: a run with a guard taken out ends as soon as that was found."""
TIMEOUT_SECONDS = 900  # of a suite that hangs


def run_suite(state: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the suite; returns its exit code, its figures and all that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments],
        cwd=CHECKOUT,
        env=environment(CREDITS_STATE_DIR=str(state), DATABASE_URL="", REDIS_URL="", COLUMNS="200"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    (figures,) = (state / "faults").glob("*-seed-*.json")
    story: dict[str, Any] = json.loads(figures.read_text())
    assert story["ended"], done.stdout
    return done.returncode, story, done.stdout


@pytest.mark.parametrize("seed", SEEDS)
def test_the_books_are_right_whatever_happens(seed: int, tmp_path: Path) -> None:
    code, story, printed = run_suite(tmp_path, "--minutes", str(MINUTES), "--seed", str(seed))
    assert (code, story["findings"]) == (0, []), printed
    assert len({injection["name"] for injection in story["injections"]} & FAULTS.keys()) > 1, printed


@pytest.mark.parametrize("name", sorted(BREAKS))
def test_a_guard_that_is_taken_out_is_missed(name: str, tmp_path: Path) -> None:
    code, story, printed = run_suite(tmp_path, "--minutes", str(BREAK_MINUTES), "--seed", "1", "--break", name)
    assert code == 1, printed
    assert {finding["rule"] for finding in story["findings"]} & set(BREAKS[name].rules), printed


def test_faults_and_guards_are_listed() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--list"],
        cwd=CHECKOUT,
        env=environment(COLUMNS="400"),
        capture_output=True,
        text=True,
        check=True,
    )
    for name in (*FAULTS, *BREAKS):
        assert f" {name} " in f" {listed.stdout} ".replace("\n", " \n ")
