ALTER FUNCTION {schema}.ensure_partitions(timestamptz, integer) SECURITY INVOKER;
GRANT EXECUTE ON FUNCTION {schema}.ensure_partitions(timestamptz, integer) TO PUBLIC;
