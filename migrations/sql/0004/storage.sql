-- How the tables that every refresh writes are stored and vacuumed. Measured by `python -m bench bloat` and `idle`; the
-- figures are in docs/scaling.md. Nothing of ours sets these again: a host's own ALTER TABLE stays. The locks that this
-- takes keep out vacuums and other changes of tables, no reader and no writer.

ALTER TABLE {schema}.users SET (
    -- Room in each block for a new version of a row or two, so that a host's spend leaves the indexes alone (HOT). Of
    -- 40,000 spends among 4,000 refreshes, which never do because they move `wake_at`, all did at 90; at 100 about one
    -- in twenty had to find another block.
    fillfactor = 90,
    -- Twice a day where 1/720 of the users are refreshed each hour. The default, a fifth of the table, is six days:
    -- until then the indexes keep an entry for each refresh.
    autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.02,
    -- `wake_at` moves on all the time, and the scan's plan goes by how much of it lies in the past.
    autovacuum_analyze_threshold = 1000, autovacuum_analyze_scale_factor = 0.02,
    -- What a large run leaves free at the table's end the next one fills. To give it back, vacuum would lock the table
    -- against every spend.
    vacuum_truncate = off
);
-- A closed batch leaves a dead entry in the index over pending ones, which upkeep reads every minute; and what is
-- pending is between nothing and everything, so statistics are to be young. Its fillfactor is 50 since 0001.
ALTER TABLE {schema}.credit_refresh_batches SET (
    autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_threshold = 1000, autovacuum_analyze_scale_factor = 0.02
);
-- A paced run's row is written at each turn: new versions find room in its block.
ALTER TABLE {schema}.credit_refresh_runs SET (fillfactor = 50);

-- History and audit rows hardly change once they are written. The vacuum that inserts call for freezes them while their
-- blocks are in memory, and not months later all at once; it comes early enough to leave no more than a twentieth of a
-- month unfrozen. Each partition has parameters of its own; their parent can have none.
DO $$
DECLARE
    parameters constant text := 'autovacuum_freeze_min_age = 0, '
        'autovacuum_vacuum_insert_threshold = 10000, autovacuum_vacuum_insert_scale_factor = 0.05';
    part regclass;
BEGIN
    FOR part IN
        SELECT inhrelid FROM pg_inherits
        WHERE inhparent IN ('{schema}.credit_refresh_histories'::regclass, '{schema}.credit_audit_logs'::regclass)
    LOOP
        EXECUTE format('ALTER TABLE %s SET (%s)', part, parameters);
    END LOOP;
    -- Those to come: 0001's function, with a WITH.
    EXECUTE replace(
        pg_get_functiondef('{schema}.ensure_partitions'::regproc),
        'INCLUDING INDEXES)', format('INCLUDING INDEXES) WITH (%s)', parameters)
    );
END
$$;
