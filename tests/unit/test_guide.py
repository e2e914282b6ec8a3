"""docs/guide.md and .env.example leave out no setting; the guide, no command."""

from __future__ import annotations

import re

from cli import main
from settings import CHECKOUT, Settings
from tests.integration.command import names_of

GUIDE = (CHECKOUT / "docs" / "guide.md").read_text()
DEMO = "credit_refresh_interval_seconds"
"""For demos and tests alone: compose has no use for it."""
ITS_OWN = {"database_url", "redis_url", "credits_state_dir", DEMO}
"""What docker-compose.yml sets by itself."""


def rows(heading: str) -> str:
    """The first cells of a section's tables."""
    section = GUIDE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `"))


def test_every_setting_is_in_the_table_and_no_other() -> None:
    assert set(re.findall(r"`([A-Z_]+)`", rows("Settings"))) == {name.upper() for name in Settings.model_fields}


def test_every_setting_that_compose_takes_is_in_its_example() -> None:
    example = set(re.findall(r"^#?([A-Z_]+)=", (CHECKOUT / ".env.example").read_text(), re.MULTILINE))
    assert {name.upper() for name in Settings.model_fields.keys() - ITS_OWN} <= example


def test_every_command_is_in_the_table() -> None:
    """In full, or after a comma: `credits keys create`, `list`."""
    commands = rows("Commands").splitlines()

    def named(command: tuple[str, ...]) -> bool:
        *groups, last = command
        group = " ".join(("credits", *groups))
        return any(
            row.startswith(f"| `{group} ") and re.search(rf"(`|{re.escape(group)} ){re.escape(last)}\b", row)
            for row in commands
        )

    assert [command for command in names_of(main) if not named(command)] == []
