"""Reading much at one instant: reports over all users and histories."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

TIMEOUT = timedelta(minutes=10)
"""How long one statement of a report may take. A forecast over a million users takes about five seconds."""

_BEGIN = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
_TIMEOUT = "SELECT set_config('statement_timeout', %s, true)"


def read_only(connection: psycopg.Connection[Any]) -> None:
    """Make a transaction one that sees one snapshot, cannot write, and may take as long as a report takes.

    Args:
        connection: at the very beginning of a transaction.
    """
    connection.execute(_BEGIN)
    connection.execute(_TIMEOUT, (str(TIMEOUT // timedelta(milliseconds=1)),))
