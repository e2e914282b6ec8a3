"""The HTTP API: thin over `refresh/`, as the commands are. `uvicorn api:app` serves it."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Build `api:app` when a server asks for it, once: whoever imports a module of this package needs no environment.

    No module here may be called `app`: importing it would put it in the application's place.
    """
    if name != "app":
        raise AttributeError(name)
    from api.application import from_environment  # noqa: PLC0415

    return globals().setdefault("app", from_environment())
