-- Keys of the HTTP API. A key itself is nowhere: it is shown once, when it is made (refresh/keys.py).

CREATE TABLE {schema}.api_keys (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    -- What stands between the key's underscores: it names the key in lists, logs and the audit log, and is no secret.
    prefix text NOT NULL,
    -- SHA-256 of the whole key. A slow hash protects what people choose; a key has 256 random bits, which nobody
    -- guesses at any speed, and it is checked on every request.
    secret_hash bytea NOT NULL,
    name text NOT NULL,
    scopes text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    created_by text NOT NULL,
    expires_at timestamptz,
    last_used_at timestamptz,
    revoked_at timestamptz,
    revoked_by text,
    CONSTRAINT pk_api_keys PRIMARY KEY (id),
    CONSTRAINT uq_api_keys_prefix UNIQUE (prefix),
    CONSTRAINT uq_api_keys_secret_hash UNIQUE (secret_hash),
    CONSTRAINT ck_api_keys_secret_hash CHECK (octet_length(secret_hash) = 32),
    CONSTRAINT ck_api_keys_scopes CHECK (scopes <@ '{read,support,admin}'::text[] AND cardinality(scopes) > 0),
    CONSTRAINT ck_api_keys_revoked CHECK ((revoked_at IS NULL) = (revoked_by IS NULL))
);
