"""Runs a benchmark as `make bench` does, and takes away what it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from settings import CHECKOUT, environment

if TYPE_CHECKING:
    from pathlib import Path


def run_benchmark(state: Path, name: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run one to its good end; returns its figures and its tables."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", name, *arguments],
        cwd=CHECKOUT,
        env=environment(CREDITS_STATE_DIR=str(state), DATABASE_URL="", REDIS_URL="", COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = re.search(r"Written to (\S+)\.\*", done.stderr)
    assert written, done.stderr
    try:
        return json.loads((CHECKOUT / f"{written[1]}.json").read_text()), (CHECKOUT / f"{written[1]}.md").read_text()
    finally:
        for file in CHECKOUT.glob(f"{written[1]}*"):
            file.unlink()
