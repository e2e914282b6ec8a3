DROP TRIGGER run_within_books ON {schema}.credit_refresh_runs;
DROP FUNCTION {schema}.refuse_before_books;
ALTER TABLE {schema}.settings DROP COLUMN books_since;
