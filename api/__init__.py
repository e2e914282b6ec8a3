"""The HTTP API: thin over `refresh/`, as the commands are. `uvicorn api:app` serves it."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Build `api:app` when a server asks for it: whoever imports a module of this package needs no environment."""
    if name != "app":
        raise AttributeError(name)
    from api.app import from_environment  # noqa: PLC0415

    return from_environment()
