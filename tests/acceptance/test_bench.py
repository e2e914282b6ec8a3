"""The benchmarks still run. What they measure is no test; what they take for right, test_bench_verify.py says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.acceptance.benchmarks import run_benchmark

if TYPE_CHECKING:
    from pathlib import Path

# The smallest that each takes. What needs more than a test may take runs in `make bench` alone.
SMALLEST = {
    "throughput": "--users 1000 --repetitions 1",
    "growth-table": "--users 7200 --smallest 720 --repetitions 1",
    "api": "--users 20 --requests 40 --connections 2 --repetitions 1",
    "bloat": "--users 100 --rounds 20",
}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_leaves_tables_and_figures(name: str, tmp_path: Path) -> None:
    report, tables = run_benchmark(tmp_path, name, *SMALLEST[name].split())
    assert report["tables"]
    assert report["machine"]["postgresql"]["fsync"] == report["machine"]["postgresql"]["synchronous_commit"] == "on"
    assert tables.count("| --- |") >= len(report["tables"])
