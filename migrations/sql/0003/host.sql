-- What a host calls, reads and sets off, with shortfalls: the rest is as 0002 made it.

-- The end of the last window that was granted to a user and not taken back.
CREATE OR REPLACE FUNCTION {schema}.granted_until(of_user bigint) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    SELECT h.window_end FROM credit_refresh_histories AS h
    WHERE h.user_id = of_user AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
        AND h.window_end IS NOT NULL -- a forced grant outside any grid has none
    ORDER BY h.window_start DESC LIMIT 1
$$;

-- Decides over one user, whom the caller has locked, and writes the history and audit rows of the grant; what becomes
-- of the users row is the caller's to write. NULL credits mean that nothing was granted.
CREATE OR REPLACE FUNCTION {schema}.grant_window(u {schema}.users, source text, actor text) RETURNS {schema}.granted
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    p plans;
    d record;
    granted granted;
BEGIN
    SELECT * INTO p FROM plans WHERE code = u.plan_code;
    SELECT * INTO d FROM decide(
        now(), u.active, u.credit_refresh_hold, u.hold_until, u.next_refresh_at, u.credit_balance,
        u.custom_credit_amount, u.credit_refresh_day, u.timezone,
        p.active, p.cadence, p.interval_days, p.day_of_month, p.time_of_day, p.timezone, p.grant_mode, p.amount,
        p.rollover_cap, u.refresh_shortfall
    );
    granted := (d.verdict, NULL, u.next_refresh_at, false);
    IF EXISTS (SELECT FROM settings WHERE NOT enabled OR dry_run) THEN
        RETURN granted;
    END IF;
    -- Without a date nothing has fallen due: not NULL, which is not false either.
    granted.newly_held := d.verdict = 'held' AND coalesce(u.next_refresh_at <= now(), false)
        AND d.window_start IS NOT NULL AND u.held_window IS DISTINCT FROM u.next_refresh_at;
    IF d.verdict <> 'due' AND NOT granted.newly_held THEN
        RETURN granted;
    END IF;
    -- History first, balance second, as in the batch: what the unique key refuses moves no credits.
    INSERT INTO credit_refresh_histories (
        source, user_id, status, window_start, window_end, first_missed_at, windows_passed, plan_code, grant_mode,
        target, old_balance, credits_added, new_balance, previous_next_refresh_at, previous_last_refresh,
        shortfall, reason
    ) VALUES (
        grant_window.source, u.id, CASE d.verdict WHEN 'due' THEN 'refreshed' ELSE 'held' END, d.window_start,
        d.window_end, d.first_missed_at, d.windows_passed, u.plan_code, p.grant_mode, d.target, u.credit_balance,
        CASE d.verdict WHEN 'due' THEN d.credits_added ELSE 0 END,
        u.credit_balance + CASE d.verdict WHEN 'due' THEN d.credits_added ELSE 0 END,
        u.next_refresh_at, u.last_credit_refresh, u.refresh_shortfall, grant_window.source
    ) ON CONFLICT DO NOTHING;
    IF d.verdict = 'due' AND FOUND THEN
        granted.next_refresh_at := d.window_end;
        granted.credits_added := d.credits_added;
    ELSIF d.verdict = 'due' THEN
        -- Refused by the key: to the end of what was granted, which another plan may have given another length.
        granted.next_refresh_at := greatest(d.window_end, granted_until(u.id));
    ELSIF NOT FOUND THEN
        RETURN granted;
    END IF;
    INSERT INTO credit_audit_logs (actor, action, user_id, balance_before, balance_after, credits)
    VALUES (
        grant_window.actor,
        CASE WHEN granted.newly_held THEN 'held' WHEN granted.credits_added IS NULL THEN 'already_granted'
            ELSE 'refreshed' END,
        u.id, u.credit_balance, u.credit_balance + coalesce(granted.credits_added, 0),
        coalesce(granted.credits_added, 0)
    );
    RETURN granted;
END
$$;

-- Refreshes one user there and then, for a host that calls it before a spend, in the host's own transaction.
CREATE OR REPLACE FUNCTION {schema}.refresh_user(user_id bigint, source text, actor text) RETURNS {schema}.granted
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    u users;
    granted granted;
BEGIN
    SELECT * INTO u FROM users WHERE id = user_id FOR NO KEY UPDATE;
    granted := grant_window(u, source, actor);
    IF granted.newly_held THEN
        UPDATE users SET held_window = u.next_refresh_at, updated_at = now() WHERE id = u.id;
    ELSIF granted.verdict = 'due' AND granted.next_refresh_at IS DISTINCT FROM u.next_refresh_at THEN
        UPDATE users SET
            credit_balance = u.credit_balance + coalesce(granted.credits_added, 0),
            last_credit_refresh = CASE WHEN granted.credits_added IS NULL THEN u.last_credit_refresh ELSE now() END,
            next_refresh_at = granted.next_refresh_at,
            refresh_shortfall = CASE WHEN granted.credits_added IS NULL THEN u.refresh_shortfall ELSE 0 END,
            held_window = NULL, credit_refresh_hold = false, hold_reason = NULL, hold_until = NULL,
            updated_at = now()
        WHERE id = u.id;
    END IF;
    RETURN granted;
END
$$;

-- For hosts that cannot call a function before a spend: the spend itself refreshes whoever is due, first the grant and
-- then the spend. `credits db triggers on` puts it on the table; our own statements never lower a balance without
-- moving the date, and so do not set it off.
CREATE OR REPLACE FUNCTION {schema}.refresh_on_spend() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    u users := new;
    granted granted;
BEGIN
    -- The user as the host's UPDATE leaves them, but for the spend: it may set a hold in the same breath.
    u.credit_balance := old.credit_balance;
    granted := grant_window(u, 'trigger', session_user);
    IF granted.newly_held THEN
        new.held_window := old.next_refresh_at;
    ELSIF granted.verdict = 'due' AND granted.next_refresh_at IS DISTINCT FROM old.next_refresh_at THEN
        new.credit_balance := new.credit_balance + coalesce(granted.credits_added, 0);
        new.next_refresh_at := granted.next_refresh_at;
        IF granted.credits_added IS NOT NULL THEN
            new.last_credit_refresh := now();
            new.refresh_shortfall := 0;
        END IF;
        new.held_window := NULL;
        new.credit_refresh_hold := false;
        new.hold_reason := NULL;
        new.hold_until := NULL;
    END IF;
    RETURN new;
END
$$;

-- Every user as if the refresh that is due had already happened; nothing is written. `used` is what is gone of the
-- amount, NULL where that does not fit. A window that was granted already is not shown twice, and while paused, or while
-- every run is dry, nothing is shown that will not come.
CREATE VIEW {schema}.user_credits_now AS
SELECT
    u.id, u.external_id, u.plan_code, d.verdict, b.credit_balance,
    CASE
        WHEN g.comes THEN d.window_end
        WHEN g.moves THEN greatest(d.window_end, (
            SELECT max(h.window_end) FROM {schema}.credit_refresh_histories AS h
            WHERE h.user_id = u.id AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
        ))
        ELSE u.next_refresh_at
    END AS next_refresh_at,
    a.amount,
    -- The amount is positive, so that neither side can overflow.
    CASE WHEN b.credit_balance >= a.amount - 9223372036854775807 THEN a.amount - b.credit_balance END AS used
FROM {schema}.users AS u
CROSS JOIN {schema}.settings AS s
LEFT JOIN {schema}.plans AS p ON p.code = u.plan_code
CROSS JOIN LATERAL (SELECT coalesce(u.custom_credit_amount, p.amount) AS amount) AS a
CROSS JOIN LATERAL {schema}.decide(
    now(), u.active, u.credit_refresh_hold, u.hold_until, u.next_refresh_at, u.credit_balance,
    u.custom_credit_amount, u.credit_refresh_day, u.timezone,
    p.active, p.cadence, p.interval_days, p.day_of_month, p.time_of_day, p.timezone, p.grant_mode, p.amount,
    p.rollover_cap, u.refresh_shortfall
) AS d
CROSS JOIN LATERAL (
    SELECT m.moves, m.moves AND NOT EXISTS (
        SELECT FROM {schema}.credit_refresh_histories AS h
        WHERE h.user_id = u.id AND h.window_start = d.window_start AND h.status = 'refreshed'
            AND h.reversed_by_run_id IS NULL
    ) AS comes
    FROM (SELECT d.verdict = 'due' AND s.enabled AND NOT s.dry_run AS moves) AS m
) AS g
CROSS JOIN LATERAL (
    SELECT CASE WHEN g.comes THEN u.credit_balance + d.credits_added ELSE u.credit_balance END AS credit_balance
) AS b;
