"""Runs that are forced, applied, rolled back, retried and cancelled."""

from __future__ import annotations

from pathlib import Path

from alembic import context, op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SQL = Path(__file__).parent.parent / "sql"


def _run(path: str) -> None:
    schema = context.get_context().opts["schema_name"]
    script = (SQL / path).read_text().replace("{schema}", schema)
    # Without parameters: the scripts hold colons and percent signs of their own.
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(script)


def _drop(*objects: str) -> None:
    schema = context.get_context().opts["schema_name"]
    for kind, _, name in (object_.partition(" ") for object_ in objects):
        op.execute(f"DROP {kind} {schema}.{name}")


def upgrade() -> None:
    _drop("VIEW user_credits_now", "FUNCTION decide")
    _run("0003/tables.sql")
    _run("0003/decide.sql")
    _run("0003/host.sql")


def downgrade() -> None:
    # The rule and what asks it are made anew as 0002 had them; the spend trigger is off after that.
    _run("0002/host_down.sql")
    _drop(*(f"FUNCTION {name}" for name in RULE))
    _run("0003/tables_down.sql")
    _run("0002/rule.sql")
    _run("0002/host.sql")


RULE = ("decide", "refresh_window", "credits_to_add", "calendar_period", "calendar_boundary")
