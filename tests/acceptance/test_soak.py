"""Processes hold on to no more after their runs than before. How memory goes is no test: `make bench ARGS=soak`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

from settings import CHECKOUT, environment

if TYPE_CHECKING:
    from pathlib import Path

RUNS = 60


def test_connections_descriptors_and_threads_do_not_grow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "soak", f"--runs={RUNS}"],
        cwd=CHECKOUT,
        env=environment(CREDITS_STATE_DIR=str(tmp_path), DATABASE_URL="", REDIS_URL="", COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = re.search(r"Written to (\S+)\.\*", done.stderr)
    assert written, done.stderr
    files = sorted(CHECKOUT.glob(f"{written[1]}*"))
    try:
        report = json.loads((CHECKOUT / f"{written[1]}.json").read_text())
    finally:
        for file in files:
            file.unlink()

    assert [row["runs"] for row in report["tables"]["Runs with users"]] == [
        "bulk",
        "dry",
        "rollback",
        "rollback, due again",
        "scheduled",
    ]
    before, after = report["rests"]
    assert after["runs"] >= RUNS > before["runs"]
    assert {name.partition(":")[0] for name in before["held"]} == {"worker1", "worker2", "beat", "PostgreSQL", "Redis"}
    assert {name: held for name, held in after["held"].items() if held > before["held"][name]} == {}
