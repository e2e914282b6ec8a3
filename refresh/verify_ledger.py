"""The ledger's checks: plain SQL, which asks a function of ours only where the rule is the point.

A check says what cannot have come about by anybody's right. What a host may do (spend, move a date on, import users,
delete them) and what our own commands do (hold, regrid, roll back, force) is no finding, so some checks look away
where the books cannot tell the two apart; each says where. A pass sorts or hashes on the server's disk.
"""

from __future__ import annotations

from refresh.verify_kinds import SINCE, Check

# Both sides of the ledger in one heap; what does not cancel out is a finding. A row and its audit row are of one
# transaction, and so of one instant. What became of the balance is told by those alone that had it in hand.
_LEDGER = f"""
WITH entries AS (
    SELECT
        user_id, created_at AS at, run_id, status, 1 AS side,
        CASE WHEN status IN ('refreshed', 'held', 'reversed') THEN old_balance END AS old_balance,
        CASE WHEN status IN ('refreshed', 'held', 'reversed') THEN new_balance END AS new_balance,
        CASE WHEN status IN ('refreshed', 'held', 'reversed') THEN credits_added END AS credits
    FROM credit_refresh_histories WHERE status <> 'planned' AND created_at >= {SINCE}
    UNION ALL
    SELECT
        user_id, occurred_at, run_id, CASE action WHEN 'refresh_failed' THEN 'failed' ELSE action END, -1,
        CASE WHEN action IN ('refreshed', 'held', 'reversed') THEN balance_before END,
        CASE WHEN action IN ('refreshed', 'held', 'reversed') THEN balance_after END,
        CASE WHEN action IN ('refreshed', 'held', 'reversed') THEN credits END
    FROM credit_audit_logs
    WHERE action IN ('refreshed', 'held', 'refresh_failed', 'reversed', 'skipped') AND user_id IS NOT NULL
        AND occurred_at >= {SINCE}
),
unlike AS (
    SELECT user_id, at, run_id, status, old_balance, new_balance, credits, sum(side) AS sides
    FROM entries GROUP BY 1, 2, 3, 4, 5, 6, 7 HAVING sum(side) <> 0
)
SELECT
    CASE
        WHEN sum(sides) > 0 THEN 'history_without_audit'
        WHEN sum(sides) < 0 THEN 'audit_without_history'
        ELSE 'audit_disagrees'
    END AS finding,
    user_id, run_id, status, at,
    coalesce(min(old_balance) FILTER (WHERE sides > 0), min(old_balance), 0) AS old,
    coalesce(min(new_balance) FILTER (WHERE sides > 0), min(new_balance), 0) AS new,
    coalesce(min(credits) FILTER (WHERE sides > 0), 0) AS credits,
    coalesce(min(old_balance) FILTER (WHERE sides < 0), 0) AS audit_old,
    coalesce(min(new_balance) FILTER (WHERE sides < 0), 0) AS audit_new,
    coalesce(min(credits) FILTER (WHERE sides < 0), 0) AS audit_credits
FROM unlike GROUP BY user_id, at, run_id, status
"""  # noqa: S608 - texts of this package alone

# A forced grant has a window of its own beside the user's grid, and so has what retries or applies one.
_FORCED = """
forced AS MATERIALIZED (
    SELECT r.id AS run_id
    FROM credit_refresh_runs AS r
    LEFT JOIN credit_refresh_runs AS s ON s.id = r.subject_run_id
    LEFT JOIN credit_refresh_runs AS p ON p.id = r.parent_run_id
    WHERE r.force OR s.force OR p.force
)
"""

# Each row by itself. Numeric: a sum that does not fit would end the audit instead of being found. Rollover needs the
# plan's cap of that time, which nobody keeps.
_ROWS = """
WITH {forced},
judged AS (
    SELECT
        h.*, credits_to_add(h.grant_mode, CASE WHEN h.target >= 0 THEN h.target END, NULL, h.old_balance) AS expected,
        CASE
            WHEN h.new_balance IS DISTINCT FROM h.old_balance::numeric + h.credits_added THEN 'wrong_sum'
            WHEN h.status IN ('held', 'failed', 'skipped') THEN CASE WHEN h.credits_added <> 0 THEN 'wrong_credits' END
            WHEN h.status <> 'refreshed' THEN NULL
            WHEN coalesce(h.target, -1) < 0 THEN 'wrong_target'
            WHEN h.grant_mode IN ('fill', 'reset', 'add') AND h.credits_added IS DISTINCT FROM
                credits_to_add(h.grant_mode, CASE WHEN h.target >= 0 THEN h.target END, NULL, h.old_balance)
                THEN 'wrong_credits'
            WHEN f.run_id IS NOT NULL THEN NULL
            -- Whoever is inserted without a balance is granted at once, up to the date that came with them.
            WHEN h.window_start > h.created_at
                OR (h.source <> 'insert' AND h.window_start < h.previous_next_refresh_at) THEN 'granted_early'
            WHEN h.window_start > h.previous_next_refresh_at AND h.windows_passed = 0 THEN 'windows_not_counted'
        END AS finding
    FROM credit_refresh_histories AS h
    LEFT JOIN forced AS f ON f.run_id = h.run_id
    OFFSET 0
)
SELECT
    finding, user_id, run_id, status, created_at AS at, old_balance AS old, new_balance AS new,
    credits_added AS credits, coalesce(grant_mode, 'no mode') AS mode, coalesce(target, 0) AS target,
    CASE WHEN status = 'refreshed' THEN coalesce(expected, 0) ELSE 0 END AS expected, window_start,
    coalesce(to_char(previous_next_refresh_at, 'YYYY-MM-DD HH24:MI:SS "UTC"'), 'not set') AS date
FROM judged WHERE finding IS NOT NULL
"""

# Time that was granted twice. A forced grant begins inside another window by right.
_WINDOWS = """
WITH {forced},
placed AS (
    SELECT
        h.user_id, h.run_id, h.window_start, h.created_at, f.run_id IS NOT NULL AS is_forced,
        lag(h.window_start) OVER by_start AS earlier_start, lag(h.created_at) OVER by_start AS earlier_at,
        max(CASE WHEN f.run_id IS NULL THEN h.window_end END) OVER (
            by_start ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS granted_until
    FROM credit_refresh_histories AS h
    LEFT JOIN forced AS f ON f.run_id = h.run_id
    WHERE h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
    WINDOW by_start AS (PARTITION BY h.user_id ORDER BY h.window_start)
)
SELECT
    CASE WHEN earlier_start = window_start THEN 'double_grant' ELSE 'overlapping_grants' END AS finding,
    user_id, run_id, window_start, created_at AS at, earlier_at, granted_until AS "end"
FROM placed
WHERE earlier_start = window_start OR (granted_until > window_start AND NOT is_forced)
"""

# A user's rows in the order of their ids: each was written under the user's lock, so that this is the order of the
# grants whatever their clocks say. The users row comes last. An import may set balances and dates of users who are
# there, and its audit row does not say whose: what may be its work is left alone. It may have begun before the row
# before it was written. From before the books a user's last rows are there; what lay between others may be gone.
_CHAINS = f"""
WITH imports AS MATERIALIZED (
    SELECT
        occurred_at - interval '15 minutes' AS from_at, occurred_at AS at,
        detail -> 'columns' ? 'credit_balance' AS balances, detail -> 'columns' ? 'last_credit_refresh' AS refreshes
    FROM credit_audit_logs
    WHERE action = 'imported' AND action <> 'refreshed' AND user_id IS NULL
        AND coalesce((detail ->> 'changed')::bigint, 1) > 0
),
links AS (
    SELECT
        user_id, id, run_id, status, created_at AS at, old_balance, new_balance,
        CASE WHEN status = 'refreshed' THEN id END AS grant_id,
        CASE WHEN status = 'refreshed' THEN created_at END AS granted_at,
        CASE WHEN status = 'refreshed' AND reversed_by_run_id IS NULL THEN window_end END AS granted_until,
        previous_next_refresh_at AS next_refresh_at, previous_last_refresh AS last_refresh
    FROM credit_refresh_histories WHERE status IN ('refreshed', 'held', 'reversed')
    UNION ALL
    SELECT
        id, 9223372036854775807, NULL, 'user', now(), credit_balance, credit_balance, NULL, NULL, NULL,
        next_refresh_at, last_credit_refresh
    FROM users
),
chained AS (
    SELECT
        *, lag(at) OVER by_id AS before_at, lag(status) OVER by_id AS was,
        CASE WHEN status = 'user' OR lag(at) OVER by_id >= {SINCE} THEN lag(new_balance) OVER by_id END AS left_balance,
        max(grant_id) OVER before AS last_grant_id,
        max(CASE WHEN granted_at >= {SINCE} THEN granted_at END) OVER before AS last_granted_in_books,
        max(granted_at) OVER before AS last_granted_at,
        max(granted_until) OVER before AS last_until,
        max(CASE WHEN status = 'reversed' THEN id END) OVER before AS last_reversal_id
    FROM links
    WINDOW by_id AS (PARTITION BY user_id ORDER BY id),
        before AS (PARTITION BY user_id ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
),
suspects AS (
    SELECT * FROM chained
    WHERE (old_balance > left_balance AND NOT %(top_ups)s::boolean)
        OR (status = 'refreshed' AND last_refresh > last_granted_in_books)
        OR (status = 'user' AND (next_refresh_at < last_until OR last_refresh IS DISTINCT FROM last_granted_at))
)
SELECT
    f.finding, s.user_id, s.run_id, coalesce(s.left_balance, 0) AS left_balance, s.before_at AS left_at,
    s.old_balance AS balance, s.old_balance::numeric - s.left_balance AS rise,
    CASE s.status WHEN 'user' THEN 'now' ELSE to_char(s.at, '"at" YYYY-MM-DD HH24:MI:SS "UTC"') END AS found,
    s.last_until AS "end", s.last_until AS from_at, s.next_refresh_at AS to_at, s.last_refresh AS refreshed_at,
    s.last_granted_at AS at,
    coalesce(to_char(
        CASE f.finding WHEN 'date_before_grant' THEN s.next_refresh_at ELSE s.last_refresh END,
        'YYYY-MM-DD HH24:MI:SS "UTC"'
    ), 'not set') AS date
FROM suspects AS s
CROSS JOIN LATERAL (
    SELECT 'balance_rose' AS finding
    WHERE s.old_balance > s.left_balance AND NOT %(top_ups)s::boolean
        AND NOT EXISTS (SELECT FROM imports AS i WHERE i.balances AND i.at >= s.before_at AND i.from_at <= s.at)
    UNION ALL
    SELECT 'window_missing'
    WHERE s.status = 'refreshed' AND s.last_refresh > s.last_granted_in_books AND s.next_refresh_at > s.last_until
        AND NOT EXISTS (SELECT FROM imports AS i WHERE i.refreshes AND i.at >= s.last_granted_at AND i.from_at <= s.at)
    UNION ALL
    SELECT 'date_before_grant' WHERE s.status = 'user' AND s.next_refresh_at < s.last_until
    UNION ALL
    -- A rollback may set it back. Of two grants at one time, the one that waited has the older instant.
    SELECT 'last_refresh_disagrees'
    WHERE s.status = 'user' AND s.last_granted_at IS NOT NULL
        AND (s.last_reversal_id IS NULL OR s.last_reversal_id < s.last_grant_id)
        AND (s.last_refresh IS NULL OR s.last_refresh > s.last_granted_at
            OR s.last_refresh < s.last_granted_at - interval '1 minute')
        AND NOT EXISTS (SELECT FROM imports AS i WHERE i.refreshes AND i.at >= s.last_granted_at AND i.from_at <= s.at)
) AS f
"""  # noqa: S608 - texts of this package alone

_REVERSALS = """
WITH grants AS (
    SELECT user_id, window_start, reversed_by_run_id AS run_id, credits_added AS credits
    FROM credit_refresh_histories WHERE status = 'refreshed' AND reversed_by_run_id IS NOT NULL
),
reversals AS (
    SELECT user_id, window_start, run_id, credits_added AS credits
    FROM credit_refresh_histories WHERE status = 'reversed'
)
SELECT
    CASE
        WHEN g.user_id IS NULL THEN 'reversal_without_grant'
        WHEN r.user_id IS NULL THEN 'grant_reversed_without_reversal'
        ELSE 'reversal_too_large'
    END AS finding,
    user_id, run_id, window_start, r.credits, -r.credits AS taken, g.credits AS granted
FROM grants AS g FULL JOIN reversals AS r USING (user_id, window_start, run_id)
WHERE g.user_id IS NULL OR r.user_id IS NULL OR (g.credits >= 0 AND -r.credits > g.credits)
"""

LEDGER_CHECKS = (
    Check("Comparing history and audit", _LEDGER),
    Check("Adding up each row", _ROWS.format(forced=_FORCED)),
    Check("Looking for time granted twice", _WINDOWS.format(forced=_FORCED)),
    Check("Following balances and dates", _CHAINS),
    Check("Pairing reversals and grants", _REVERSALS),
)
