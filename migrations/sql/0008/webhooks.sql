-- Outgoing webhooks: who is told, and the outbox, which is written in the transaction of what it tells.

CREATE TABLE {schema}.webhook_endpoints (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    url text NOT NULL,
    -- Signs what is sent, so it has to be kept as it is; shown once. A chat's address is its own secret.
    secret text,
    format text NOT NULL DEFAULT 'standard',
    events text[] NOT NULL,
    -- Told once when nobody was refreshed for so many days.
    no_grants_days integer,
    description text,
    active boolean NOT NULL DEFAULT true,
    inactive_reason text,
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Attempts in a row that have failed because of the endpoint and not of the message, and when it is tried again.
    failures integer NOT NULL DEFAULT 0,
    resume_at timestamptz,
    silence_checked_at timestamptz,
    silence_noticed_at timestamptz,
    CONSTRAINT pk_webhook_endpoints PRIMARY KEY (id),
    CONSTRAINT ck_webhook_endpoints_format CHECK (format IN ('standard', 'slack', 'discord')),
    CONSTRAINT ck_webhook_endpoints_events CHECK (
        events <@ ARRAY['run.finished', 'notice.run_failed', 'user.refreshed', 'user.held', 'verify.finding']
    ),
    CONSTRAINT ck_webhook_endpoints_secret CHECK ((format = 'standard') = (secret IS NOT NULL)),
    CONSTRAINT ck_webhook_endpoints_no_grants_days CHECK (no_grants_days BETWEEN 1 AND 366)
);

-- The outbox. It has no foreign key: a grant would lock the endpoint's row, and fail when it is removed in that instant.
-- Nothing here may fail a grant.
CREATE TABLE {schema}.webhook_deliveries (
    id bigint GENERATED ALWAYS AS IDENTITY,
    -- The same in every attempt, so that a receiver can tell a repetition.
    message_id uuid NOT NULL DEFAULT gen_random_uuid(),
    endpoint_id uuid NOT NULL,
    type text NOT NULL,
    payload jsonb NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    attempts integer NOT NULL DEFAULT 0,
    -- While somebody sends it, the end of their lease.
    next_attempt_at timestamptz DEFAULT now(),
    last_status integer,
    last_error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    CONSTRAINT pk_webhook_deliveries PRIMARY KEY (id),
    CONSTRAINT ck_webhook_deliveries_status CHECK (status IN ('pending', 'delivered', 'dead')),
    CONSTRAINT ck_webhook_deliveries_pending CHECK (
        (status = 'pending') = (next_attempt_at IS NOT NULL) AND (status = 'pending') = (finished_at IS NULL)
    )
) WITH (
    autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_threshold = 1000, autovacuum_analyze_scale_factor = 0.02
);
CREATE INDEX ix_webhook_deliveries_pending ON {schema}.webhook_deliveries (endpoint_id, next_attempt_at)
    WHERE status = 'pending';
CREATE INDEX ix_webhook_deliveries_dead ON {schema}.webhook_deliveries (id) WHERE status = 'dead';

-- An instant as JSON, whatever the session's time zone.
CREATE FUNCTION {schema}.utc_text(at timestamptz) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;

-- What an endpoint is told of a user: the batch and grant_window() say it in the same words.
CREATE FUNCTION {schema}.user_notice(
    status text, external_id text, run_id uuid, source text, plan_code text, grant_mode text, target bigint,
    balance bigint, credits_added bigint, window_start timestamptz, window_end timestamptz, windows_passed integer,
    hold_reason text, hold_until timestamptz
) RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT jsonb_build_object(
        'userId', external_id, 'runId', run_id, 'source', source, 'planCode', plan_code,
        'windowStart', {schema}.utc_text(window_start), 'windowEnd', {schema}.utc_text(window_end)
    ) || CASE status
        WHEN 'refreshed' THEN jsonb_build_object(
            'grantMode', grant_mode, 'target', target, 'oldBalance', balance, 'creditsAdded', credits_added,
            'newBalance', balance + credits_added, 'windowsPassed', windows_passed
        )
        ELSE jsonb_build_object(
            'creditBalance', balance, 'holdReason', hold_reason, 'holdUntil', {schema}.utc_text(hold_until)
        )
    END
$$;

-- Of a user whom a function or a trigger has refreshed, or has found held. Called by grant_window() alone, as its owner.
CREATE FUNCTION {schema}.tell_of_user(
    u {schema}.users, status text, source text, grant_mode text, target bigint, credits_added bigint,
    window_start timestamptz, window_end timestamptz, windows_passed integer
) RETURNS void
LANGUAGE sql SET search_path = {schema}, pg_temp AS $$
    INSERT INTO webhook_deliveries (endpoint_id, type, payload)
    SELECT e.id, 'user.' || status, user_notice(
        status, u.external_id, NULL, source, u.plan_code, grant_mode, target, u.credit_balance, credits_added,
        window_start, window_end, windows_passed, u.hold_reason, u.hold_until
    )
    FROM webhook_endpoints AS e
    WHERE e.active AND 'user.' || status = ANY (e.events)
$$;
REVOKE ALL ON FUNCTION {schema}.tell_of_user FROM PUBLIC;

-- grant_window() as it is, and before it returns what it has granted, this.
DO $do$
DECLARE
    definition text := pg_get_functiondef('{schema}.grant_window'::regproc);
    told text := regexp_replace(definition, '(\n    RETURN granted;\nEND)', $told$
    IF EXISTS (SELECT FROM webhook_endpoints AS e WHERE e.active)
        AND (granted.newly_held OR granted.credits_added IS NOT NULL)
    THEN
        PERFORM tell_of_user(
            u, CASE WHEN granted.newly_held THEN 'held' ELSE 'refreshed' END, grant_window.source, p.grant_mode,
            d.target, granted.credits_added, d.window_start, d.window_end, d.windows_passed
        );
    END IF;\1$told$);
BEGIN
    IF told = definition THEN
        RAISE EXCEPTION 'grant_window() does not end as this migration expects';
    END IF;
    EXECUTE told;
END
$do$;
