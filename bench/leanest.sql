-- The least that refreshes 100 users and writes the same rows: rolling and fill alone, written out, with no rule
-- functions and no bookkeeping of runs and batches. Every clause is needed: tests/integration/test_leanest.py takes
-- each out and sees a row lost or a wrong one written.
WITH locked AS MATERIALIZED (
    SELECT id, plan_code, credit_balance, last_credit_refresh, next_refresh_at
    FROM users
    WHERE id = ANY (%(user_ids)s) AND next_refresh_at <= now() AND active AND NOT credit_refresh_hold
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
),
history AS (
    INSERT INTO credit_refresh_histories (
        run_id, user_id, status, window_start, window_end, plan_code, grant_mode, target, old_balance, credits_added,
        new_balance, previous_next_refresh_at, previous_last_refresh, reason
    )
    SELECT
        %(run_id)s, l.id, 'refreshed', date_bin(p.step, now(), l.next_refresh_at),
        date_bin(p.step, now(), l.next_refresh_at) + p.step, l.plan_code, p.grant_mode, p.amount, l.credit_balance,
        greatest(p.amount - l.credit_balance, 0), greatest(p.amount, l.credit_balance), l.next_refresh_at,
        l.last_credit_refresh, 'bench'
    FROM locked AS l
    JOIN (SELECT *, make_interval(hours => 24 * interval_days) AS step FROM plans WHERE active) AS p
        ON p.code = l.plan_code
    ON CONFLICT DO NOTHING
    RETURNING user_id, window_end, old_balance, credits_added, new_balance
),
moved AS (
    UPDATE users AS u SET
        credit_balance = u.credit_balance + h.credits_added, last_credit_refresh = now(),
        next_refresh_at = h.window_end, updated_at = now()
    FROM history AS h
    WHERE u.id = h.user_id
)
INSERT INTO credit_audit_logs (actor, action, user_id, run_id, balance_before, balance_after, credits)
SELECT 'bench', 'refreshed', user_id, %(run_id)s, old_balance, new_balance, credits_added
FROM history
