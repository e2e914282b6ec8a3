-- The verdict over one user at one instant, and the grant that it would be.
--   shortfall    what a rollback that gave the window back could not take; it lowers the target
--   force        overrides not_due, unscheduled and external: a window of its own, from as_of to the end of the one that
--                it restarts; what is due anyway is refreshed as ever
--   keep_window  a forced refresh leaves the date where it is
-- Where nothing has fallen due, held or not, the window's columns mean nothing: look at the verdict first.
CREATE FUNCTION {schema}.decide(
    as_of timestamptz,
    user_active boolean, held boolean, hold_until timestamptz, due_at timestamptz, balance bigint,
    custom_amount bigint, user_day smallint, user_zone text,
    plan_active boolean, plan_cadence text, interval_days integer, plan_day smallint, time_of_day time,
    plan_zone text, grant_mode text, plan_amount bigint, rollover_cap bigint,
    shortfall bigint DEFAULT 0, force boolean DEFAULT false, keep_window boolean DEFAULT false
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
            WHEN plan_cadence = 'external' AND NOT force THEN 'external'
            WHEN g.since IS NULL THEN 'unscheduled'
            WHEN g.since > as_of THEN 'not_due'
            WHEN g.credits IS NULL THEN 'overflow'
            ELSE 'due'
        END,
        CASE WHEN g.forced THEN as_of ELSE w.window_start END,
        -- Never earlier than what was granted already, of which the date is the end.
        CASE
            WHEN NOT g.forced THEN w.window_end
            WHEN keep_window OR plan_cadence = 'external' THEN CASE WHEN due_at > as_of THEN due_at END
            ELSE greatest(w.window_end, due_at)
        END,
        CASE WHEN w.windows_passed > 0 THEN due_at END,
        CASE WHEN g.forced THEN 0 ELSE w.windows_passed END,
        g.target,
        g.credits
    FROM (
        SELECT
            f.forced,
            CASE WHEN f.forced THEN as_of ELSE due_at END AS since,
            t.target,
            {schema}.credits_to_add(grant_mode, t.target, rollover_cap, balance) AS credits,
            CASE WHEN plan_cadence = 'rolling' AND user_day IS NOT NULL THEN 'monthly' ELSE plan_cadence END AS cadence
        FROM (
            -- A hold is not overridden, and a window of force's own does not fall due under it.
            SELECT force AND NOT (held AND (hold_until IS NULL OR hold_until > as_of))
                AND (due_at IS NULL OR due_at > as_of OR plan_cadence = 'external') AS forced
        ) AS f
        CROSS JOIN (
            -- Not greatest(), which would make 0 of no amount at all.
            SELECT a.amount - least(shortfall, a.amount) AS target
            FROM (SELECT coalesce(custom_amount, plan_amount) AS amount) AS a
        ) AS t
        OFFSET 0
    ) AS g
    LEFT JOIN {schema}.refresh_window(
        g.cadence, interval_days, coalesce(user_day, plan_day), coalesce(time_of_day, '00:00'),
        coalesce(user_zone, plan_zone),
        g.since, as_of
    ) AS w ON true
$$;
