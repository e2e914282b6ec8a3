"""The runs' checks, as verify_ledger.py's: lost runs, totals, runs that do not move, users whom none of them took."""

from __future__ import annotations

from refresh.verify_kinds import SINCE, Check

# By run: one that was deleted may leave a million rows behind.
_ORPHANS = """
WITH named AS (
    SELECT run_id, count(*) AS history_rows, 0::bigint AS audit_rows
    FROM credit_refresh_histories WHERE run_id IS NOT NULL GROUP BY run_id
    UNION ALL
    SELECT run_id, 0, count(*) FROM credit_audit_logs WHERE run_id IS NOT NULL GROUP BY run_id
    UNION ALL
    SELECT reversed_by_run_id, count(*), 0
    FROM credit_refresh_histories WHERE reversed_by_run_id IS NOT NULL GROUP BY reversed_by_run_id
)
SELECT
    'orphan_rows' AS finding, NULL::bigint AS user_id, n.run_id, sum(n.history_rows)::bigint AS history_rows,
    sum(n.audit_rows)::bigint AS audit_rows
FROM named AS n
WHERE NOT EXISTS (SELECT FROM credit_refresh_runs AS r WHERE r.id = n.run_id)
GROUP BY n.run_id
"""

# As totals.py sums them. Of a cancelled run the users of its cancelled batches are in none of the counts. Batches of
# runs that ended before the books begin are gone, or may be.
_TOTALS = f"""
WITH batches AS (
    SELECT
        run_id, count(*) AS batches, sum(users_refreshed) AS refreshed, sum(users_held) AS held,
        sum(users_skipped) AS skipped,
        sum(CASE status WHEN 'failed' THEN cardinality(user_ids) ELSE users_failed END) AS failed,
        greatest(least(sum(credits_granted), 9223372036854775807), -9223372036854775807) AS credits
    FROM credit_refresh_batches GROUP BY run_id
),
summed AS (
    SELECT
        r.id AS run_id, r.status, r.users_selected AS selected,
        r.users_refreshed + r.users_held + r.users_skipped + r.users_failed AS counted,
        ARRAY[r.users_refreshed, r.users_held, r.users_skipped, r.users_failed, r.credits_granted, r.batches_total]
            ::numeric[] AS said,
        ARRAY[coalesce(b.refreshed, 0), coalesce(b.held, 0), coalesce(b.skipped, 0), coalesce(b.failed, 0),
            coalesce(b.credits, 0), coalesce(b.batches, 0)]::numeric[] AS found
    FROM credit_refresh_runs AS r LEFT JOIN batches AS b ON b.run_id = r.id
    WHERE r.status <> 'running' AND r.finished_at >= {SINCE}
)
SELECT
    'run_totals_disagree' AS finding, NULL::bigint AS user_id, run_id, status, selected,
    format('%%s refreshed, %%s held, %%s skipped, %%s failed, %%s credits in %%s batches', VARIADIC said) AS run_counts,
    format('%%s, %%s, %%s, %%s, %%s in %%s', VARIADIC found) AS batch_counts
FROM summed
WHERE said <> found OR (counted <> selected AND status <> 'cancelled')
"""  # noqa: S608 - texts of this package alone

# First by run, which is one pass over the ledger; batch by batch only where a run's sum is wrong. A user who was put
# off is in several batches of a run: the last one is the one that decided. Of a run from before the books, rows may be
# gone.
_COUNTS = f"""
WITH by_run AS (
    SELECT run_id, count(*) AS users, sum(credits_added) AS credits
    FROM credit_refresh_histories WHERE status = 'refreshed' AND run_id IS NOT NULL GROUP BY run_id
),
by_batches AS (
    SELECT b.run_id, sum(b.users_refreshed) AS users, sum(b.credits_granted) AS credits
    FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
    WHERE NOT r.dry_run AND r.work IN ('refresh', 'apply') AND r.created_at >= {SINCE} GROUP BY b.run_id
),
wrong AS MATERIALIZED (
    SELECT b.run_id FROM by_batches AS b LEFT JOIN by_run AS h ON h.run_id = b.run_id
    WHERE (b.users, b.credits) IS DISTINCT FROM (coalesce(h.users, 0), coalesce(h.credits, 0))
),
batches AS MATERIALIZED (
    SELECT b.* FROM wrong AS w JOIN credit_refresh_batches AS b ON b.run_id = w.run_id
),
decided AS (
    SELECT b.run_id, m.user_id, max(b.id) AS batch_id
    FROM batches AS b CROSS JOIN LATERAL unnest(b.user_ids) AS m (user_id) GROUP BY b.run_id, m.user_id
),
granted AS (
    SELECT w.run_id, d.batch_id, count(*) AS users,
        greatest(least(sum(h.credits_added), 9223372036854775807), -9223372036854775807) AS credits
    FROM wrong AS w
    JOIN credit_refresh_histories AS h ON h.run_id = w.run_id AND h.status = 'refreshed'
    LEFT JOIN decided AS d ON d.run_id = h.run_id AND d.user_id = h.user_id
    GROUP BY w.run_id, d.batch_id
)
SELECT
    'batch_counts_disagree' AS finding, NULL::bigint AS user_id, coalesce(b.run_id, g.run_id) AS run_id,
    coalesce('batch ' || b.id, 'none of the batches') AS batch, coalesce(b.users_refreshed, 0) AS users,
    coalesce(b.credits_granted, 0) AS credits, coalesce(g.users, 0) AS rows, coalesce(g.credits, 0) AS granted
FROM batches AS b FULL JOIN granted AS g ON g.batch_id = b.id
WHERE (coalesce(b.users_refreshed, 0), coalesce(b.credits_granted, 0))
    IS DISTINCT FROM (coalesce(g.users, 0), coalesce(g.credits, 0))
"""  # noqa: S608 - texts of this package alone

# Upkeep looks every minute. A batch may wait an hour for its next attempt, or behind the batches of older runs for as
# long as those move; after a pause everything begins anew.
_STUCK = """
WITH moves AS (
    SELECT
        r.id AS run_id, r.created_at, count(b.id) FILTER (WHERE b.status = 'pending') AS pending,
        max(b.finished_at) AS finished_at,
        greatest(r.created_at, max(b.finished_at), max(b.published_at), max(b.next_attempt_at)) AS moved_at
    FROM credit_refresh_runs AS r LEFT JOIN credit_refresh_batches AS b ON b.run_id = r.id
    WHERE r.status = 'running'
    GROUP BY r.id
)
SELECT 'stuck_run' AS finding, NULL::bigint AS user_id, m.run_id, m.pending, m.moved_at
FROM moves AS m
WHERE %(enabled)s::boolean AND CASE
    WHEN m.pending = 0 THEN m.moved_at < now() - interval '5 minutes'
    ELSE m.moved_at < now() - interval '30 minutes'
        AND (SELECT enabled FROM settings)
        AND NOT EXISTS (
            SELECT FROM credit_audit_logs AS a
            WHERE a.user_id IS NULL AND a.action <> 'refreshed' AND a.action = 'resumed'
                AND a.occurred_at > now() - interval '30 minutes'
        )
        AND NOT EXISTS (
            SELECT FROM moves AS o
            WHERE o.created_at < m.created_at AND o.finished_at > now() - interval '30 minutes'
        )
END
"""

# Left alone: whoever an unfinished run has, whoever came into reach of a scan since (released, imported, their plan
# set, the service resumed), and the switched-off.
_OVERDUE = """
WITH taken AS MATERIALIZED (
    SELECT DISTINCT m.user_id
    FROM credit_refresh_batches AS b
    JOIN credit_refresh_runs AS r ON r.id = b.run_id
    CROSS JOIN LATERAL unnest(b.user_ids) AS m (user_id)
    WHERE b.status = 'pending' AND r.status = 'running' AND NOT r.dry_run AND r.work <> 'regrid'
    -- Given back just now, or left by a run that was cancelled just now: the next scan has not come yet.
    UNION
    SELECT h.user_id FROM credit_refresh_histories AS h
    WHERE h.status = 'reversed' AND h.created_at > %(overdue_before)s::timestamptz
    UNION
    SELECT m.user_id
    FROM credit_refresh_runs AS r
    JOIN credit_refresh_batches AS b ON b.run_id = r.id
    CROSS JOIN LATERAL unnest(b.user_ids) AS m (user_id)
    WHERE r.status = 'cancelled' AND NOT r.dry_run AND r.finished_at > %(overdue_before)s::timestamptz
        AND b.status = 'cancelled'
),
turned AS MATERIALIZED (
    SELECT action, occurred_at AS at, detail ->> 'plan' AS plan_code FROM credit_audit_logs
    WHERE user_id IS NULL AND action <> 'refreshed' AND occurred_at > %(overdue_before)s::timestamptz
        AND action IN ('resumed', 'imported', 'plan_set')
)
SELECT 'overdue' AS finding, u.id AS user_id, NULL::uuid AS run_id, u.wake_at AS due_at
FROM users AS u JOIN plans AS p ON p.code = u.plan_code
WHERE %(enabled)s::boolean AND NOT %(dry_run)s::boolean AND u.wake_at < %(overdue_before)s::timestamptz
    AND p.active AND p.cadence <> 'external'
    AND EXISTS (SELECT FROM settings AS s WHERE s.enabled AND NOT s.dry_run)
    AND NOT EXISTS (SELECT FROM taken AS t WHERE t.user_id = u.id)
    AND NOT EXISTS (SELECT FROM turned WHERE action = 'resumed' AND at > now() - interval '10 minutes')
    AND NOT EXISTS (SELECT FROM turned WHERE action = 'imported' AND at = u.updated_at)
    AND NOT EXISTS (SELECT FROM turned WHERE action = 'plan_set' AND plan_code = u.plan_code)
    AND NOT EXISTS (
        SELECT FROM credit_audit_logs AS a
        WHERE a.user_id = u.id AND a.action <> 'refreshed' AND a.action IN ('hold_released', 'hold_expired')
            AND a.occurred_at > %(overdue_before)s::timestamptz
    )
"""

RUN_CHECKS = (
    Check("Looking for lost runs", _ORPHANS),
    Check("Summing up runs", _TOTALS),
    Check("Counting batches", _COUNTS),
    Check("Looking for stuck runs", _STUCK),
    Check("Looking for overdue users", _OVERDUE),
)
