"""Refresh history: what was decided for a user and a window."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, Identity, Index, Integer, PrimaryKeyConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Credits


class History(Base):
    """One decision. Partitioned by month of `window_start`; no foreign key to users (it costs a third of the speed).

    The unique index over live grants is the promise of the whole service: the database itself refuses a
    second grant for a window.
    """

    __tablename__ = "credit_refresh_histories"
    __table_args__ = (
        PrimaryKeyConstraint("id", "window_start"),
        CheckConstraint("source IN ('run', 'insert', 'function', 'trigger')", name="source"),
        CheckConstraint("(source = 'run') = (run_id IS NOT NULL)", name="source_has_run"),
        CheckConstraint(
            "status IN ('refreshed', 'planned', 'held', 'skipped', 'failed', 'reversed')",
            name="status",
        ),
        CheckConstraint("dry_run = (status = 'planned')", name="dry_run_is_planned"),
        CheckConstraint("new_balance = old_balance + credits_added", name="balance"),
        CheckConstraint("window_start < window_end", name="window"),
        Index(
            "uq_credit_refresh_histories_grant",
            "user_id",
            "window_start",
            unique=True,
            postgresql_where=text("status = 'refreshed' AND reversed_by_run_id IS NULL"),
        ),
        Index(
            "uq_credit_refresh_histories_held",
            "user_id",
            "window_start",
            unique=True,
            postgresql_where=text("status = 'held'"),
        ),
        # Scheduled dry runs meet the same due users every hour; each is planned once per window.
        Index(
            "uq_credit_refresh_histories_planned",
            "user_id",
            "window_start",
            unique=True,
            postgresql_where=text("status = 'planned' AND reason = 'scheduled'"),
        ),
        # Everything but grants, by run: failures to show, plans to apply. Costs a grant nothing.
        Index(
            "ix_credit_refresh_histories_run_id_user_id",
            "run_id",
            "user_id",
            postgresql_where=text("status <> 'refreshed'"),
        ),
        # With the unique keys over live grants and held windows, a user's whole history. Costs a grant nothing.
        Index(
            "ix_credit_refresh_histories_user_id",
            "user_id",
            "window_start",
            postgresql_where=text("status IN ('failed', 'skipped', 'reversed') OR reversed_by_run_id IS NOT NULL"),
        ),
        {"postgresql_partition_by": "RANGE (window_start)"},
    )

    id: Mapped[int] = mapped_column(Identity(always=True))
    run_id: Mapped[UUID | None]
    source: Mapped[str] = mapped_column(server_default="run")
    user_id: Mapped[int]
    status: Mapped[str]
    dry_run: Mapped[bool] = mapped_column(server_default=text("false"))
    window_start: Mapped[datetime]
    window_end: Mapped[datetime | None]
    first_missed_at: Mapped[datetime | None]
    windows_passed: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    plan_code: Mapped[str | None]
    grant_mode: Mapped[str | None]
    target: Mapped[Credits | None]
    old_balance: Mapped[Credits]
    credits_added: Mapped[Credits]
    new_balance: Mapped[Credits]
    previous_next_refresh_at: Mapped[datetime | None]
    previous_last_refresh: Mapped[datetime | None]
    shortfall: Mapped[Credits] = mapped_column(server_default=text("0"))
    reason: Mapped[str | None]
    error: Mapped[str | None]
    reversed_by_run_id: Mapped[UUID | None]
    digest: Mapped[bytes | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
