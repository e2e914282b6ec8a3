"""The Idempotency-Key header, and answers that are given twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Header, Response

from api.problems import Problem
from refresh import replay, runs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    import psycopg

KEY_MAX = 255
RETRY_SECONDS = 1

DESCRIPTION = "Any text that is this request's own. Sent again, it gets the first answer, and nothing happens twice."
REQUIRED = f"{DESCRIPTION} Without it the request is refused."
"""The document tells by it where the header is required, which is asked here, and not by the framework."""


def _header(description: str) -> Any:
    return Header(
        alias="Idempotency-Key", min_length=1, max_length=KEY_MAX, pattern=r"^[\x21-\x7e]+$", description=description
    )


IdempotencyKey = Annotated[str | None, _header(DESCRIPTION)]


def require(key: str | None) -> str:
    """The key.

    Raises:
        Problem: there is none.
    """
    if key is None:
        raise Problem("idempotency-key-missing", "send an Idempotency-Key: any text that is this request's own")
    return key


def _given(idempotency_key: Annotated[str | None, _header(REQUIRED)] = None) -> str:
    return require(idempotency_key)


RequiredKey = Annotated[str, Depends(_given)]


def claim(connection: psycopg.Connection[Any], key: str | None) -> None:
    """See that nobody is at work on a request with this key, until the transaction ends.

    Raises:
        Problem: somebody is.
    """
    if key is not None and not replay.claim_key(connection, key):
        raise in_progress(key)


def in_progress(key: str) -> Problem:
    """The first request with the key is not done."""
    detail = f"the first request with the Idempotency-Key {key!r} is not done"
    return Problem("in-progress", detail, headers={"Retry-After": str(RETRY_SECONDS)})


def first_answer(
    connection: psycopg.Connection[Any], request: runs.Request, facts: Mapping[str, Any], response: Response
) -> dict[str, Any] | None:
    """What the request's key was answered before; asked before whatever the request names is looked for.

    Raises:
        Problem: somebody is at work on a request with the key.
        KeyReusedError: that was another request.
    """
    claim(connection, request.idempotency_key)
    run = runs.find_opened(connection, request, facts)
    return replayed(connection, run.run_id, response) if run else None


def replayed(connection: psycopg.Connection[Any], run_id: UUID, response: Response) -> dict[str, Any] | None:
    """The first answer of a run that was there, marked as such; None when it has none."""
    kept = replay.kept_answer(connection, run_id)
    if kept is not None:
        response.headers["Idempotency-Replayed"] = "true"
    return kept


def accepted(response: Response, run: runs.Opened) -> None:
    """The headers of a 202: where the run is, and when to look."""
    response.headers["Location"] = f"/api/admin/runs/{run.run_id}"
    response.headers["Retry-After"] = str(RETRY_SECONDS)
