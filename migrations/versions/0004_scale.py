"""Paced runs, retention, and storage settings of the tables that every refresh writes."""

from __future__ import annotations

from pathlib import Path

from alembic import context, op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SQL = Path(__file__).parent.parent / "sql" / "0004"


def _run(name: str) -> None:
    schema = context.get_context().opts["schema_name"]
    script = (SQL / name).read_text().replace("{schema}", schema)
    # Without parameters: the scripts hold colons and percent signs of their own.
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(script)


def upgrade() -> None:
    _run("storage.sql")  # waits for vacuums, and keeps out nobody; the others lock whole tables, and for an instant
    _run("pacing.sql")
    _run("retention.sql")
    _run("rule.sql")


def downgrade() -> None:
    _run("rule_down.sql")
    _run("storage_down.sql")
    _run("retention_down.sql")
    _run("pacing_down.sql")
