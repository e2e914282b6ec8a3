"""The switch: while it is off, no path grants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

_TURN = """
WITH turned AS (UPDATE settings SET enabled = %(enabled)s WHERE enabled <> %(enabled)s RETURNING enabled)
INSERT INTO credit_audit_logs (actor, action)
SELECT %(actor)s, CASE WHEN enabled THEN 'resumed' ELSE 'paused' END FROM turned
"""


def turn(connection: psycopg.Connection[Any], *, enabled: bool, actor: str) -> bool:
    """Turn the service on or off; the audit log keeps who did.

    Returns:
        Whether that changed anything.
    """
    return connection.execute(_TURN, {"enabled": enabled, "actor": actor}).rowcount == 1
