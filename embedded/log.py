"""What the servers wrote last, for error messages of one line."""

from __future__ import annotations

from pathlib import Path

_LINES = 4
_CHARACTERS = 600


def fresh_log(path: Path) -> Path:
    """Put the log of the previous run aside, as one file, so that logs do not grow without bound."""
    if path.exists():
        path.replace(path.with_suffix(".log.1"))
    path.touch(mode=0o600)
    return path


def excerpt(log: Path | bytes) -> str:
    """The last lines of a log as one line, and where the rest is."""
    text = (log.read_bytes() if isinstance(log, Path) else log).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()][-_LINES:]
    last = " | ".join(lines)[-_CHARACTERS:] or "it wrote nothing"
    return f"{last} (log: {log})" if isinstance(log, Path) else last
