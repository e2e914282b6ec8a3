-- Release 0002 would take their batches for ordinary ones, and refresh whom they were to take back from.
DO $$
BEGIN
    IF EXISTS (SELECT FROM {schema}.credit_refresh_runs WHERE status = 'running' AND work IN ('apply', 'rollback')) THEN
        RAISE EXCEPTION 'runs that apply or roll back are still running'
            USING HINT = 'Let them end, or cancel them: credits runs list --status running, credits runs cancel RUN';
    END IF;
END
$$;
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
-- uq_credit_refresh_runs_parent stays as it is: single users may have been taken back more than once by now.
ALTER TABLE {schema}.credit_refresh_runs
    DROP COLUMN work, DROP COLUMN subject_run_id, DROP COLUMN keep_window, DROP COLUMN amount;
ALTER TABLE {schema}.users DROP COLUMN refresh_shortfall;
