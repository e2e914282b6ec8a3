"""docs/guarantees.md names tests, faults, guards and rules; each of them is there."""

from __future__ import annotations

import re

from settings import CHECKOUT
from tests.faults.breaks import BREAKS
from tests.faults.faults.catalogue import FAULTS

TEXT = (CHECKOUT / "docs" / "guarantees.md").read_text()
ROWS = [line for line in TEXT.partition("## What delays what")[0].splitlines() if line.startswith("|")][2:]
CHECKER = "".join(path.read_text() for path in sorted((CHECKOUT / "tests" / "faults").glob("*.py")))


def test_its_tests_are_there() -> None:
    named = set(re.findall(r"`(test_[a-z_*]+\.py)`", TEXT))
    assert named
    assert [name for name in sorted(named) if not list((CHECKOUT / "tests").glob(f"*/{name}"))] == []


def test_its_guards_are_there_and_all_of_them() -> None:
    named = {name for names in re.findall(r"`--break ([a-z-]+)`((?:, `[a-z-]+`)*)", TEXT) for name in _words(names)}
    assert named == BREAKS.keys()


def test_its_faults_are_there() -> None:
    named = {name for names in re.findall(r"faults? ((?:`[a-z-]+\*?`(?:, )?)+)", TEXT) for name in _words(names)}
    assert named
    assert [name for name in named if not any(re.fullmatch(name.replace("*", ".*"), fault) for fault in FAULTS)] == []


def test_its_bounds_are_the_suites() -> None:
    bounds = re.findall(r"^\| `([a-z-]+)` \| .* \| ([0-9]+) s \|$", TEXT, re.MULTILINE)
    assert dict(bounds) == {name: f"{fault.bound_seconds:.0f}" for name, fault in FAULTS.items()}


def test_its_rules_are_there() -> None:
    named = {name for names in re.findall(r"`make faults` \(((?:`[a-z-]+`(?:, )?)+)", TEXT) for name in _words(names)}
    assert named
    assert [name for name in sorted(named) if f'"{name}"' not in CHECKER] == []


def test_each_promise_is_shown() -> None:
    assert ROWS
    assert [row for row in ROWS if not re.search(r"test_|make faults", row.split("|")[-2])] == []


def _words(names: str | tuple[str, ...]) -> list[str]:
    return re.findall(r"[a-z-]+\*?", " ".join(names) if isinstance(names, tuple) else names)
