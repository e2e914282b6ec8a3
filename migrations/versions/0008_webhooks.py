"""Outgoing webhooks: their endpoints, and the outbox that grants write."""

from __future__ import annotations

from pathlib import Path

from alembic import context, op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

SQL = Path(__file__).parent.parent / "sql" / "0008"


def _run(name: str) -> None:
    schema = context.get_context().opts["schema_name"]
    script = (SQL / name).read_text().replace("{schema}", schema)
    # Without parameters: the scripts hold colons and percent signs of their own.
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(script)


def upgrade() -> None:
    _run("webhooks.sql")


def downgrade() -> None:
    _run("webhooks_down.sql")
