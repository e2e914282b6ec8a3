-- What retention has dropped.

ALTER TABLE {schema}.settings
    -- The books are whole from here on: what is older may have been dropped. NULL: nothing was.
    ADD COLUMN books_since timestamptz;

-- Of the time before the books nobody knows any more what was granted, so no run may decide as of then.
CREATE FUNCTION {schema}.refuse_before_books() RETURNS trigger
LANGUAGE plpgsql SET search_path = {schema}, pg_temp AS $$
DECLARE
    since timestamptz := (SELECT books_since FROM settings);
BEGIN
    IF new.as_of < since THEN
        RAISE EXCEPTION '% lies before the books, which begin at %', new.as_of, since USING ERRCODE = 'check_violation';
    END IF;
    RETURN new;
END
$$;
CREATE TRIGGER run_within_books BEFORE INSERT ON {schema}.credit_refresh_runs
    FOR EACH ROW WHEN (new.as_of IS NOT NULL) EXECUTE FUNCTION {schema}.refuse_before_books();
