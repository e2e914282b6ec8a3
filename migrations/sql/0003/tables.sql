-- Runs that are forced, applied, rolled back, retried and cancelled.

ALTER TABLE {schema}.users
    -- What a rollback that gave the user's window back could not take: the next grant's target is that much lower.
    ADD COLUMN refresh_shortfall bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT ck_users_refresh_shortfall CHECK (refresh_shortfall >= 0);

ALTER TABLE {schema}.credit_refresh_runs
    -- What the batches do. It is the run's kind but for a retry, which takes up another run's work.
    ADD COLUMN work text NOT NULL DEFAULT 'refresh',
    -- The dry run that is applied, or the run whose grants are taken back.
    ADD COLUMN subject_run_id uuid,
    ADD COLUMN keep_window boolean NOT NULL DEFAULT false,
    ADD COLUMN amount bigint,
    ADD CONSTRAINT fk_credit_refresh_runs_subject_run_id_credit_refresh_runs
        FOREIGN KEY (subject_run_id) REFERENCES {schema}.credit_refresh_runs (id),
    ADD CONSTRAINT ck_credit_refresh_runs_work CHECK (work IN ('refresh', 'apply', 'rollback', 'regrid')),
    ADD CONSTRAINT ck_credit_refresh_runs_amount CHECK (amount > 0);
UPDATE {schema}.credit_refresh_runs SET work = kind WHERE kind = 'regrid';
-- Of a database that was at this release before.
UPDATE {schema}.credit_refresh_runs SET work = kind, subject_run_id = parent_run_id
WHERE kind IN ('apply', 'rollback');
WITH RECURSIVE origin AS (
    SELECT id AS retry_id, kind, parent_run_id FROM {schema}.credit_refresh_runs WHERE kind = 'retry'
    UNION ALL
    SELECT o.retry_id, r.kind, r.parent_run_id
    FROM origin AS o JOIN {schema}.credit_refresh_runs AS r ON r.id = o.parent_run_id
    WHERE o.kind = 'retry'
)
UPDATE {schema}.credit_refresh_runs AS r SET
    work = o.kind, subject_run_id = CASE WHEN o.kind IN ('apply', 'rollback') THEN o.parent_run_id END
FROM origin AS o
WHERE o.retry_id = r.id AND o.kind <> 'retry';
ALTER TABLE {schema}.credit_refresh_runs
    ADD CONSTRAINT ck_credit_refresh_runs_kind_is_work CHECK (kind IN (work, 'retry')),
    ADD CONSTRAINT ck_credit_refresh_runs_subject
        CHECK ((work IN ('apply', 'rollback')) = (subject_run_id IS NOT NULL));
DROP INDEX {schema}.uq_credit_refresh_runs_parent;
-- A run is applied once, and rolled back once: but for single users, and for what a cancelled rollback left.
CREATE UNIQUE INDEX uq_credit_refresh_runs_parent ON {schema}.credit_refresh_runs (parent_run_id, kind)
    WHERE kind IN ('apply', 'rollback') AND NOT dry_run
        AND NOT (kind = 'rollback' AND (status = 'cancelled' OR selection -> 'users' IS NOT NULL));

ALTER TABLE {schema}.credit_refresh_batches
    -- All of its users or none: nobody is put off to another batch, and one failure undoes it.
    ADD COLUMN atomic boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT ck_credit_refresh_batches_all_or_none
        CHECK (NOT atomic OR status <> 'done' OR users_failed + users_deferred = 0);

ALTER TABLE {schema}.credit_refresh_histories
    -- Of a planned row, over what an apply must find unchanged.
    ADD COLUMN digest bytea;
DROP INDEX {schema}.ix_credit_refresh_histories_run_id;
-- Everything but grants, by run: failures to show, plans to apply. Costs a grant nothing.
CREATE INDEX ix_credit_refresh_histories_run_id_user_id ON {schema}.credit_refresh_histories (run_id, user_id)
    WHERE status <> 'refreshed';
-- With the unique keys over live grants and held windows, a user's whole history. Costs a grant nothing.
CREATE INDEX ix_credit_refresh_histories_user_id ON {schema}.credit_refresh_histories (user_id, window_start)
    WHERE status IN ('failed', 'skipped', 'reversed') OR reversed_by_run_id IS NOT NULL;

-- The states of a run and a batch, and who moves them: docs/runs.md. What has ended stays as it ended.
CREATE FUNCTION {schema}.refuse_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% %: from % to % there is no way', TG_TABLE_NAME, new.id,
        CASE TG_OP WHEN 'INSERT' THEN 'nothing' ELSE old.status END, new.status
        USING ERRCODE = 'check_violation';
END
$$;
CREATE TRIGGER run_begins BEFORE INSERT ON {schema}.credit_refresh_runs
    FOR EACH ROW WHEN (new.status <> 'running' AND (new.status <> 'succeeded' OR new.batches_total > 0))
    EXECUTE FUNCTION {schema}.refuse_transition();
CREATE TRIGGER run_ends_once BEFORE UPDATE OF status ON {schema}.credit_refresh_runs
    FOR EACH ROW WHEN (old.status <> 'running' AND new.status <> old.status)
    EXECUTE FUNCTION {schema}.refuse_transition();
CREATE TRIGGER batch_begins BEFORE INSERT ON {schema}.credit_refresh_batches
    FOR EACH ROW WHEN (new.status <> 'pending')
    EXECUTE FUNCTION {schema}.refuse_transition();
CREATE TRIGGER batch_ends_once BEFORE UPDATE OF status ON {schema}.credit_refresh_batches
    FOR EACH ROW WHEN (old.status <> 'pending' AND new.status <> old.status)
    EXECUTE FUNCTION {schema}.refuse_transition();
