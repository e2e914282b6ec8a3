"""The switches: granting on any path, and the refresh on spend."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from db import one

if TYPE_CHECKING:
    import psycopg

TRIGGER_LOCK_TIMEOUT = timedelta(seconds=5)
"""As a migration's: whoever waits for the table's lock holds up every spend that comes behind."""

# A worker that meets a batch while paused puts it down. On resume all of them are new to the queue: nobody tried them.
_FORGET_PUBLISHED = """
UPDATE credit_refresh_batches AS b SET published_at = NULL
FROM (
    SELECT id FROM credit_refresh_batches WHERE status = 'pending' AND next_attempt_at IS NULL
    FOR NO KEY UPDATE SKIP LOCKED -- a worker that has one is doing it
) AS idle
WHERE b.id = idle.id
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


_HAS_TRIGGER = """
SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'users'::regclass AND tgname = 'refresh_on_spend')
"""
# A spend, by somebody who is due; most of our own statements add credits or move the date in the same UPDATE, and the
# function knows the others. A BEFORE trigger may ask for the old row's generated column alone, and that is the one that
# counts.
_CREATE_TRIGGER = """
CREATE TRIGGER refresh_on_spend BEFORE UPDATE OF credit_balance ON users
    FOR EACH ROW WHEN (
        new.credit_balance < old.credit_balance AND old.wake_at <= now()
        AND new.next_refresh_at IS NOT DISTINCT FROM old.next_refresh_at
    ) EXECUTE FUNCTION refresh_on_spend()
"""
_DROP_TRIGGER = "DROP TRIGGER refresh_on_spend ON users"
_AUDIT = "INSERT INTO credit_audit_logs (actor, action) VALUES (%(actor)s, %(action)s)"


def turn_trigger(connection: psycopg.Connection[Any], *, on: bool, actor: str) -> bool:
    """Put the trigger that refreshes on a spend on the table, or take it off; the audit log keeps who did.

    Args:
        connection: in a transaction with a `lock_timeout`.
        on: whether it is to be there.
        actor: who asks.

    Returns:
        Whether that changed anything.
    """
    if one(connection.execute(_HAS_TRIGGER))[0] == on:
        return False
    connection.execute(_CREATE_TRIGGER if on else _DROP_TRIGGER)
    action = "spend_trigger_on" if on else "spend_trigger_off"
    connection.execute(_AUDIT, {"actor": actor, "action": action})
    return True
