-- The rule, once: every cadence and every mode. Plain SQL expressions in functions that PostgreSQL inlines (LANGUAGE
-- sql, not STRICT, no SET clause), so the batch pays for no call. docs/rule.md is the specification.

-- A calendar grid is cut into periods of local time: months or days, named by their first midnight. Each has one
-- boundary. On day 29, 30 or 31 it falls on the last day of a shorter month. PostgreSQL reads a wall time that does
-- not exist as moved forward by the gap, and one that exists twice as the second of the two.
CREATE FUNCTION {schema}.calendar_boundary(
    cadence text, period timestamp, day smallint, time_of_day time, zone text
) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE cadence
        WHEN 'monthly' THEN
            (least(period + make_interval(days => day - 1), period + interval '1 month -1 day') + time_of_day)
                AT TIME ZONE zone
        WHEN 'daily' THEN (period + time_of_day) AT TIME ZONE zone
    END
$$;

-- The latest period whose boundary lies at or before `at`: that of at's own local month or day, or the one before it,
-- or, where a gap has moved a boundary over midnight, the one before that.
CREATE FUNCTION {schema}.calendar_period(
    cadence text, day smallint, time_of_day time, zone text, at timestamptz
) RETURNS timestamp
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE cadence
        WHEN 'monthly' THEN date_trunc('month', at AT TIME ZONE zone) - CASE
            WHEN {schema}.calendar_boundary(
                'monthly', date_trunc('month', at AT TIME ZONE zone), day, time_of_day, zone) <= at
                THEN interval '0'
            WHEN {schema}.calendar_boundary(
                'monthly', date_trunc('month', at AT TIME ZONE zone) - interval '1 month', day, time_of_day, zone) <= at
                THEN interval '1 month'
            ELSE interval '2 months'
        END
        WHEN 'daily' THEN date_trunc('day', at AT TIME ZONE zone) - CASE
            WHEN {schema}.calendar_boundary(
                'daily', date_trunc('day', at AT TIME ZONE zone), day, time_of_day, zone) <= at
                THEN interval '0'
            WHEN {schema}.calendar_boundary(
                'daily', date_trunc('day', at AT TIME ZONE zone) - interval '1 day', day, time_of_day, zone) <= at
                THEN interval '1 day'
            ELSE interval '2 days'
        END
    END
$$;

-- The window of the user's own grid that holds `as_of`, given that the instant `due_at` has come.
--   window_start    the latest boundary at or before as_of; due_at itself where no later one has passed
--   window_end      the first boundary after as_of: the next due instant
--   windows_passed  how many windows between due_at and window_start went by without a grant
-- Rolling: boundaries lie whole multiples of interval_days x 24 hours from due_at. The step is given in hours, never
-- in days: PostgreSQL adds a day by the session's wall clock, and an hour would go missing each spring.
-- OFFSET 0 keeps the planner from copying a stage's expressions into each place that names them.
CREATE FUNCTION {schema}.refresh_window(
    cadence text, interval_days integer, day smallint, time_of_day time, zone text,
    due_at timestamptz, as_of timestamptz
) RETURNS TABLE (window_start timestamptz, window_end timestamptz, windows_passed integer)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT
        greatest(g.bound, due_at),
        g.next_bound,
        CASE
            WHEN g.bound <= due_at THEN 0
            WHEN cadence = 'rolling' THEN
                (extract(epoch FROM g.bound - due_at) / (86400 * interval_days))::integer
            WHEN cadence = 'daily' THEN
                g.period::date - {schema}.calendar_period(cadence, day, time_of_day, zone, due_at)::date
            ELSE
                (extract(year FROM g.period) * 12 + extract(month FROM g.period)
                - extract(year FROM {schema}.calendar_period(cadence, day, time_of_day, zone, due_at)) * 12
                - extract(month FROM {schema}.calendar_period(cadence, day, time_of_day, zone, due_at)))::integer
        END
    FROM (
        SELECT
            p.period,
            CASE cadence
                WHEN 'rolling' THEN date_bin(make_interval(hours => 24 * interval_days), as_of, due_at)
                ELSE {schema}.calendar_boundary(cadence, p.period, day, time_of_day, zone)
            END AS bound,
            CASE cadence
                WHEN 'rolling' THEN
                    date_bin(make_interval(hours => 24 * interval_days), as_of, due_at)
                        + make_interval(hours => 24 * interval_days)
                WHEN 'monthly' THEN
                    {schema}.calendar_boundary('monthly', p.period + interval '1 month', day, time_of_day, zone)
                WHEN 'daily' THEN
                    {schema}.calendar_boundary('daily', p.period + interval '1 day', day, time_of_day, zone)
            END AS next_bound
        FROM (
            SELECT {schema}.calendar_period(cadence, day, time_of_day, zone, as_of) AS period
            OFFSET 0
        ) AS p
        OFFSET 0
    ) AS g
    WHERE cadence <> 'external'
$$;

-- The credits that bring `balance` to what the mode makes of `target`; NULL when they, or the balance that they lead
-- to, do not fit 64 bits. Target is positive and cap is not negative, so none of these comparisons can overflow.
--   fill      raise to the target, never lower
--   reset     set to the target, lowering too
--   add       add the target
--   rollover  carry over at most the cap, then add the target; a debt is carried over whole
CREATE FUNCTION {schema}.credits_to_add(
    grant_mode text, target bigint, rollover_cap bigint, balance bigint
) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE grant_mode
        WHEN 'fill' THEN
            CASE WHEN balance >= target - 9223372036854775807 THEN greatest(target - balance, 0) END
        WHEN 'reset' THEN
            CASE WHEN balance >= target - 9223372036854775807 THEN target - balance END
        WHEN 'add' THEN
            CASE WHEN balance <= 9223372036854775807 - target THEN target END
        WHEN 'rollover' THEN
            CASE
                WHEN least(balance, rollover_cap) > 9223372036854775807 - target THEN NULL
                WHEN balance > rollover_cap THEN target - (balance - rollover_cap)
                ELSE target
            END
    END
$$;

-- The verdict over one user at one instant, and the grant that it would be.
CREATE FUNCTION {schema}.decide(
    as_of timestamptz,
    user_active boolean, held boolean, hold_until timestamptz, due_at timestamptz, balance bigint,
    custom_amount bigint, user_day smallint, user_zone text,
    plan_active boolean, plan_cadence text, interval_days integer, plan_day smallint, time_of_day time,
    plan_zone text, grant_mode text, plan_amount bigint, rollover_cap bigint
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
            WHEN plan_cadence = 'external' THEN 'external'
            WHEN due_at IS NULL THEN 'unscheduled'
            WHEN due_at > as_of THEN 'not_due'
            WHEN g.credits IS NULL THEN 'overflow'
            ELSE 'due'
        END,
        w.window_start,
        w.window_end,
        CASE WHEN w.windows_passed > 0 THEN due_at END,
        w.windows_passed,
        g.target,
        g.credits
    FROM (
        SELECT
            coalesce(custom_amount, plan_amount) AS target,
            {schema}.credits_to_add(grant_mode, coalesce(custom_amount, plan_amount), rollover_cap, balance) AS credits,
            CASE WHEN plan_cadence = 'rolling' AND user_day IS NOT NULL THEN 'monthly' ELSE plan_cadence END AS cadence
        OFFSET 0
    ) AS g
    LEFT JOIN {schema}.refresh_window(
        g.cadence, interval_days, coalesce(user_day, plan_day), coalesce(time_of_day, '00:00'),
        coalesce(user_zone, plan_zone),
        due_at, as_of
    ) AS w ON true
$$;
