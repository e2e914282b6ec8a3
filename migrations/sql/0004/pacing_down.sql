ALTER TABLE {schema}.credit_refresh_runs
    DROP CONSTRAINT ck_credit_refresh_runs_max_users_per_second,
    DROP COLUMN paced_until;
