ALTER TABLE {schema}.credit_refresh_runs
    DROP CONSTRAINT ck_credit_refresh_runs_window_end,
    DROP COLUMN window_end;
DROP TABLE {schema}.stripe_events;
DROP TABLE {schema}.stripe_subscriptions;
DROP TABLE {schema}.stripe_customers;
