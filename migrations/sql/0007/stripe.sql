-- Stripe's events, and what they have told: which customer is which user, and how each subscription stands.

CREATE TABLE {schema}.stripe_customers (
    customer_id text NOT NULL,
    user_id bigint NOT NULL,
    linked_by text NOT NULL,
    linked_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pk_stripe_customers PRIMARY KEY (customer_id),
    -- A host deletes its users without a thought for us.
    CONSTRAINT fk_stripe_customers_user_id_users FOREIGN KEY (user_id) REFERENCES {schema}.users (id) ON DELETE CASCADE
);
-- Not unique: Stripe's own checkout makes a new customer whenever it is not given one.
CREATE INDEX ix_stripe_customers_user_id ON {schema}.stripe_customers (user_id);

CREATE TABLE {schema}.stripe_subscriptions (
    subscription_id text NOT NULL,
    customer_id text NOT NULL,
    status text NOT NULL,
    created timestamptz NOT NULL,
    price_id text,
    plan_code text,
    anniversary timestamptz,
    -- The event that says so, and when Stripe made it: an older one changes nothing.
    event_id text NOT NULL,
    event_created timestamptz NOT NULL,
    event_rank smallint NOT NULL,
    CONSTRAINT pk_stripe_subscriptions PRIMARY KEY (subscription_id)
);
CREATE INDEX ix_stripe_subscriptions_customer_id ON {schema}.stripe_subscriptions (customer_id);

CREATE TABLE {schema}.stripe_events (
    id text NOT NULL,
    type text NOT NULL,
    livemode boolean NOT NULL,
    created timestamptz NOT NULL,
    payload jsonb NOT NULL,
    customer_id text,
    subscription_id text,
    period_start timestamptz,
    period_end timestamptz,
    received_at timestamptz NOT NULL DEFAULT now(),
    processed_at timestamptz,
    outcome text,
    user_id bigint,
    run_id uuid,
    note text,
    error text,
    -- When upkeep looks at it again. From the first on: whoever stored it may die before it is processed.
    look_at timestamptz DEFAULT now() + interval '1 minute',
    CONSTRAINT pk_stripe_events PRIMARY KEY (id),
    CONSTRAINT fk_stripe_events_run_id_credit_refresh_runs
        FOREIGN KEY (run_id) REFERENCES {schema}.credit_refresh_runs (id),
    CONSTRAINT ck_stripe_events_outcome CHECK (outcome IN (
        'granted', 'already_granted', 'plan_set', 'unchanged', 'outdated', 'linked', 'ignored', 'unknown_customer',
        'unknown_plan', 'no_period', 'period_over', 'before_books', 'not_external', 'other_subscription',
        'awaits_subscription', 'not_begun', 'held', 'inactive', 'no_plan', 'paused', 'failed'
    )),
    CONSTRAINT ck_stripe_events_processed CHECK ((outcome IS NULL) = (processed_at IS NULL)),
    CONSTRAINT ck_stripe_events_granted CHECK (outcome <> 'granted' OR run_id IS NOT NULL)
);
CREATE INDEX ix_stripe_events_look_at ON {schema}.stripe_events (look_at) WHERE look_at IS NOT NULL;
CREATE INDEX ix_stripe_events_customer_id ON {schema}.stripe_events (customer_id, created);
CREATE INDEX ix_stripe_events_received_at ON {schema}.stripe_events (received_at);

ALTER TABLE {schema}.credit_refresh_runs
    -- The end of what the run grants, where somebody else says so: a billing period's. NULL: as the rule says.
    ADD COLUMN window_end timestamptz,
    ADD CONSTRAINT ck_credit_refresh_runs_window_end CHECK (
        window_end IS NULL OR (force AND as_of IS NOT NULL AND window_end > as_of)
    );
