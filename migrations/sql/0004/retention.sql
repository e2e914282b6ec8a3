-- What retention has dropped.

ALTER TABLE {schema}.settings
    -- The books are whole from here on: what is older may have been dropped. NULL: nothing was.
    ADD COLUMN books_since timestamptz;
