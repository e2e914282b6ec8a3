"""Keys of the HTTP API."""

from __future__ import annotations

from pathlib import Path

from alembic import context, op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

SQL = Path(__file__).parent.parent / "sql" / "0006"


def _run(name: str) -> None:
    schema = context.get_context().opts["schema_name"]
    script = (SQL / name).read_text().replace("{schema}", schema)
    # Without parameters: the scripts hold colons and percent signs of their own.
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(script)


def upgrade() -> None:
    _run("api_keys.sql")


def downgrade() -> None:
    _run("api_keys_down.sql")
