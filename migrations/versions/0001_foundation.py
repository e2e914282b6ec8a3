"""Tables, the rule, partitions, and the tiers of the environment as plans."""

from __future__ import annotations

from pathlib import Path

from alembic import context, op
from sqlalchemy import text

import settings

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SQL = Path(__file__).parent.parent / "sql" / revision


def upgrade() -> None:
    loaded = settings.load()
    for name in ("tables", "rule", "partitions"):
        script = (SQL / f"{name}.sql").read_text().replace("{schema}", loaded.database_schema)
        # Without parameters: the scripts hold colons and percent signs of their own.
        op.get_bind().execution_options(no_parameters=True).exec_driver_sql(script)
    op.get_bind().execute(
        text("INSERT INTO plans (code, name, amount) VALUES ('free', 'Free', :free), ('pro', 'Pro', :pro)"),
        {"free": loaded.credits_free_tier, "pro": loaded.credits_pro_tier},
    )


def downgrade() -> None:
    schema = context.get_context().opts["schema_name"]
    for function in ("decide", "credits_to_add", "refresh_window", "ensure_partitions"):
        op.execute(f"DROP FUNCTION {schema}.{function}")
    for table in (
        "credit_audit_logs",
        "credit_refresh_histories",
        "credit_refresh_batches",
        "credit_refresh_runs",
        "users",
        "plans",
        "settings",
    ):
        op.execute(f"DROP TABLE {table}")
    op.execute(f"DROP FUNCTION {schema}.refuse_audit_change")
