"""The HTTP API as people start it: with `credits up`, and by Uvicorn."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

import settings
from tests.acceptance.nodes import free_port
from tests.integration.command import CREDITS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from embedded import Servers

SECONDS = 60.0
TOKEN = "an-admin-token-of-the-tests"  # noqa: S105 - made up


@pytest.fixture
def environment(database_url: str, servers: Servers, tmp_path: Path) -> dict[str, str]:
    return settings.environment(
        DATABASE_URL=database_url, REDIS_URL=servers.redis_url, CREDITS_STATE_DIR=str(tmp_path / "state"), COLUMNS="200"
    )


@contextmanager
def up(environment: dict[str, str], log: Path) -> Iterator[tuple[str, str]]:
    """`credits up` with ports of its own; the API's address once it answers, and the line that names it."""
    port = free_port()
    argv = [str(CREDITS), "up", "--workers", "1", "--api-port", str(port), "--flower-port", str(free_port())]
    with log.open("w") as output:
        process = subprocess.Popen(
            argv, env=environment, cwd=settings.CHECKOUT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        (line,) = re.findall(r"^API .*$", log.read_text(), re.MULTILINE)
        yield url, line
    finally:
        process.terminate()
        process.wait(SECONDS)
    assert not _answers(url)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_credits_up_serves_it_with_a_token_of_its_own(environment: dict[str, str], tmp_path: Path) -> None:
    with up({**environment, "ADMIN_TOKEN": ""}, tmp_path / "up.log") as (url, line):
        found = re.fullmatch(rf"API +{url}/docs  admin token: (\S+)  \(shown once\)", line)
        assert found
        headers = {"Authorization": f"Bearer {found[1]}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client:
            assert "swagger-ui" in client.get("/docs").text
            status = client.get("/api/reset/status").json()
            assert (status["workersAlive"], status["beatAlive"]) == (True, True)
            assert status["lastRun"]["source"] == "beat"
    assert (tmp_path / "up.log").read_text().count(found[1]) == 1


def test_credits_up_takes_the_token_of_the_environment(environment: dict[str, str], tmp_path: Path) -> None:
    with up({**environment, "ADMIN_TOKEN": TOKEN}, tmp_path / "up.log") as (url, line):
        assert line.endswith("admin token: that of ADMIN_TOKEN")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{url}/api/admin/runs", headers=headers, timeout=30, trust_env=False).status_code == 200
    assert TOKEN not in (tmp_path / "up.log").read_text()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DATABASE_URL": ""}, "credits: DATABASE_URL is not set"),
        ({"DATABASE_URL": "mysql://x"}, "credits: DATABASE_URL: must start with postgresql://"),
        ({"CREDIT_REFRESH_BATCH_SIZE": "many"}, "credits: CREDIT_REFRESH_BATCH_SIZE='many': "),
        ({"ADMIN_TOKEN": "short"}, "credits: ADMIN_TOKEN: must have 16 characters at least"),
        ({"API_RATE_LIMIT": "often"}, "credits: API_RATE_LIMIT='often': must be"),
        ({"JWT_SECRET": "x" * 40, "JWKS_URL": "https://auth.example.com/jwks"}, "credits: JWKS_URL: cannot be beside"),
    ],
)
def test_a_bad_setting_ends_with_one_line(environment: dict[str, str], variables: dict[str, str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "uvicorn", "api:app", f"--port={free_port()}"],
        env={**environment, **variables}, cwd=settings.CHECKOUT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(says), done.stderr
    assert done.stdout == ""
