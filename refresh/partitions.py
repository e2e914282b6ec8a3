"""Partitions of the coming months, made ahead of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

MONTHS_AHEAD = 3

_MISSING = """
SELECT to_regclass(format('credit_audit_logs_%%s', to_char(now() + make_interval(months => %(months)s),
    '"y"YYYY"m"MM'))) IS NULL
"""
_ENSURE = "SELECT ensure_partitions(now(), %(months)s)"


def ensure_partitions(connection: psycopg.Connection[Any]) -> list[str]:
    """Make the partitions of this month and the next `MONTHS_AHEAD` that are missing; returns their names.

    Attaching a partition locks its table for an instant. A wait for that lock ends by `lock_timeout`, and the next
    upkeep tries again: there are months left.
    """
    row = connection.execute(_MISSING, {"months": MONTHS_AHEAD}).fetchone()
    if row is None or not row[0]:
        return []
    return [name for (name,) in connection.execute(_ENSURE, {"months": MONTHS_AHEAD})]
