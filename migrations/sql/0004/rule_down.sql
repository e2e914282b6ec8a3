CREATE OR REPLACE FUNCTION {schema}.refresh_window(
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
DROP FUNCTION {schema}.calendar_windows_passed;
