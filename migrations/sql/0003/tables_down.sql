DROP TRIGGER run_begins ON {schema}.credit_refresh_runs;
DROP TRIGGER run_ends_once ON {schema}.credit_refresh_runs;
DROP TRIGGER batch_begins ON {schema}.credit_refresh_batches;
DROP TRIGGER batch_ends_once ON {schema}.credit_refresh_batches;
DROP FUNCTION {schema}.refuse_transition;
DROP INDEX {schema}.ix_credit_refresh_histories_user_id;
DROP INDEX {schema}.ix_credit_refresh_histories_run_id_user_id;
CREATE INDEX ix_credit_refresh_histories_run_id ON {schema}.credit_refresh_histories (run_id)
    WHERE status <> 'refreshed';
ALTER TABLE {schema}.credit_refresh_histories DROP COLUMN digest;
ALTER TABLE {schema}.credit_refresh_batches DROP COLUMN atomic;
DROP INDEX {schema}.uq_credit_refresh_runs_parent;
CREATE UNIQUE INDEX uq_credit_refresh_runs_parent ON {schema}.credit_refresh_runs (parent_run_id, kind)
    WHERE kind IN ('apply', 'rollback') AND NOT dry_run;
ALTER TABLE {schema}.credit_refresh_runs
    DROP COLUMN work, DROP COLUMN subject_run_id, DROP COLUMN keep_window, DROP COLUMN amount;
ALTER TABLE {schema}.users DROP COLUMN refresh_shortfall;
