"""The SQL that gives a role what it needs and no more: a host's, the workers', the HTTP API's, a reader's.

Only texts are made here; who owns the tables runs them. What a host sets off on users (histories, audit rows, dates)
is written by triggers and functions as their owner, so its role needs no right on those tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from psycopg.sql import SQL, Composable, Identifier

from refresh.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable

Kind = Literal["host", "worker", "api", "read"]

ROLE_MAX_BYTES = 63

# What a host may set, of somebody new and of somebody who is there. Not the dates of those who are there, nor
# held_window and refresh_shortfall: they are the service's.
_HOST_UPDATES = """
credit_balance, email, plan_code, credit_refresh_hold, hold_reason, hold_until, credit_refresh_day,
custom_credit_amount, timezone, active, updated_at
"""
_HOST_INSERTS = """
external_id, email, plan_code, credit_balance, last_credit_refresh, next_refresh_at, credit_refresh_hold, hold_reason,
hold_until, credit_refresh_day, custom_credit_amount, timezone, active
"""
# What grants, rollbacks, regrids, stagger, `credits hold`, `credits release` and Stripe's subscriptions set.
_WORKER_UPDATES = """
credit_balance, last_credit_refresh, next_refresh_at, refresh_shortfall, held_window, credit_refresh_hold, hold_reason,
hold_until, plan_code, credit_refresh_day, updated_at
"""
_ALL_TABLES = """
{schema}.alembic_version, {schema}.settings, {schema}.plans, {schema}.timezones, {schema}.users,
{schema}.user_credits_now, {schema}.credit_refresh_runs, {schema}.credit_refresh_batches,
{schema}.credit_refresh_histories, {schema}.credit_refresh_histories_default,
{schema}.credit_audit_logs, {schema}.credit_audit_logs_default, {schema}.webhook_deliveries
"""
# What becomes of an endpoint that is told something, and of one that says that it is gone.
_ENDPOINT_UPDATES = "failures, resume_at, active, inactive_reason, silence_checked_at, silence_noticed_at"
# A reader sees neither what messages are signed with nor where they go: a chat's address is its secret.
_ENDPOINT_COLUMNS = f"id, format, events, no_grants_days, description, created_by, created_at, {_ENDPOINT_UPDATES}"
# Neither a host nor a worker sees keys of the HTTP API; nobody but the API and the owner sees their hashes.
_KEY_COLUMNS = """
id, prefix, name, scopes, created_at, created_by, expires_at, last_used_at, revoked_at, revoked_by
"""
# What Stripe sent names customers and their addresses: a reader sees what became of it.
_STRIPE_TABLES = "{schema}.stripe_events, {schema}.stripe_customers, {schema}.stripe_subscriptions"
_STRIPE_EVENT_COLUMNS = """
id, type, livemode, created, customer_id, subscription_id, period_start, period_end, received_at, processed_at, outcome,
user_id, run_id, note, error, look_at
"""

# A function is everybody's until it is taken away, and these write.
_SHUT = SQL("""
REVOKE EXECUTE ON FUNCTION {schema}.refresh_credits_if_due(text), {schema}.refresh_due(integer) FROM PUBLIC
""")
_NOTHING = (
    SQL("REVOKE ALL ON ALL TABLES IN SCHEMA {schema} FROM {role}"),
    SQL("REVOKE ALL ON ALL ROUTINES IN SCHEMA {schema} FROM {role}"),
    SQL("REVOKE ALL ON SCHEMA {schema} FROM {role}"),
    SQL("GRANT USAGE ON SCHEMA {schema} TO {role}"),
)
_WORKER = (
    SQL(f"GRANT SELECT ON {_ALL_TABLES.strip()} TO {{role}}"),
    SQL(f"GRANT UPDATE ({_WORKER_UPDATES.strip()}) ON {{schema}}.users TO {{role}}"),
    SQL("GRANT INSERT, UPDATE ON {schema}.credit_refresh_runs TO {role}"),
    SQL("GRANT INSERT, UPDATE, DELETE ON {schema}.credit_refresh_batches TO {role}"),
    # Of what is written, a rollback's mark alone can be set; deleted are planned rows, by retention.
    SQL("GRANT INSERT, UPDATE (reversed_by_run_id), DELETE ON {schema}.credit_refresh_histories TO {role}"),
    SQL("GRANT INSERT ON {schema}.credit_audit_logs TO {role}"),
    SQL(f"GRANT SELECT, UPDATE ({_ENDPOINT_UPDATES}) ON {{schema}}.webhook_endpoints TO {{role}}"),
    SQL("GRANT INSERT, UPDATE, DELETE ON {schema}.webhook_deliveries TO {role}"),
    SQL("GRANT EXECUTE ON FUNCTION {schema}.ensure_partitions(timestamptz, integer) TO {role}"),
    SQL(f"GRANT SELECT, INSERT, UPDATE ON {_STRIPE_TABLES} TO {{role}}"),
)
_GRANTS: dict[Kind, tuple[SQL, ...]] = {
    "host": (
        SQL("""
GRANT SELECT ON {schema}.users, {schema}.user_credits_now, {schema}.plans, {schema}.credit_refresh_histories,
    {schema}.credit_refresh_runs TO {role}
"""),
        SQL(f"GRANT INSERT ({_HOST_INSERTS.strip()}) ON {{schema}}.users TO {{role}}"),
        SQL(f"GRANT UPDATE ({_HOST_UPDATES.strip()}) ON {{schema}}.users TO {{role}}"),
        SQL("""
GRANT EXECUTE ON FUNCTION {schema}.refresh_credits_if_due(text), {schema}.refresh_due(integer) TO {role}
"""),
    ),
    "worker": _WORKER,
    # It opens runs and refreshes single users itself; keys are looked up there, and made by the owner.
    "api": (
        *_WORKER,
        SQL("GRANT UPDATE (custom_credit_amount, timezone) ON {schema}.users TO {role}"),
        SQL("GRANT SELECT, UPDATE (last_used_at) ON {schema}.api_keys TO {role}"),
        SQL("GRANT INSERT, UPDATE, DELETE ON {schema}.webhook_endpoints TO {role}"),
    ),
    "read": (
        SQL(f"GRANT SELECT ON {_ALL_TABLES.strip()} TO {{role}}"),
        SQL(f"GRANT SELECT ({_KEY_COLUMNS.strip()}) ON {{schema}}.api_keys TO {{role}}"),
        SQL("GRANT SELECT ON {schema}.stripe_customers, {schema}.stripe_subscriptions TO {role}"),
        SQL(f"GRANT SELECT ({_STRIPE_EVENT_COLUMNS.strip()}) ON {{schema}}.stripe_events TO {{role}}"),
        SQL(f"GRANT SELECT ({_ENDPOINT_COLUMNS}) ON {{schema}}.webhook_endpoints TO {{role}}"),
    ),
}


@dataclass(frozen=True, slots=True)
class Grants:
    """Statements, in the order in which they are to be run, in one transaction.

    Attributes:
        kind: whose; None: for all roles.
        role: who gets them.
        statements: without semicolons.
    """

    kind: Kind | None
    role: str | None
    statements: list[str]


def grants(schema: str, roles: Iterable[tuple[Kind, str]]) -> list[Grants]:
    """The SQL that leaves each role with the rights of its kind alone, in our schema.

    Args:
        schema: a checked identifier (`Settings.database_schema`).
        roles: kinds and names; the roles must exist by then. One that is named twice gets both kinds' rights.

    Raises:
        RefusedError: a name cannot be a role's.
    """
    asked = list(dict.fromkeys(roles))
    for _, role in asked:
        if not role or "\0" in role or len(role.encode(errors="surrogatepass")) > ROLE_MAX_BYTES or role == "public":
            raise RefusedError(f"{role!r} cannot be a role's name")
    made = [Grants(None, None, [_text(_SHUT, schema)])]
    made += [
        Grants(None, role, [_text(text, schema, role) for text in _NOTHING])
        for role in dict.fromkeys(r for _, r in asked)
    ]
    made += [Grants(kind, role, [_text(text, schema, role) for text in _GRANTS[kind]]) for kind, role in asked]
    return made


def _text(text: SQL, schema: str, role: str = "") -> str:
    names: dict[str, Composable] = {"schema": Identifier(schema), "role": Identifier(role)} if role else {}
    return text.format(**(names or {"schema": Identifier(schema)})).as_string(None).strip()
