-- Back to the server's defaults, and with them what a host has set for these parameters itself.
DO $$
DECLARE
    part regclass;
BEGIN
    EXECUTE regexp_replace(
        pg_get_functiondef('{schema}.ensure_partitions'::regproc),
        'INCLUDING INDEXES\) WITH \([^)]*\)', 'INCLUDING INDEXES)'
    );
    FOR part IN
        SELECT inhrelid FROM pg_inherits
        WHERE inhparent IN ('{schema}.credit_refresh_histories'::regclass, '{schema}.credit_audit_logs'::regclass)
    LOOP
        EXECUTE format('ALTER TABLE %s RESET (autovacuum_freeze_min_age, autovacuum_vacuum_insert_threshold, '
            'autovacuum_vacuum_insert_scale_factor)', part);
    END LOOP;
END
$$;
ALTER TABLE {schema}.credit_refresh_runs RESET (fillfactor);
ALTER TABLE {schema}.credit_refresh_batches RESET (
    autovacuum_vacuum_threshold, autovacuum_vacuum_scale_factor,
    autovacuum_analyze_threshold, autovacuum_analyze_scale_factor
);
ALTER TABLE {schema}.users RESET (
    fillfactor, autovacuum_vacuum_threshold, autovacuum_vacuum_scale_factor,
    autovacuum_analyze_threshold, autovacuum_analyze_scale_factor, vacuum_truncate
);
