"""Runs that are forced, applied, rolled back, retried and cancelled."""

from __future__ import annotations

from pathlib import Path

from alembic import context, op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

DECIDE_OF_0002 = """
    timestamptz, boolean, boolean, timestamptz, timestamptz, bigint, bigint, smallint, text, boolean, text, integer,
    smallint, time, text, text, bigint, bigint
"""
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
    _run("0003/tables.sql")
    # The view is replaced, not dropped: hosts have been granted rights on it. Until then it asks the old rule.
    _run("0003/decide.sql")
    _run("0003/host.sql")
    _drop(f"decide({DECIDE_OF_0002})")


def downgrade() -> None:
    # The rule and what asks it are made anew as 0002 had them; the spend trigger is off after that.
    _run("0002/host_down.sql")
    _drop("decide", "refresh_window", "credits_to_add", "calendar_period", "calendar_boundary")
    _run("0003/tables_down.sql")
    _run("0002/rule.sql")
    _run("0002/host.sql")
