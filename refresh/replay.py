"""Requests that come twice: the first answer to one is kept in the row of the run that it opened.

The run itself refuses a second one under the same idempotency key. What is added here: two that come at once do not
wait for each other, and the second gets the first one's very answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from db import one

if TYPE_CHECKING:
    from uuid import UUID

    import psycopg

_LOCK = "SELECT pg_try_advisory_xact_lock(hashtextextended(current_schema() || '.key.' || %s, 0))"
_STORE = """
UPDATE credit_refresh_runs SET metadata = metadata || jsonb_build_object('answer', %(answer)s::jsonb)
WHERE id = %(run_id)s AND idempotency_key IS NOT NULL AND NOT metadata ? 'answer'
"""
_READ = "SELECT metadata -> 'answer' FROM credit_refresh_runs WHERE id = %(run_id)s"


def claim_key(connection: psycopg.Connection[Any], key: str) -> bool:
    """Whether nobody else is at work on a request with this key; nobody is until the transaction ends."""
    return bool(one(connection.execute(_LOCK, (key,)))[0])


def keep_answer(connection: psycopg.Connection[Any], run_id: UUID, answer: dict[str, Any]) -> dict[str, Any]:
    """Keep the answer to the request that opened a run, unless it has one.

    Returns:
        The one that is kept; the given one of a run without a key.
    """
    connection.execute(_STORE, {"run_id": run_id, "answer": Jsonb(answer)})
    return kept_answer(connection, run_id) or answer


def kept_answer(connection: psycopg.Connection[Any], run_id: UUID) -> dict[str, Any] | None:
    """The first answer; None while there is none."""
    found: dict[str, Any] | None = one(connection.execute(_READ, {"run_id": run_id}))[0]
    return found
