"""Rules of the house that no linter knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from settings import CHECKOUT
from tasks.app import app

PRODUCT = sorted(
    path
    for folder in ("", "api", "api/routes", "cli", "embedded", "models", "refresh", "tasks")
    for path in (CHECKOUT / folder).glob("*.py")
)


def offenders(pattern: str, *, but: str = "") -> list[str]:
    return [
        f"{path.relative_to(CHECKOUT)}:{number}"
        for path in PRODUCT
        if path.name != but
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_only_the_database_commits() -> None:
    assert len(PRODUCT) > 20
    assert offenders(r"\.(commit|rollback)\(", but="db.py") == []


def test_only_the_settings_read_the_environment() -> None:
    assert offenders(r"os\.(environ|getenv)", but="settings.py") == []


def test_nothing_is_pickled() -> None:
    assert offenders(r"\b(pickle|marshal|shelve|yaml|jsonpickle|dill)\b") == []
    assert offenders(r"(?<![\w.])(eval|exec|__import__)\(") == []


def test_messages_are_json_alone() -> None:
    used = {name: app.conf[name] for name in app.conf if name.endswith(("serializer", "accept_content"))}
    assert {name: value for name, value in used.items() if value not in (["json"], "json", None)} == {}
    assert {"accept_content", "task_serializer", "result_serializer", "event_serializer"} <= used.keys()
    assert app.conf.accept_content == ["json"]


@pytest.mark.parametrize("framework", ["celery", "fastapi", "click", "kombu", "rich", "alembic"])
def test_the_domain_knows_no_framework(framework: str) -> None:
    imports = re.compile(rf"^\s*(from|import) {framework}\b", re.MULTILINE)
    assert [path for path in (CHECKOUT / "refresh").glob("*.py") if imports.search(path.read_text())] == []


def test_the_domain_reads_no_clock() -> None:
    clock = re.compile(r"\b(datetime\.now|utcnow|time\.time)\(")
    assert [path for path in Path(CHECKOUT / "refresh").glob("*.py") if clock.search(path.read_text())] == []
