-- The rule, once: what a user gets and when. Plain SQL expressions in functions that PostgreSQL inlines
-- (LANGUAGE sql, STABLE, not STRICT, no SET clause), so the batch pays for no call. Another cadence is another
-- branch of refresh_window(), another mode a branch of credits_to_add(); decide() stays as it is.

-- The window of the user's own grid that holds `as_of`, given that the boundary `due_at` has come.
--   window_start    the latest boundary at or before as_of
--   window_end      the first boundary after as_of: the next due instant
--   windows_passed  how many windows between due_at and window_start went by without a grant
-- Rolling: boundaries lie whole multiples of interval_days x 24 hours from due_at. The step is given in hours, never
-- in days: PostgreSQL adds a day by the session's wall clock, and an hour would go missing each spring.
CREATE FUNCTION {schema}.refresh_window(
    cadence text, interval_days integer, due_at timestamptz, as_of timestamptz
) RETURNS TABLE (window_start timestamptz, window_end timestamptz, windows_passed integer)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT
        g.bound,
        g.bound + g.step,
        (extract(epoch FROM g.bound - due_at) / extract(epoch FROM g.step))::integer
    FROM (
        SELECT
            make_interval(hours => 24 * interval_days) AS step,
            date_bin(make_interval(hours => 24 * interval_days), as_of, due_at) AS bound
        WHERE cadence = 'rolling'
    ) AS g
$$;

-- The credits that bring `balance` to what the mode makes of `target`; NULL when they do not fit 64 bits.
--   fill  raise to the target, never lower
CREATE FUNCTION {schema}.credits_to_add(
    grant_mode text, target bigint, balance bigint
) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN grant_mode = 'fill' AND balance >= target - 9223372036854775807 THEN greatest(target - balance, 0)
    END
$$;

-- The verdict over one user at one instant, and the grant that it would be.
CREATE FUNCTION {schema}.decide(
    as_of timestamptz,
    user_active boolean, held boolean, hold_until timestamptz,
    due_at timestamptz, balance bigint, custom_amount bigint,
    plan_active boolean, cadence text, interval_days integer, grant_mode text, plan_amount bigint
) RETURNS TABLE (
    verdict text, window_start timestamptz, window_end timestamptz, first_missed_at timestamptz,
    windows_passed integer, target bigint, credits_added bigint
)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT
        CASE
            WHEN NOT user_active THEN 'inactive'
            WHEN plan_active IS NOT TRUE THEN 'no_plan'
            WHEN held AND (hold_until IS NULL OR hold_until > as_of) THEN 'held'
            WHEN cadence = 'external' THEN 'external'
            WHEN due_at IS NULL THEN 'unscheduled'
            WHEN due_at > as_of THEN 'not_due'
            WHEN {schema}.credits_to_add(grant_mode, coalesce(custom_amount, plan_amount), balance) IS NULL
                THEN 'overflow'
            ELSE 'due'
        END,
        w.window_start,
        w.window_end,
        CASE WHEN w.windows_passed > 0 THEN due_at END,
        w.windows_passed,
        coalesce(custom_amount, plan_amount),
        {schema}.credits_to_add(grant_mode, coalesce(custom_amount, plan_amount), balance)
    FROM (SELECT true) AS always
    LEFT JOIN {schema}.refresh_window(cadence, interval_days, due_at, as_of) AS w ON true
$$;
