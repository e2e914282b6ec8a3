-- Refuses to run while a plan or a user uses what release 0001 does not know: nothing is dropped in silence.
ALTER TABLE {schema}.users
    DROP CONSTRAINT fk_users_timezone_timezones,
    DROP CONSTRAINT ck_users_credit_refresh_day,
    ADD CONSTRAINT ck_users_credit_refresh_day CHECK (credit_refresh_day IS NULL);

ALTER TABLE {schema}.plans
    DROP CONSTRAINT fk_plans_timezone_timezones,
    DROP CONSTRAINT ck_plans_time_of_day,
    DROP CONSTRAINT ck_plans_daily_has_time,
    DROP CONSTRAINT ck_plans_monthly_has_day,
    DROP CONSTRAINT ck_plans_rollover_has_cap,
    DROP CONSTRAINT ck_plans_cadence,
    DROP CONSTRAINT ck_plans_grant_mode,
    ADD CONSTRAINT ck_plans_grant_mode CHECK (grant_mode IN ('fill')),
    ADD CONSTRAINT ck_plans_cadence CHECK (cadence IN ('rolling', 'external'));

-- Not valid for the runs that are over: they are the log of what was done.
ALTER TABLE {schema}.credit_refresh_runs
    DROP CONSTRAINT ck_credit_refresh_runs_kind,
    ADD CONSTRAINT ck_credit_refresh_runs_kind CHECK (kind IN ('refresh', 'apply', 'rollback', 'retry')) NOT VALID;

DROP TABLE {schema}.timezones;
