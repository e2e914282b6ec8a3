"""docs/api.md names routes, scopes, problems and calls: each is as the application has it, and none is missing."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from api.application import create_app
from api.problems import KINDS
from api.routes.bulk import BulkBody
from api.routes.run_actions import RollbackBody
from api.routes.users import RefreshBody, SettingsBody
from settings import CHECKOUT, Settings
from tests.acceptance.test_api_rights import TABLE

if TYPE_CHECKING:
    from api.schema import Body

TEXT = (CHECKOUT / "docs" / "api.md").read_text()
ROUTES = {
    f"{method.upper()} {path}"
    for path, operations in create_app(Settings(database_url="postgresql://nobody@127.0.0.1:1/none"))
    .openapi()["paths"]
    .items()
    for method in operations
}
ROWS = re.findall(r"^\| `([A-Z]+ /[^`]+)` \| ([^|]+) \|", TEXT, re.MULTILINE)
WHO = ("everybody", "the admin token", "`read`", "`support`", "`admin`", "the user", "cron")
BODIES: dict[str, type[Body]] = {
    "refresh-credits": RefreshBody,
    "bulk-refresh": BulkBody,
    "rollback": RollbackBody,
    "refresh-settings": SettingsBody,
}


def test_its_routes_are_those_of_the_application() -> None:
    assert len(ROWS) == len({route for route, _ in ROWS})
    assert {route for route, _ in ROWS} == ROUTES


@pytest.mark.parametrize(("route", "said"), ROWS)
def test_its_scopes_are_those_of_the_matrix(route: str, said: str) -> None:
    """The least that opens a route."""
    statuses = TABLE[route.replace("{userId}", "{userId:path}")]
    opened = [who for who, status in zip(WHO, statuses, strict=True) if status not in {401, 403}]
    least = next((who for who in opened if who != "the admin token"), "Stripe")
    assert said.startswith(least)


def test_its_problems_are_those_that_there_are() -> None:
    found = dict(re.findall(r"^\| `/problems/([a-z-]+)` \| (\d+) \|", TEXT, re.MULTILINE))
    assert {slug: int(status) for slug, status in found.items()} == {slug: kind.status for slug, kind in KINDS.items()}


CALLS = [
    line.replace("\\\n", " ") for line in re.findall(r"^curl (?:.*\\\n)*.*$", TEXT, re.MULTILINE) if "$CREDITS" in line
]


@pytest.mark.parametrize("call", CALLS)
def test_its_calls_are_such_as_the_application_takes(call: str) -> None:
    words = shlex.split(call)
    method = words[words.index("-X") + 1] if "-X" in words else "GET"
    (url,) = [word for word in words if word.startswith("$CREDITS")]
    path = urlsplit(url.removeprefix("$CREDITS")).path
    patterns = {
        route: re.sub(r"\{\w+\}", "[^/]+", route.split()[1]) for route in ROUTES if route.startswith(f"{method} ")
    }
    assert [route for route, pattern in patterns.items() if re.fullmatch(pattern, path)]
    if "--json" in words:
        body = json.loads(words[words.index("--json") + 1])
        assert BODIES[path.rpartition("/")[2]].model_validate(body)
    keyed = any(word.startswith("Idempotency-Key: ") for word in words)
    assert keyed or path.rpartition("/")[2] not in {"bulk-refresh", "apply", "rollback", "retry"}


def test_its_calls_are_found() -> None:
    assert len(CALLS) >= 7
