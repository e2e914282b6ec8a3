-- The rule of 0002, of which each batch prepares less: PostgreSQL makes every inlined expression ready for each execution,
-- whether or not a user comes to it.

-- How many windows of a calendar grid lie between that of `due_at` and that of `period`. Few users have missed any, so
-- this is a call and is not inlined: its SET clause sees to that.
CREATE FUNCTION {schema}.calendar_windows_passed(
    cadence text, day smallint, time_of_day time, zone text, due_at timestamptz, period timestamp
) RETURNS integer
LANGUAGE sql STABLE PARALLEL SAFE SET search_path = {schema}, pg_temp AS $$
    SELECT CASE cadence
        WHEN 'daily' THEN calendar_windows_passed.period::date - due.period::date
        ELSE (extract(year FROM calendar_windows_passed.period) * 12 + extract(month FROM calendar_windows_passed.period)
            - extract(year FROM due.period) * 12 - extract(month FROM due.period))::integer
    END
    FROM (SELECT calendar_period(cadence, day, time_of_day, zone, due_at) AS period) AS due
$$;

-- As in 0002, but for the windows that passed.
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
            ELSE {schema}.calendar_windows_passed(cadence, day, time_of_day, zone, due_at, g.period)
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
