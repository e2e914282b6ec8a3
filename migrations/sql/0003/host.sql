-- What a host calls, reads and sets off, with shortfalls and forced grants: the rest is as 0002 made it.

-- The end of what was granted to a user and not taken back. The latest end, which is not always that of the window that
-- began last: a forced one begins at its run's instant, however late its batch is done.
CREATE OR REPLACE FUNCTION {schema}.granted_until(of_user bigint) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    SELECT max(h.window_end) FROM credit_refresh_histories AS h
    WHERE h.user_id = of_user AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
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
        p.rollover_cap, u.refresh_shortfall,
        -- A new user's first window begins now, and ends at the date that the host has given, if it did.
        grant_window.source = 'insert' AND p.cadence <> 'external', true
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
    ELSIF granted.credits_added IS NOT NULL
        OR (granted.verdict = 'due' AND granted.next_refresh_at IS DISTINCT FROM u.next_refresh_at)
    THEN
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

-- A user whom the host inserts without a balance: prepare_new_user has marked the row (0002).
CREATE OR REPLACE FUNCTION {schema}.grant_new_user() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    granted granted;
BEGIN
    -- Without a plan there is no window yet; it begins when the plan comes (keep_to_grid).
    UPDATE users SET
        held_window = NULL,
        next_refresh_at = coalesce(next_refresh_at, CASE WHEN EXISTS (
            SELECT FROM plans WHERE code = users.plan_code AND cadence <> 'external'
        ) THEN now() END)
    WHERE id = new.id;
    granted := refresh_user(new.id, 'insert', session_user);
    -- Only the switch is in the way. The grant comes on resume, and a date ahead gives way to that.
    IF granted.verdict = 'due' AND granted.credits_added IS NULL AND new.next_refresh_at > now() THEN
        UPDATE users SET next_refresh_at = now() WHERE id = new.id;
    END IF;
    RETURN NULL;
END
$$;

-- Another plan, day or zone begins a new grid at its first boundary at or after the present window's end: nothing is
-- earned twice, however often it is repeated, and nothing is lost: wherever an earlier change has moved the date, the
-- next one counts from that end again. A window stays closed after a rollback; one that a rollback has reopened has a
-- date before its end, hence least(). Moving the date back by hand stops at the last grant's end too; what a rollback
-- reopens, it says by setting credits.reopen.
CREATE OR REPLACE FUNCTION {schema}.keep_to_grid() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    p plans;
    since timestamptz;
    closed_until timestamptz;
    first_window boolean := false;
BEGIN
    SELECT * INTO p FROM plans WHERE code = new.plan_code;
    -- Without a plan, there is no other grid to move to.
    IF p.code IS NOT NULL AND new.next_refresh_at IS NOT DISTINCT FROM old.next_refresh_at THEN
        -- Each branch in the form of its index.
        SELECT max(h.window_end) INTO closed_until FROM (
            SELECT window_end FROM credit_refresh_histories
            WHERE user_id = old.id AND status = 'refreshed' AND reversed_by_run_id IS NULL
            UNION ALL
            SELECT window_end FROM credit_refresh_histories
            WHERE user_id = old.id AND status = 'refreshed' AND reversed_by_run_id IS NOT NULL
        ) AS h;
        IF old.next_refresh_at IS NOT NULL THEN
            since := least(old.next_refresh_at, closed_until);
        -- No window is running: the user comes from no plan at all, or from one whose windows came from elsewhere.
        ELSIF old.plan_code IS NULL OR EXISTS (
            SELECT FROM plans WHERE code = old.plan_code AND cadence = 'external'
        ) THEN
            since := greatest(now(), closed_until);
            -- A first plan begins the first window there and then, as at an insert.
            first_window := old.plan_code IS NULL AND p.cadence <> 'external' AND closed_until IS NULL;
        END IF;
        new.next_refresh_at := CASE WHEN first_window THEN since ELSE first_boundary(
            CASE WHEN p.cadence = 'rolling' AND new.credit_refresh_day IS NOT NULL THEN 'monthly' ELSE p.cadence END,
            coalesce(new.credit_refresh_day, p.day_of_month), coalesce(p.time_of_day, '00:00'),
            coalesce(new.timezone, p.timezone), since
        ) END;
    END IF;
    IF current_setting('credits.reopen', true) IS DISTINCT FROM 'on' THEN
        new.next_refresh_at := greatest(new.next_refresh_at, CASE
            WHEN new.next_refresh_at IS NOT NULL THEN granted_until(new.id)
        END);
    END IF;
    RETURN new;
END
$$;

-- Who set, changed and ended a hold, whichever way it was done. A command says who asks in credits.actor.
CREATE OR REPLACE FUNCTION {schema}.audit_hold() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    INSERT INTO credit_audit_logs (actor, action, user_id, balance_before, balance_after, credits, detail)
    VALUES (
        coalesce(nullif(current_setting('credits.actor', true), ''), session_user),
        CASE WHEN new.credit_refresh_hold AND old.credit_refresh_hold AND (old.hold_until <= now()) IS NOT TRUE
            THEN 'hold_changed'
            WHEN new.credit_refresh_hold THEN 'hold_set'
            WHEN old.hold_until <= now() THEN 'hold_expired'
            ELSE 'hold_released' END,
        new.id, new.credit_balance, new.credit_balance, 0,
        -- What holds from now on, or what has ended.
        CASE WHEN new.credit_refresh_hold THEN jsonb_build_object('reason', new.hold_reason, 'until', new.hold_until)
            ELSE jsonb_build_object('reason', old.hold_reason, 'until', old.hold_until) END
    );
    -- Released by the flag alone: what the hold leaves behind must not become the next one's end. Here and not before
    -- the update, where every batch would pay for the question.
    IF TG_OP = 'UPDATE' AND NOT new.credit_refresh_hold
        AND (new.hold_reason IS NOT NULL OR new.hold_until IS NOT NULL)
        AND (old.hold_reason, old.hold_until) IS NOT DISTINCT FROM (new.hold_reason, new.hold_until)
    THEN
        UPDATE users SET hold_reason = NULL, hold_until = NULL
        WHERE id = new.id AND NOT credit_refresh_hold
            AND (hold_reason, hold_until) IS NOT DISTINCT FROM (new.hold_reason, new.hold_until);
    END IF;
    RETURN NULL;
END
$$;

-- For hosts that cannot call a function before a spend: the spend itself refreshes whoever is due, first the grant and
-- then the spend. `credits db triggers on` puts it on the table; our own statements never lower a balance without
-- moving the date, and so do not set it off, but for a rollback, which says so, and a forced grant that keeps the date.
CREATE OR REPLACE FUNCTION {schema}.refresh_on_spend() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    u users := new;
    granted granted;
BEGIN
    -- A rollback takes credits from users who may be due by now, and that is no spend; nor is a grant that lowers.
    IF current_setting('credits.reopen', true) = 'on'
        OR new.last_credit_refresh IS DISTINCT FROM old.last_credit_refresh THEN
        RETURN new;
    END IF;
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
CREATE OR REPLACE VIEW {schema}.user_credits_now AS
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
