"""The benchmarks still run. What they measure is no test; what they take for right, test_bench_verify.py says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from settings import CHECKOUT, environment

if TYPE_CHECKING:
    from pathlib import Path

# The smallest that each takes. What needs more than a test may take runs in `make bench` alone.
SMALLEST = {
    "throughput": "--users 1000 --repetitions 1",
    "growth-table": "--users 7200 --smallest 720 --repetitions 1",
    "bloat": "--users 100 --rounds 20",
}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_leaves_tables_and_figures(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", name, *SMALLEST[name].split()],
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
        assert report["tables"]
        assert report["machine"]["postgresql"]["fsync"] == report["machine"]["postgresql"]["synchronous_commit"] == "on"
        assert (CHECKOUT / f"{written[1]}.md").read_text().count("| --- |") >= len(report["tables"])
    finally:
        for file in files:
            file.unlink()
