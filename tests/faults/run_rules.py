"""The rules about runs, batches and whole tables: queries that find nothing, each row being a finding's text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple

from tests.faults.books import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg


class Rule(NamedTuple):
    """A rule, and what breaks it.

    Attributes:
        name: as findings carry it.
        query: of one column, the text.
        finished: it holds once the service has had the time to finish.
    """

    name: str
    query: LiteralString
    finished: bool = False


_STILL_RUNNING = """
SELECT format('run %s (%s, opened at %s) is still running, with %s batches pending', r.id, r.kind, r.created_at,
    (SELECT count(*) FROM credit_refresh_batches AS b WHERE b.run_id = r.id AND b.status = 'pending'))
FROM credit_refresh_runs AS r WHERE r.status = 'running'
"""
_ENDED_EARLY = """
SELECT format('run %s has ended (%s) with %s batches pending', r.id, r.status, count(*))
FROM credit_refresh_runs AS r JOIN credit_refresh_batches AS b ON b.run_id = r.id
WHERE r.status <> 'running' AND b.status = 'pending'
GROUP BY r.id
"""

# What a run says of itself when it has ended, against the sums of its batches.
_TOTALS = """
WITH sums AS (
    SELECT
        run_id, count(*) AS batches, sum(users_refreshed) AS refreshed, sum(users_held) AS held,
        sum(users_skipped) AS skipped, sum(credits_granted) AS credits,
        sum(CASE status WHEN 'failed' THEN cardinality(user_ids) ELSE users_failed END) AS failed,
        coalesce(sum(cardinality(user_ids)) FILTER (WHERE status = 'cancelled'), 0) AS cancelled
    FROM credit_refresh_batches GROUP BY run_id
),
told AS (
    SELECT
        r.id, r.status, r.users_selected AS selected,
        ARRAY[r.batches_total, r.users_refreshed, r.users_held, r.users_skipped, r.users_failed, r.credits_granted]
            ::numeric[] AS totals,
        ARRAY[coalesce(s.batches, 0), coalesce(s.refreshed, 0), coalesce(s.held, 0), coalesce(s.skipped, 0),
            coalesce(s.failed, 0), coalesce(s.credits, 0)]::numeric[] AS summed,
        coalesce(s.refreshed + s.held + s.skipped + s.failed + s.cancelled, 0) AS accounted,
        CASE
            WHEN s.cancelled > 0 THEN 'cancelled'
            WHEN coalesce(s.failed, 0) = 0 THEN 'succeeded'
            WHEN s.refreshed + s.held + s.skipped > 0 THEN 'partial'
            ELSE 'failed'
        END AS ending
    FROM credit_refresh_runs AS r LEFT JOIN sums AS s ON s.run_id = r.id
    WHERE r.status <> 'running'
)
SELECT format('run %s (%s) says %s, its batches %s (%s); %s users were selected and %s accounted for',
    id, status, totals, summed, ending, selected, accounted)
FROM told
WHERE (totals, status, selected) IS DISTINCT FROM (summed, ending, accounted)
"""

# A batch counts in the transaction that writes the rows, so the two agree at any instant. A regrid writes none.
_ROWS = """
WITH counted AS (
    SELECT
        run_id, sum(users_refreshed) AS refreshed, sum(users_failed) AS failed, sum(users_held) AS held,
        sum(credits_granted) AS credits
    FROM credit_refresh_batches WHERE status = 'done' GROUP BY run_id
),
written AS (
    SELECT
        h.run_id, count(*) FILTER (WHERE h.status = k.status) AS refreshed,
        count(*) FILTER (WHERE h.status = 'failed') AS failed, count(*) FILTER (WHERE h.status = 'held') AS held,
        coalesce(sum(h.credits_added) FILTER (WHERE h.status = k.status), 0) AS credits
    FROM credit_refresh_histories AS h
    JOIN credit_refresh_runs AS r ON r.id = h.run_id
    CROSS JOIN LATERAL (
        SELECT CASE WHEN r.dry_run THEN 'planned' WHEN r.work = 'rollback' THEN 'reversed' ELSE 'refreshed' END
            AS status
    ) AS k
    GROUP BY h.run_id
)
SELECT format('run %s: %s refreshed, %s failed and %s credits by its batches, %s, %s and %s by the history', r.id,
    c.refreshed, c.failed, c.credits, coalesce(w.refreshed, 0), coalesce(w.failed, 0), coalesce(w.credits, 0))
FROM counted AS c
JOIN credit_refresh_runs AS r ON r.id = c.run_id
LEFT JOIN written AS w ON w.run_id = c.run_id
WHERE r.work <> 'regrid' AND (
    (c.refreshed, c.credits) <> (coalesce(w.refreshed, 0), coalesce(w.credits, 0))
    -- A plan of somebody who fails has no row.
    OR NOT r.dry_run AND (c.failed <> coalesce(w.failed, 0) OR c.held < coalesce(w.held, 0))
)
"""
_GIVEN_UP = """
SELECT format('batch %s of run %s was given up: %s', b.id, b.run_id, b.error)
FROM credit_refresh_batches AS b WHERE b.status = 'failed' AND NOT b.atomic
"""

# An error about a user is that user's alone: nobody else waits with them.
_ALL_BECAUSE_OF_ONE = """
SELECT format('batch %s of run %s, %s users, was undone as a whole: %s', b.id, b.run_id, cardinality(b.user_ids),
    b.error)
FROM credit_refresh_batches AS b
WHERE NOT b.atomic AND cardinality(b.user_ids) > 1
    AND b.error ~ 'the host refuses|current transaction is aborted'
"""
_SLOT = """
SELECT format('%s runs for the slot %s', count(*), slot)
FROM credit_refresh_runs WHERE slot IS NOT NULL GROUP BY slot, dry_run HAVING count(*) > 1
"""

# Whoever got an answer got that of the one run of the key, however often it was asked.
_KEY = """
WITH runs AS (
    SELECT idempotency_key AS key, array_agg(id::text ORDER BY id) AS ids
    FROM credit_refresh_runs WHERE idempotency_key IS NOT NULL GROUP BY idempotency_key
),
answers AS (
    SELECT key, array_agg(DISTINCT answer ->> 'runId' ORDER BY answer ->> 'runId') AS ids
    FROM host.asked WHERE key IS NOT NULL AND exit_code IN (0, 3) AND answer ->> 'runId' IS NOT NULL GROUP BY key
)
SELECT format('the key %s opened the runs %s, and those who asked were told of %s', key, r.ids, a.ids)
FROM runs AS r FULL JOIN answers AS a USING (key)
WHERE cardinality(coalesce(r.ids, '{}')) <> 1 OR a.ids <> r.ids
"""
_DRY_RUN = """
SELECT format('run %s (dry: %s) wrote %s rows of status %s', r.id, r.dry_run, count(*), h.status)
FROM credit_refresh_histories AS h JOIN credit_refresh_runs AS r ON r.id = h.run_id
WHERE r.dry_run <> (h.status = 'planned')
GROUP BY r.id, h.status
UNION ALL
SELECT format('dry run %s: %s of user %s in the audit log', r.id, a.action, a.user_id)
FROM credit_audit_logs AS a JOIN credit_refresh_runs AS r ON r.id = a.run_id
WHERE r.dry_run AND (a.user_id IS NOT NULL OR a.credits <> 0)
UNION ALL
SELECT format('run %s was asked for as a dry run and is none', r.id)
FROM host.asked AS a JOIN credit_refresh_runs AS r ON r.id::text = a.answer ->> 'runId'
WHERE a.what = 'dry-run' AND NOT r.dry_run
"""

# Each grant that was taken back knows by whom, and that run has one row for it.
_ROLLBACK = """
WITH grants AS (
    SELECT user_id, window_start, reversed_by_run_id AS run_id, count(*) AS grants, min(run_id::text) AS granted_by
    FROM credit_refresh_histories WHERE reversed_by_run_id IS NOT NULL GROUP BY 1, 2, 3
),
reversals AS (
    SELECT user_id, window_start, run_id, count(*) AS reversals
    FROM credit_refresh_histories WHERE status = 'reversed' GROUP BY 1, 2, 3
)
SELECT format('user %s, window %s: %s grants are marked as taken back by run %s, which has %s rows for them', user_id,
    window_start, coalesce(g.grants, 0), run_id, coalesce(v.reversals, 0))
FROM grants AS g FULL JOIN reversals AS v USING (user_id, window_start, run_id)
LEFT JOIN credit_refresh_runs AS r ON r.id = run_id
WHERE (g.grants, v.reversals, r.work, r.subject_run_id::text) IS DISTINCT FROM (1, 1, 'rollback', g.granted_by)
"""

# The ledger twice: row by row the same, instant included, for both were written by one transaction.
_AUDIT = """
WITH history AS (
    SELECT
        user_id, run_id, CASE status WHEN 'failed' THEN 'refresh_failed' ELSE status END AS action, old_balance,
        new_balance, credits_added, created_at
    FROM credit_refresh_histories WHERE status <> 'planned'
),
audit AS (
    SELECT user_id, run_id, action, balance_before, balance_after, credits, occurred_at
    FROM credit_audit_logs WHERE action IN ('refreshed', 'reversed', 'held', 'skipped', 'refresh_failed')
)
SELECT format('%s of user %s by run %s, %s to %s: in the history and not in the audit log', action, user_id, run_id,
    old_balance, new_balance)
FROM (SELECT * FROM history EXCEPT ALL SELECT * FROM audit) AS h
UNION ALL
SELECT format('%s of user %s by run %s, %s to %s: in the audit log and not in the history', action, user_id, run_id,
    balance_before, balance_after)
FROM (SELECT * FROM audit EXCEPT ALL SELECT * FROM history) AS a
UNION ALL
SELECT format('%s of user %s moved %s credits, from %s to %s', action, user_id, credits, balance_before, balance_after)
FROM credit_audit_logs
WHERE user_id IS NOT NULL AND balance_after <> balance_before + credits
    OR action NOT IN ('refreshed', 'reversed') AND credits <> 0
"""

# Of a user's runs in the order in which they were opened: when the later one found them, their batches of the one
# before had ended, by what its transaction could see. A rollback and an apply take whom they are told to.
_TWO_BATCHES = """
WITH run AS (
    SELECT r.id, r.work, b.id AS first_batch, m.seen, m.xid
    FROM credit_refresh_runs AS r
    CROSS JOIN LATERAL (SELECT min(id) AS id FROM credit_refresh_batches WHERE run_id = r.id) AS b
    JOIN host.batch_marks AS m ON m.batch_id = b.id AND m.status = 'pending'
    WHERE NOT r.dry_run AND r.work <> 'regrid'
),
stay AS (
    SELECT b.run_id, u.user_id, max(e.xid::text::bigint) AS ended, bool_and(e.xid IS NOT NULL) AS has_ended
    FROM credit_refresh_batches AS b
    CROSS JOIN LATERAL unnest(b.user_ids) AS u (user_id)
    LEFT JOIN host.batch_marks AS e ON e.batch_id = b.id AND e.status <> 'pending'
    GROUP BY b.run_id, u.user_id
),
pairs AS (
    SELECT
        s.user_id, run.id AS run_id, run.work, run.seen, run.xid, lag(run.id) OVER earlier AS before_id,
        lag(s.ended) OVER earlier AS ended, lag(s.has_ended) OVER earlier AS has_ended
    FROM stay AS s JOIN run ON run.id = s.run_id
    WINDOW earlier AS (PARTITION BY s.user_id ORDER BY run.first_batch)
)
SELECT format('run %s was opened for user %s, whose batch of run %s was not done', run_id, user_id, before_id)
FROM pairs
WHERE work = 'refresh' AND before_id IS NOT NULL AND NOT (
    has_ended AND (pg_visible_in_snapshot(ended::text::xid8, seen) OR ended = xid::text::bigint)
)
"""

RULES = (
    Rule("unfinished", _STILL_RUNNING, finished=True),
    Rule("runs", _ENDED_EARLY),
    Rule("runs", _TOTALS),
    Rule("runs", _ROWS),
    Rule("given-up", _GIVEN_UP),
    Rule("poison", _ALL_BECAUSE_OF_ONE),
    Rule("slot", _SLOT),
    Rule("key", _KEY),
    Rule("dry-run", _DRY_RUN),
    Rule("rollback", _ROLLBACK),
    Rule("audit", _AUDIT),
    Rule("two-batches", _TWO_BATCHES),
)

# At one instant, while it lasts.
_PENDING_TWICE = """
WITH run AS MATERIALIZED (
    SELECT r.id, r.work, (
        SELECT b.id FROM credits.credit_refresh_batches AS b WHERE b.run_id = r.id ORDER BY b.seq, b.id LIMIT 1
    ) AS first_batch
    FROM credits.credit_refresh_runs AS r
    WHERE r.status = 'running' AND NOT r.dry_run AND r.work <> 'regrid'
)
SELECT format('user %s is in unfinished batches of the runs %s', u.user_id, array_agg(run.id ORDER BY first_batch))
FROM run
JOIN credits.credit_refresh_batches AS b ON b.run_id = run.id AND b.status = 'pending'
CROSS JOIN LATERAL unnest(b.user_ids) AS u (user_id)
GROUP BY u.user_id
HAVING count(*) > 1 AND (array_agg(run.work ORDER BY first_batch DESC))[1] = 'refresh'
LIMIT 20
"""


def watch(connection: psycopg.Connection[Any]) -> list[Finding]:
    """Who is in two unfinished batches at this instant.

    Args:
        connection: in autocommit; several times a second while the service works.
    """
    return [Finding("two-batches", text) for (text,) in connection.execute(_PENDING_TWICE)]


def broken_rules(connection: psycopg.Connection[Any], *, finished: bool) -> Iterator[Finding]:
    """What breaks the rules of this module.

    Args:
        connection: in a transaction of one snapshot, which finds the service's tables by their names alone.
        finished: whether the service has had the time to finish.
    """
    for rule in RULES:
        if finished or not rule.finished:
            for (text,) in connection.execute(rule.query):
                yield Finding(rule.name, text)
