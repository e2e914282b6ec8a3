"""Partitions of the coming months, made ahead of time; and what is true of a run whose months were dropped."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    import psycopg

MONTHS_AHEAD = 3
LOCK_TIMEOUT = timedelta(milliseconds=50)
"""Attaching waits for whoever reads the default partition, a dump perhaps, and others queue behind it: not for long."""

GONE = "coalesce(r.created_at < (SELECT books_since FROM settings), false) AS gone"
"""Whether a run `r` is older than the books: retention has dropped its rows, or some of them."""
GONE_AS_OF = "coalesce(least(r.created_at, r.as_of) < (SELECT books_since FROM settings), false) AS gone"
"""The same, for those who would decide as of its instant once more, which nobody can before the books."""

_MISSING = """
SELECT count(*) FROM generate_series(0, %(months)s) AS month
CROSS JOIN (VALUES ('credit_refresh_histories'), ('credit_audit_logs')) AS parent (name)
WHERE to_regclass(parent.name || to_char(now() AT TIME ZONE 'UTC' + make_interval(months => month),
    '"_y"YYYY"m"MM')) IS NULL
"""
_ENSURE = "SELECT ensure_partitions(now(), %(months)s)"
_MONTHS_UNTIL = """
SELECT greatest(0, 12 * extract(year FROM age(%(until)s, date_trunc('month', now())))
    + extract(month FROM age(%(until)s, date_trunc('month', now()))))::integer
"""


def ensure_partitions(connection: psycopg.Connection[Any], *, until: datetime | None = None) -> list[str]:
    """Make the partitions that are missing, of this month and those that come; returns their names.

    Args:
        connection: in a transaction whose lock waits are short.
        until: make them up to its month, for a dry run that looks ahead; None: `MONTHS_AHEAD`.

    Raises:
        psycopg.errors.LockNotAvailable: somebody reads the tables; nothing was made, and the next upkeep tries again.
    """
    months = MONTHS_AHEAD
    if until is not None:
        row = connection.execute(_MONTHS_UNTIL, {"until": until}).fetchone()
        months = row[0] if row else MONTHS_AHEAD
    missing = connection.execute(_MISSING, {"months": months}).fetchone()
    if missing is None or missing[0] == 0:
        return []
    return [name for (name,) in connection.execute(_ENSURE, {"months": months})]


def gone_text(run_id: UUID) -> str:
    """Why nothing can be done about a run that is older than the books, for people."""
    return f"run {run_id}, or the instant it decided as of, is older than the books: retention has dropped rows of it"
