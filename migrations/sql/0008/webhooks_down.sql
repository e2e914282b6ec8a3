-- What was not delivered yet is lost with the outbox.
DO $do$
BEGIN
    EXECUTE regexp_replace(
        pg_get_functiondef('{schema}.grant_window'::regproc),
        '\n    IF EXISTS \(SELECT FROM webhook_endpoints.*?\n    END IF;(?=\n    RETURN granted;\nEND)', ''
    );
END
$do$;
DROP FUNCTION {schema}.tell_of_user;
DROP FUNCTION {schema}.user_notice;
DROP FUNCTION {schema}.utc_text;
DROP TABLE {schema}.webhook_deliveries;
DROP TABLE {schema}.webhook_endpoints;
