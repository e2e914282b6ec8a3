-- Roles with few rights (`credits db grants`): a worker that does not own the tables still makes the coming months'
-- partitions. Attaching one is the owner's alone, so the function does it as its owner, as the host's functions have
-- done since 0002, and is called by nobody but whom it was granted to. Its search_path is fixed since 0001.
ALTER FUNCTION {schema}.ensure_partitions(timestamptz, integer) SECURITY DEFINER;
REVOKE ALL ON FUNCTION {schema}.ensure_partitions(timestamptz, integer) FROM PUBLIC;
