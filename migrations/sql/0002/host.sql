-- What a host calls, reads and sets off inside its own transactions: under the same rule and the same unique key as
-- the batch. All are SECURITY DEFINER with a fixed search_path, so the host's role needs no right on our tables.

CREATE TYPE {schema}.granted AS (
    verdict text, credits_added bigint, next_refresh_at timestamptz, newly_held boolean
);

-- The end of the last window that was granted to a user and not taken back.
CREATE FUNCTION {schema}.granted_until(of_user bigint) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
    SELECT h.window_end FROM credit_refresh_histories AS h
    WHERE h.user_id = of_user AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
    ORDER BY h.window_start DESC LIMIT 1
$$;

-- Decides over one user, whom the caller has locked, and writes the history and audit rows of the grant; what becomes
-- of the users row is the caller's to write. NULL credits mean that nothing was granted.
CREATE FUNCTION {schema}.grant_window(u {schema}.users, source text, actor text) RETURNS {schema}.granted
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
        p.rollover_cap
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
        target, old_balance, credits_added, new_balance, previous_next_refresh_at, previous_last_refresh, reason
    ) VALUES (
        grant_window.source, u.id, CASE d.verdict WHEN 'due' THEN 'refreshed' ELSE 'held' END, d.window_start,
        d.window_end, d.first_missed_at, d.windows_passed, u.plan_code, p.grant_mode, d.target, u.credit_balance,
        CASE d.verdict WHEN 'due' THEN d.credits_added ELSE 0 END,
        u.credit_balance + CASE d.verdict WHEN 'due' THEN d.credits_added ELSE 0 END,
        u.next_refresh_at, u.last_credit_refresh, grant_window.source
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
CREATE FUNCTION {schema}.refresh_user(user_id bigint, source text, actor text) RETURNS {schema}.granted
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
            held_window = NULL, credit_refresh_hold = false, hold_reason = NULL, hold_until = NULL,
            updated_at = now()
        WHERE id = u.id;
    END IF;
    RETURN granted;
END
$$;

-- They write for whoever calls them, and believe what they are told: only the functions and triggers here may.
REVOKE ALL ON FUNCTION {schema}.grant_window, {schema}.refresh_user FROM PUBLIC;

-- {"refreshed", "verdict", "creditsAdded", "creditBalance", "nextRefreshAt"} of one user. Raises no_data_found for an
-- unknown id.
CREATE FUNCTION {schema}.refresh_credits_if_due(external_id text) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    u users;
    granted granted;
BEGIN
    SELECT * INTO u FROM users AS x WHERE x.external_id = refresh_credits_if_due.external_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no user %', external_id USING ERRCODE = 'no_data_found';
    END IF;
    granted := refresh_user(u.id, 'function', session_user);
    SELECT * INTO u FROM users WHERE id = u.id;
    RETURN jsonb_build_object(
        'refreshed', granted.credits_added IS NOT NULL, 'verdict', granted.verdict,
        'creditsAdded', coalesce(granted.credits_added, 0), 'creditBalance', u.credit_balance,
        'nextRefreshAt', u.next_refresh_at
    );
END
$$;

-- Refreshes up to `max` due users, most overdue first, and leaves out whom somebody else has locked.
-- {"success", "refreshed", "creditsGranted", "held", "more", "at"}; "more" says that a further call may find some, and
-- never that it would only meet once more those whose balance does not fit.
CREATE FUNCTION {schema}.refresh_due(max integer DEFAULT 1000) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    due_id bigint;
    granted granted;
    looked integer := 0;
    done integer := 0;
    refreshed integer := 0;
    held integer := 0;
    credits numeric := 0;
    enabled boolean;
BEGIN
    SELECT s.enabled AND NOT s.dry_run INTO enabled FROM settings AS s;
    IF enabled THEN
        FOR due_id IN
            SELECT u.id FROM users AS u
            WHERE u.wake_at <= now()
                AND EXISTS (SELECT FROM plans AS p WHERE p.code = u.plan_code AND p.active AND p.cadence <> 'external')
            ORDER BY u.wake_at
            LIMIT max
            FOR NO KEY UPDATE OF u SKIP LOCKED
        LOOP
            granted := refresh_user(due_id, 'function', session_user);
            looked := looked + 1;
            done := done + (granted.verdict <> 'overflow')::integer;
            refreshed := refreshed + (granted.credits_added IS NOT NULL)::integer;
            held := held + granted.newly_held::integer;
            credits := credits + coalesce(granted.credits_added, 0);
        END LOOP;
    END IF;
    RETURN jsonb_build_object(
        'success', enabled, 'refreshed', refreshed, 'creditsGranted', credits, 'held', held,
        'more', coalesce(looked = max AND done > 0, false), 'at', now()
    );
END
$$;

-- A user whom the host inserts without a balance. BEFORE makes the row whole and marks it, AFTER grants: an upsert that
-- meets an existing user runs the first and never the second, so that it grants nothing. It finds that user's own
-- balance in EXCLUDED, and copies no zero. The mark is a held_window that no clock has shown, and one that every driver
-- can read: RETURNING sees the row before the grant.
CREATE FUNCTION {schema}.prepare_new_user() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    SELECT credit_balance INTO new.credit_balance FROM users WHERE external_id = new.external_id;
    IF NOT FOUND THEN
        new.credit_balance := 0;
        new.held_window := '1000-01-01 00:00+00';
    END IF;
    RETURN new;
END
$$;
CREATE FUNCTION {schema}.grant_new_user() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
BEGIN
    -- Without a plan there is no window yet; it begins when the plan comes (keep_to_grid).
    UPDATE users SET
        held_window = NULL,
        next_refresh_at = coalesce(next_refresh_at, CASE WHEN EXISTS (
            SELECT FROM plans WHERE code = users.plan_code AND cadence <> 'external'
        ) THEN now() END)
    WHERE id = new.id;
    PERFORM refresh_user(new.id, 'insert', session_user);
    RETURN NULL;
END
$$;
CREATE TRIGGER prepare_new_user BEFORE INSERT ON {schema}.users
    FOR EACH ROW WHEN (new.credit_balance IS NULL) EXECUTE FUNCTION {schema}.prepare_new_user();
CREATE TRIGGER grant_new_user AFTER INSERT ON {schema}.users
    FOR EACH ROW WHEN (new.held_window = '1000-01-01 00:00+00') EXECUTE FUNCTION {schema}.grant_new_user();

-- The first boundary at or after `since` of the grid that a user has under a plan; NULL where there is no grid. A
-- rolling grid begins wherever it is told to.
CREATE FUNCTION {schema}.first_boundary(
    cadence text, day smallint, time_of_day time, zone text, since timestamptz
) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN cadence = 'rolling' THEN since
        WHEN cadence IN ('monthly', 'daily') THEN (
            SELECT w.window_end
            FROM {schema}.refresh_window(cadence, 1, day, time_of_day, zone, NULL, since - interval '1 microsecond') AS w
        )
    END
$$;

-- Another plan, day or zone begins a new grid at its first boundary at or after the present window's end: nothing is
-- earned twice, however often it is repeated. Moving the date back by hand stops at the last grant's end too; what a
-- rollback reopens, it says by setting credits.reopen.
CREATE FUNCTION {schema}.keep_to_grid() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $$
DECLARE
    p plans;
    since timestamptz;
    first_window boolean := false;
BEGIN
    SELECT * INTO p FROM plans WHERE code = new.plan_code;
    -- Without a plan, there is no other grid to move to.
    IF p.code IS NOT NULL AND new.next_refresh_at IS NOT DISTINCT FROM old.next_refresh_at THEN
        since := old.next_refresh_at;
        -- No window is running: the user comes from no plan at all, or from one whose windows came from elsewhere.
        IF since IS NULL AND (old.plan_code IS NULL OR EXISTS (
            SELECT FROM plans WHERE code = old.plan_code AND cadence = 'external'
        )) THEN
            since := greatest(now(), granted_until(old.id));
            -- A first plan begins the first window there and then, as at an insert.
            first_window := old.plan_code IS NULL AND p.cadence <> 'external' AND granted_until(old.id) IS NULL;
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
CREATE TRIGGER keep_to_grid BEFORE UPDATE OF plan_code, credit_refresh_day, timezone ON {schema}.users
    FOR EACH ROW WHEN (
        (old.plan_code, old.credit_refresh_day, old.timezone)
        IS DISTINCT FROM (new.plan_code, new.credit_refresh_day, new.timezone)
    ) EXECUTE FUNCTION {schema}.keep_to_grid();
CREATE TRIGGER keep_granted_windows BEFORE UPDATE OF next_refresh_at ON {schema}.users
    FOR EACH ROW WHEN (new.next_refresh_at < old.next_refresh_at
        OR (old.next_refresh_at IS NULL AND new.next_refresh_at IS NOT NULL))
    EXECUTE FUNCTION {schema}.keep_to_grid();

-- Who set, changed and ended a hold, whichever way it was done. A command says who asks in credits.actor.
CREATE FUNCTION {schema}.audit_hold() RETURNS trigger
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
    RETURN NULL;
END
$$;
-- Not OF these columns: PostgreSQL looks for those in the statement, and refresh_on_spend ends a hold behind its back.
CREATE TRIGGER audit_hold AFTER UPDATE ON {schema}.users
    FOR EACH ROW WHEN (
        old.credit_refresh_hold <> new.credit_refresh_hold OR new.credit_refresh_hold
            AND (old.hold_reason, old.hold_until) IS DISTINCT FROM (new.hold_reason, new.hold_until)
    ) EXECUTE FUNCTION {schema}.audit_hold();
CREATE TRIGGER audit_new_hold AFTER INSERT ON {schema}.users
    FOR EACH ROW WHEN (new.credit_refresh_hold) EXECUTE FUNCTION {schema}.audit_hold();

-- For hosts that cannot call a function before a spend: the spend itself refreshes whoever is due, first the grant and
-- then the spend. `credits db triggers on` puts it on the table; our own statements never lower a balance without
-- moving the date, and so do not set it off.
CREATE FUNCTION {schema}.refresh_on_spend() RETURNS trigger
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
    d.target AS amount,
    -- The amount is positive, so that neither side can overflow.
    CASE WHEN b.credit_balance >= d.target - 9223372036854775807 THEN d.target - b.credit_balance END AS used
FROM {schema}.users AS u
CROSS JOIN {schema}.settings AS s
LEFT JOIN {schema}.plans AS p ON p.code = u.plan_code
CROSS JOIN LATERAL {schema}.decide(
    now(), u.active, u.credit_refresh_hold, u.hold_until, u.next_refresh_at, u.credit_balance,
    u.custom_credit_amount, u.credit_refresh_day, u.timezone,
    p.active, p.cadence, p.interval_days, p.day_of_month, p.time_of_day, p.timezone, p.grant_mode, p.amount,
    p.rollover_cap
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
