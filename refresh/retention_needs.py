"""Who needs a row from before the books (docs/adr/0010).

- the unique key, the triggers and commands that ask up to when a user was granted: of a window that reaches into the
  books, or is the user's last;
- the auditor, of each user the last grant and what came after it, so that balances and dates can still be explained;
- whoever pairs a reversal with its grant, or a history row with its audit row.
"""

from __future__ import annotations

from datetime import timedelta

HISTORY, AUDIT = "credit_refresh_histories", "credit_audit_logs"
NEXT_WINDOWS = timedelta(days=70)
"""Whoever was granted another window within this time after the horizon is found by one pass over two months: of
monthly users everybody who is still there. The others are looked up one by one."""

# Every row whose audit row stays, and every grant whose window reaches into the books, though another one may have
# followed: that one can still be taken back. Beat's plans of windows that have not ended, which it would plan anew.
# Then, of users who are still there, the last grant and what came after it, and the rows that say up to when they were
# granted: the latest end, which is not always that of the window that began last. The first pass only spares the second
# one the many who were granted since.
_NEEDED_HISTORY = """
SELECT h.* FROM credit_refresh_histories AS h
WHERE h.window_start < {horizon} AND (
    h.created_at >= {horizon}
    OR (h.status = 'refreshed' AND h.window_end > {horizon})
    OR (h.status = 'planned' AND h.reason = 'scheduled' AND h.window_end > now())
)
UNION ALL
SELECT o.*
FROM (
    SELECT h.* FROM credit_refresh_histories AS h
    WHERE h.window_start < {horizon} AND h.created_at < {horizon} AND h.status IN ('refreshed', 'held', 'reversed')
        AND NOT (h.status = 'refreshed' AND coalesce(h.window_end > {horizon}, false))
        AND NOT EXISTS (
            SELECT FROM credit_refresh_histories AS k
            WHERE k.window_start >= {horizon} AND k.window_start < {horizon} + {next_windows}
                AND k.user_id = h.user_id AND k.status = 'refreshed' AND k.reversed_by_run_id IS NULL
                AND k.id > h.id AND k.window_end > h.window_end
        )
    OFFSET 0
) AS o
JOIN users AS u ON u.id = o.user_id
CROSS JOIN LATERAL (
    SELECT
        max(g.id) AS id, max(g.window_end) AS until,
        max(g.window_end) FILTER (WHERE g.live) AS live_until, max(g.window_start) FILTER (WHERE g.live) AS live_start
    FROM (
        -- Each in the form of its index.
        SELECT id, window_start, window_end, true AS live FROM credit_refresh_histories
        WHERE user_id = o.user_id AND status = 'refreshed' AND reversed_by_run_id IS NULL
        UNION ALL
        SELECT id, window_start, window_end, false FROM credit_refresh_histories
        WHERE user_id = o.user_id AND status = 'refreshed' AND reversed_by_run_id IS NOT NULL
    ) AS g
) AS last
WHERE o.id >= coalesce(last.id, 0) OR (o.status = 'refreshed' AND (
    o.window_end = last.until
    OR (o.reversed_by_run_id IS NULL AND (o.window_end = last.live_until OR o.window_start = last.live_start))
))
"""
# A reversal and its grant are of one window. Where one of them stays, so does the other.
_NEEDED_PAIRS = """
SELECT h.* FROM credit_refresh_histories AS h
WHERE h.window_start < {horizon} AND NOT EXISTS (SELECT FROM {kept} AS n WHERE n.id = h.id) AND (
    (h.status = 'reversed' AND EXISTS (
        SELECT FROM {kept} AS n
        WHERE n.user_id = h.user_id AND n.window_start = h.window_start AND n.status = 'refreshed'
            AND n.reversed_by_run_id = h.run_id
    ))
    OR (h.status = 'refreshed' AND h.reversed_by_run_id IS NOT NULL AND EXISTS (
        SELECT FROM {kept} AS n
        WHERE n.user_id = h.user_id AND n.window_start = h.window_start AND n.status = 'reversed'
            AND n.run_id = h.reversed_by_run_id
    ))
)
"""
# What was done to the service as a whole (an import explains balances), and who has set a hold that is still on.
_NEEDED_AUDIT = """
SELECT a.* FROM credit_audit_logs AS a
WHERE a.occurred_at < {horizon} AND (
    (a.user_id IS NULL AND a.action NOT IN ('planned', 'regridded'))
    OR (a.action IN ('hold_set', 'hold_changed') AND EXISTS (
        SELECT FROM users AS u WHERE u.id = a.user_id AND u.credit_refresh_hold
    ))
)
"""
NEEDED = {HISTORY: (_NEEDED_HISTORY, _NEEDED_PAIRS), AUDIT: (_NEEDED_AUDIT,)}
"""Queries for the rows, by table: one after the other, each may read what those before it have found, in `kept`."""
