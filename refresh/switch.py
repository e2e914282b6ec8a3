"""The switch: while it is off, no path grants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

# A worker that meets a batch while paused puts it down. On resume all of them are new to the queue: nobody tried them.
_FORGET_PUBLISHED = """
UPDATE credit_refresh_batches SET published_at = NULL WHERE status = 'pending' AND next_attempt_at IS NULL
"""

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
    changed = connection.execute(_TURN, {"enabled": enabled, "actor": actor}).rowcount == 1
    if changed and enabled:
        connection.execute(_FORGET_PUBLISHED)
    return changed
