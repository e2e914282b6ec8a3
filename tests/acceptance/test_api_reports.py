"""Statistics and forecast: what the commands say, as JSON."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.http_service import fresh_key, problem
from tests.integration.command import Cli

if TYPE_CHECKING:
    import httpx

    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> httpx.Client:
    """After some runs, of which one had a user who failed."""
    made, world = deployment.client(), deployment.world
    for number in range(12):
        world.user(f"report-{number}", credit_balance=number)
    world.sql.execute(
        "ALTER TABLE users ADD CONSTRAINT host_limit CHECK (external_id <> 'report-3' OR credit_balance < 9)"
    )
    for body in ({"all": True, "dryRun": True}, {"all": True}):
        run = made.post("/api/admin/credits/bulk-refresh", json=body, headers=fresh_key()).json()
        world.work(world.value("SELECT array_agg(id) FROM credit_refresh_batches WHERE run_id = %s", run["runId"]))
    world.sql.execute("ALTER TABLE users DROP CONSTRAINT host_limit")
    return made


@pytest.fixture
def cli(deployment: Deployment) -> Cli:
    return Cli(deployment.env["DATABASE_URL"], deployment.redis.url)


@pytest.mark.parametrize(
    ("query", "arguments"),
    [({}, []), ({"days": 1}, ["--days", "1"]), ({"since": "2026-01-01T00:00:00+02:00"},
        ["--since", "2026-01-01T00:00:00+02:00"])],
)  # fmt: skip
def test_stats_are_those_of_the_command(
    client: httpx.Client, cli: Cli, query: dict[str, Any], arguments: list[str]
) -> None:
    answer = client.get("/api/admin/credits/refresh-stats", params=query)
    told, shown = _settled(answer.json()), _settled(cli.facts("stats", *arguments))
    for facts in (told, shown):
        del facts["at"]
        if "since" not in query:  # the period ends now, and so begins a moment later
            del facts["since"], facts["grants"]["windowsSince"]
    assert told == shown


@pytest.mark.parametrize("changes", [[], ["pro.amount=25000"], ["free.cadence=daily", "free.time_of_day=04:30"]])
def test_the_forecast_is_that_of_the_command(client: httpx.Client, cli: Cli, world: World, changes: list[str]) -> None:
    world.user(f"forecast-{len(changes)}", due_in="2 days")
    answer = client.get("/api/admin/credits/forecast", params={"days": 10, "set": changes})
    assert answer.status_code == 200, answer.text
    options = [word for change in changes for word in ("--set", change)]
    told, shown = _settled(answer.json()), _settled(cli.facts("forecast", "--days", "10", *options))
    del told["at"], shown["at"]
    assert told == shown
    assert (told["whatIf"] is not None) == bool(changes)


@pytest.mark.parametrize(
    ("route", "query", "status", "slug"),
    [
        ("refresh-stats", {"days": 0}, 422, "invalid-request"),
        ("refresh-stats", {"days": 1, "since": "2026-01-01T00:00:00Z"}, 422, "invalid-request"),
        ("refresh-stats", {"since": "2999-01-01T00:00:00Z"}, 409, "refused"),
        ("forecast", {"days": 100_000}, 422, "invalid-request"),
        ("forecast", {"set": "amount"}, 422, "invalid-request"),
        ("forecast", {"set": "pro.secret=1"}, 422, "invalid-request"),
        ("forecast", {"set": "platinum.amount=1"}, 409, "refused"),
        ("forecast", {"set": ["pro.amount=1"] * 21}, 422, "invalid-request"),
    ],
)
def test_what_is_refused(client: httpx.Client, route: str, query: dict[str, Any], status: int, slug: str) -> None:
    said = problem(client.get(f"/api/admin/credits/{route}", params=query), status, slug)
    if status == 422:
        assert said["errors"][0]["field"].startswith("query.")


def _settled(value: Any) -> Any:
    """Instants as instants, however their zone is written."""
    if isinstance(value, dict):
        return {name: _settled(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_settled(item) for item in value]
    if isinstance(value, str) and "T" in value and value[:4].isdecimal():
        return datetime.fromisoformat(value)
    return value
