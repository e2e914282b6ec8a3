"""What a worker and beat say when they cannot start: one line that names the way out, and no traceback."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

import settings
from tests.acceptance.nodes import celery

if TYPE_CHECKING:
    from pathlib import Path

    from embedded import Servers
    from tests.cluster import Cluster

SECONDS = 60.0
NOBODY_LISTENS = "127.0.0.1:1"

REASONS = {
    "no database": "The database cannot be reached: .*(see DATABASE_URL)",
    "no broker": "The broker cannot be reached: .*(see REDIS_URL)",
    "not migrated": "The database has no tables of ours in schema 'credits': run `credits db upgrade` first.",
    "bad value": "CREDIT_REFRESH_BATCH_SIZE='many': input should be a valid integer",
    "no broker named": "REDIS_URL is not set",
}


@pytest.fixture(scope="module")
def attempts(
    cluster: Cluster, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[int, str]]:
    """Exit code and output of each attempt. All run at once: most of their time is the start of Python."""
    migrated, empty = cluster.create(cluster.template), cluster.create("template1")
    variables = {
        "no database": {"DATABASE_URL": f"postgresql://{NOBODY_LISTENS}/credits"},
        "no broker": {"REDIS_URL": f"redis://{NOBODY_LISTENS}/0"},
        "not migrated": {"DATABASE_URL": cluster.url(empty)},
        "bad value": {"CREDIT_REFRESH_BATCH_SIZE": "many"},
        "no broker named": {"REDIS_URL": ""},
    }
    usable = {"DATABASE_URL": cluster.url(migrated), "REDIS_URL": servers.redis_url}
    state = tmp_path_factory.mktemp("state")
    started = {
        (kind, case): start(kind, state, usable | wrong)
        for case, wrong in variables.items()
        for kind in ("worker", "beat")
    }
    try:
        outputs = {key: process.communicate(timeout=SECONDS)[0] for key, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
            process.wait()
        cluster.drop(migrated)
        cluster.drop(empty)
    return {key: (started[key].returncode, output) for key, output in outputs.items()}


def start(kind: str, state: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        celery(kind),
        cwd=settings.CHECKOUT,
        env=settings.environment(CREDITS_STATE_DIR=str(state), **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("kind", ["worker", "beat"])
@pytest.mark.parametrize("case", REASONS)
def test_a_process_that_cannot_work_does_not_start(
    attempts: dict[tuple[str, str], tuple[int, str]], kind: str, case: str
) -> None:
    code, output = attempts[kind, case]
    said = [line for line in output.splitlines() if line.startswith("credits: ")]
    assert code == 1, output
    assert len(said) == 1, output
    before, _, after = REASONS[case].partition(".*")
    assert said[0].startswith(f"credits: {before}")
    assert said[0].endswith(after) or not after
    assert "Traceback" not in output
    assert output.rstrip().endswith(said[0])
