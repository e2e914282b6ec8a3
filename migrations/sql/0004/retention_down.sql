-- Revision 0003 would take what retention has dropped for never granted, and its auditor for a fault.
DO $$
DECLARE
    since timestamptz := (SELECT books_since FROM {schema}.settings);
BEGIN
    IF since IS NOT NULL THEN
        RAISE EXCEPTION 'retention has dropped what lies before %, and revision 0003 does not know of it', since
            USING HINT = 'Stay at 0004, or restore a dump from before the first retention.';
    END IF;
END
$$;
DROP TRIGGER run_within_books ON {schema}.credit_refresh_runs;
DROP FUNCTION {schema}.refuse_before_books;
ALTER TABLE {schema}.settings DROP COLUMN books_since;
