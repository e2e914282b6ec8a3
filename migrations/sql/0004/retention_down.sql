ALTER TABLE {schema}.settings DROP COLUMN books_since;
