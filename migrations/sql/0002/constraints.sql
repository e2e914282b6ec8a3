-- What the rule now knows is admitted; what it cannot use is refused.
CREATE TABLE {schema}.timezones (
    name text NOT NULL,
    CONSTRAINT pk_timezones PRIMARY KEY (name)
);
INSERT INTO {schema}.timezones
SELECT name FROM pg_timezone_names WHERE name !~ '^(posix|right)/' AND name NOT IN ('localtime', 'posixrules', 'Factory')
UNION SELECT 'UTC';

ALTER TABLE {schema}.plans
    DROP CONSTRAINT ck_plans_grant_mode,
    DROP CONSTRAINT ck_plans_cadence,
    ADD CONSTRAINT ck_plans_grant_mode CHECK (grant_mode IN ('fill', 'reset', 'add', 'rollover')),
    ADD CONSTRAINT ck_plans_cadence CHECK (cadence IN ('rolling', 'monthly', 'daily', 'external')),
    ADD CONSTRAINT ck_plans_rollover_has_cap CHECK (grant_mode <> 'rollover' OR rollover_cap IS NOT NULL),
    ADD CONSTRAINT ck_plans_monthly_has_day CHECK (cadence <> 'monthly' OR day_of_month IS NOT NULL),
    ADD CONSTRAINT ck_plans_daily_has_time CHECK (cadence <> 'daily' OR time_of_day IS NOT NULL),
    -- 24:00 is a time to PostgreSQL, and would be the next day's boundary.
    ADD CONSTRAINT ck_plans_time_of_day CHECK (time_of_day < '24:00'),
    ADD CONSTRAINT fk_plans_timezone_timezones FOREIGN KEY (timezone) REFERENCES {schema}.timezones (name);

-- A plan's users move to its new grid by a run of their own.
ALTER TABLE {schema}.credit_refresh_runs
    DROP CONSTRAINT ck_credit_refresh_runs_kind,
    ADD CONSTRAINT ck_credit_refresh_runs_kind CHECK (kind IN ('refresh', 'apply', 'rollback', 'retry', 'regrid'));

ALTER TABLE {schema}.users
    DROP CONSTRAINT ck_users_credit_refresh_day,
    ADD CONSTRAINT ck_users_credit_refresh_day CHECK (credit_refresh_day BETWEEN 1 AND 31),
    ADD CONSTRAINT fk_users_timezone_timezones FOREIGN KEY (timezone) REFERENCES {schema}.timezones (name);
