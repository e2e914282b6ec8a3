"""What webhook endpoints are told, each written to the outbox in the transaction of what it tells (docs/adr/0014).

    a batch, a run's end, the nightly audit, a silence → a row of webhook_deliveries for each endpoint that wants it

Nothing is sent here: that is webhook_outbox.py's and webhook_post.py's, after the commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from refresh.errors import NotFoundError, RefusedError

if TYPE_CHECKING:
    from uuid import UUID

    import psycopg

    from refresh.verify import Finding

EVENTS = ("run.finished", "notice.run_failed", "user.refreshed", "user.held", "verify.finding")
"""What an endpoint may ask for. `ping` comes when it is asked for, `notice.no_grants` with `no_grants_days`."""

# A clause of the statements that grant (batch.py, apply.py), for those batches alone during which somebody wants to
# know: see `TELLS`. User by user, as in _PLAN (batch.py): joined, without statistics, everybody would be read.
TELL_USERS = """
told AS (
    INSERT INTO webhook_deliveries (endpoint_id, type, payload)
    SELECT
        e.id, t.type,
        user_notice(
            h.status, u.external_id, b.run_id, 'run', d.plan_code, d.grant_mode, d.target, d.credit_balance,
            h.credits_added, d.window_start, d.window_end, d.windows_passed, u.hold_reason, u.hold_until
        )
    FROM history AS h
    JOIN decided AS d ON d.user_id = h.user_id
    CROSS JOIN batch AS b
    CROSS JOIN LATERAL (
        SELECT external_id, hold_reason, hold_until FROM users WHERE id = h.user_id
        OFFSET 0
    ) AS u
    CROSS JOIN LATERAL (
        SELECT CASE h.status WHEN 'refreshed' THEN 'user.refreshed' WHEN 'held' THEN 'user.held' END AS type
    ) AS t
    JOIN webhook_endpoints AS e ON e.active AND t.type = ANY (e.events)
),
"""
TELLS = """
EXISTS (SELECT FROM webhook_endpoints AS e WHERE e.active AND e.events && ARRAY['user.refreshed', 'user.held'])
"""
"""Whether somebody wants to know of users. Asked once a message, so that a batch of which nobody wants to know pays
nothing: its statement does not know of webhooks."""

TELL_RUNS = """
told AS (
    INSERT INTO webhook_deliveries (endpoint_id, type, payload)
    SELECT
        e.id, t.type,
        jsonb_build_object(
            'runId', f.id, 'kind', f.kind, 'work', f.work, 'source', f.source, 'status', f.status,
            'dryRun', f.dry_run, 'slot', utc_text(f.slot), 'parentRunId', f.parent_run_id,
            'requestedBy', f.requested_by, 'reason', f.reason,
            'usersSelected', f.users_selected, 'usersRefreshed', f.users_refreshed, 'usersHeld', f.users_held,
            'usersSkipped', f.users_skipped, 'usersFailed', f.users_failed, 'creditsGranted', f.credits_granted,
            'startedAt', utc_text(f.started_at), 'finishedAt', utc_text(f.finished_at), 'error', f.error,
            'correlationId', f.metadata ->> 'correlationId'
        )
    FROM finished AS f
    CROSS JOIN webhook_endpoints AS e
    CROSS JOIN LATERAL unnest(e.events) AS t (type)
    WHERE e.active
        AND (t.type = 'run.finished' OR (t.type = 'notice.run_failed' AND f.status IN ('partial', 'failed')))
)
"""
"""A clause of the statement that ends runs (totals.py), over its rows `finished`."""

EXAMPLES_MAX = 10
"""Findings of one name that a message has; `credits verify` shows the others."""

_TELL_FINDINGS = """
INSERT INTO webhook_deliveries (endpoint_id, type, payload)
SELECT e.id, 'verify.finding', %(payload)s FROM webhook_endpoints AS e
WHERE e.active AND 'verify.finding' = ANY (e.events)
"""


@dataclass(slots=True)
class Found:
    """The first findings of each name, as they come."""

    examples: dict[str, list[dict[str, object]]] = field(default_factory=dict)

    def note(self, finding: Finding) -> None:
        """Keep one, unless there are enough of its name."""
        same = self.examples.setdefault(finding.name, [])
        if len(same) < EXAMPLES_MAX:
            same.append(finding.facts())

    def tell(self, connection: psycopg.Connection[Any], counts: dict[str, int]) -> None:
        """Write a message for each name.

        Args:
            connection: in the transaction that keeps that the books were read.
            counts: all findings there were, by name.
        """
        for name, examples in self.examples.items():
            payload = {"finding": name, "count": counts[name], "examples": examples}
            connection.execute(_TELL_FINDINGS, {"payload": Jsonb(payload)})


# At most hourly: with nothing granted for long, the log is walked back to the last grant. Its primary key begins with
# the time, and a grant on any path has its row there.
_WATCHES = """
e.active AND e.no_grants_days IS NOT NULL
AND (e.silence_checked_at < now() - interval '1 hour') IS NOT FALSE
"""
_WATCHED = f"SELECT EXISTS (SELECT FROM webhook_endpoints AS e WHERE {_WATCHES})"  # noqa: S608 - a text of this module
# Once a silence: it is another one when somebody was refreshed since.
_TELL_SILENCE = f"""
WITH last AS MATERIALIZED (
    SELECT (
        SELECT occurred_at FROM credit_audit_logs WHERE action = 'refreshed' ORDER BY occurred_at DESC LIMIT 1
    ) AS at
),
checked AS (
    UPDATE webhook_endpoints AS e SET
        silence_checked_at = now(),
        silence_noticed_at = CASE
            WHEN coalesce(last.at, e.created_at) < now() - make_interval(days => e.no_grants_days)
                AND coalesce(e.silence_noticed_at < last.at, e.silence_noticed_at IS NULL)
                THEN now()
            ELSE e.silence_noticed_at
        END
    FROM last
    WHERE {_WATCHES}
    RETURNING e.id, e.no_grants_days, e.silence_noticed_at IS NOT DISTINCT FROM now() AS silent
)
INSERT INTO webhook_deliveries (endpoint_id, type, payload)
SELECT
    c.id, 'notice.no_grants',
    jsonb_build_object('days', c.no_grants_days, 'lastGrantAt', utc_text(last.at), 'paused', NOT s.enabled)
FROM checked AS c CROSS JOIN last CROSS JOIN settings AS s
WHERE c.silent
"""  # noqa: S608 - the same


def tell_silence(connection: psycopg.Connection[Any]) -> int:
    """Tell those who want to know that nobody was refreshed for so many days; each silence once.

    Args:
        connection: in autocommit. May be called every minute.

    Returns:
        How many were told.
    """
    if connection.execute(_WATCHED).fetchone() != (True,):
        return 0
    return connection.execute(_TELL_SILENCE).rowcount


_PING = """
INSERT INTO webhook_deliveries (endpoint_id, type, payload)
SELECT id, 'ping', jsonb_build_object('endpointId', id) FROM webhook_endpoints WHERE id = %(id)s AND active
RETURNING id
"""
_IS_THERE = "SELECT EXISTS (SELECT FROM webhook_endpoints WHERE id = %(id)s)"


def tell_ping(connection: psycopg.Connection[Any], endpoint_id: UUID) -> int:
    """Write a message that tests an endpoint.

    Returns:
        The delivery's id.

    Raises:
        NotFoundError: there is no such endpoint.
        RefusedError: it is not active.
    """
    row = connection.execute(_PING, {"id": endpoint_id}).fetchone()
    if row is None:
        if connection.execute(_IS_THERE, {"id": endpoint_id}).fetchone() == (True,):
            raise RefusedError(f"webhook endpoint {endpoint_id} is not active: nothing is sent there until it is")
        raise NotFoundError(f"there is no webhook endpoint {endpoint_id}")
    return int(row[0])
