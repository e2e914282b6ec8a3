-- Append-only: PostgreSQL hands row triggers of a parent down to its partitions, but not the TRUNCATE trigger,
-- which is a statement's; ensure_partitions() gives each new partition its own.
CREATE FUNCTION {schema}.refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on %: the audit log is append-only', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege', HINT = 'Write a compensating row; retention drops whole partitions.';
END
$$;
CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE ON {schema}.credit_audit_logs
    FOR EACH ROW EXECUTE FUNCTION {schema}.refuse_audit_change();
CREATE TRIGGER audit_is_not_truncated BEFORE TRUNCATE ON {schema}.credit_audit_logs
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.refuse_audit_change();
CREATE TRIGGER audit_is_not_truncated BEFORE TRUNCATE ON {schema}.credit_audit_logs_default
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.refuse_audit_change();

-- Makes the partitions of the month of `at` and of the `months` after it, where they are missing; returns the
-- names of those made. Upkeep calls it. A month that already has rows in the default partition is left there:
-- moving them would lock both tables for the length of a copy.
CREATE FUNCTION {schema}.ensure_partitions(at timestamptz, months integer) RETURNS SETOF text LANGUAGE plpgsql
SET search_path = {schema}, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    parent text;
    key_column text;
    part text;
    from_month timestamptz;
    to_month timestamptz;
    astray boolean;
BEGIN
    -- Somebody else is at it.
    IF NOT pg_try_advisory_xact_lock(hashtextextended(current_schema() || '.ensure_partitions', 0)) THEN
        RETURN;
    END IF;
    FOR parent, key_column, from_month IN
        SELECT p.name, p.key_column, date_trunc('month', at) + make_interval(months => m)
        FROM (VALUES ('credit_refresh_histories', 'window_start'), ('credit_audit_logs', 'occurred_at'))
            AS p (name, key_column)
        CROSS JOIN generate_series(0, months) AS m
    LOOP
        part := format('%s_%s', parent, to_char(from_month, '"y"YYYY"m"MM'));
        to_month := from_month + interval '1 month';
        CONTINUE WHEN to_regclass(format('%I', part)) IS NOT NULL;
        EXECUTE format('SELECT EXISTS (SELECT FROM %I WHERE %I >= %L AND %I < %L)',
            parent || '_default', key_column, from_month, key_column, to_month) INTO astray;
        IF astray THEN
            RAISE WARNING '% has rows in % already: they stay there', parent || '_default', part;
            CONTINUE;
        END IF;
        -- Attached, not created in place, which would lock the parent against every batch.
        EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)',
            part, parent);
        EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            parent, part, from_month, to_month);
        IF parent = 'credit_audit_logs' THEN
            EXECUTE format('CREATE TRIGGER audit_is_not_truncated BEFORE TRUNCATE ON %I '
                'FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()', part);
        END IF;
        RETURN NEXT part;
    END LOOP;
END
$$;
SELECT {schema}.ensure_partitions(now() - interval '2 months', 5);
