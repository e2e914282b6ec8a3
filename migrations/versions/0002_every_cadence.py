"""Every cadence and every grant mode."""

from __future__ import annotations

from pathlib import Path

from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SQL = Path(__file__).parent.parent / "sql"


def _run(path: str) -> None:
    schema = context.get_context().opts["schema_name"]
    script = (SQL / path).read_text().replace("{schema}", schema)
    # Without parameters: the scripts hold colons and percent signs of their own.
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(script)


def _drop(*functions: str) -> None:
    schema = context.get_context().opts["schema_name"]
    for function in functions:
        op.execute(f"DROP FUNCTION {schema}.{function}")


def upgrade() -> None:
    _drop("decide", "refresh_window", "credits_to_add")
    _run("0002/constraints.sql")
    _run("0002/rule.sql")
    _run("0002/host.sql")


def downgrade() -> None:
    _run("0002/host_down.sql")
    _drop("decide", "refresh_window", "credits_to_add", "calendar_period", "calendar_boundary")
    _run("0002/constraints_down.sql")
    _run("0001/rule.sql")
