-- Runs that go no faster than they were told to.

ALTER TABLE {schema}.credit_refresh_runs
    -- The next batch of a paced run starts no earlier: workers take their turns from here.
    ADD COLUMN paced_until timestamptz,
    ADD CONSTRAINT ck_credit_refresh_runs_max_users_per_second CHECK (max_users_per_second > 0);
