"""Processes hold on to no more after their runs than before. How memory goes is no test: `make bench ARGS=soak`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.acceptance.benchmarks import run_benchmark

if TYPE_CHECKING:
    from pathlib import Path

RUNS = 60


def test_connections_descriptors_and_threads_do_not_grow(tmp_path: Path) -> None:
    report, _ = run_benchmark(tmp_path, "soak", f"--runs={RUNS}")

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
