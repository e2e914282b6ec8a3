"""Runs: everything that one request or one scan set in motion."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, Integer, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Credits


class Run(Base):
    """One run. Totals are summed from its batches when it finishes; until then progress is a query."""

    __tablename__ = "credit_refresh_runs"
    __table_args__ = (
        CheckConstraint("kind IN ('refresh', 'apply', 'rollback', 'retry', 'regrid')", name="kind"),
        CheckConstraint("source IN ('beat', 'cli', 'api', 'cron', 'stripe')", name="source"),
        CheckConstraint("status IN ('running', 'succeeded', 'partial', 'failed', 'cancelled')", name="status"),
        CheckConstraint("(status = 'running') = (finished_at IS NULL)", name="finished"),
        CheckConstraint("slot IS NULL OR source = 'beat'", name="slot_is_beats"),
        CheckConstraint("work IN ('refresh', 'apply', 'rollback', 'regrid')", name="work"),
        CheckConstraint("kind IN (work, 'retry')", name="kind_is_work"),
        CheckConstraint("(work IN ('apply', 'rollback')) = (subject_run_id IS NOT NULL)", name="subject"),
        CheckConstraint("amount > 0", name="amount"),
        CheckConstraint("max_users_per_second > 0", name="max_users_per_second"),
        CheckConstraint(
            "window_end IS NULL OR (force AND as_of IS NOT NULL AND window_end > as_of)", name="window_end"
        ),
        # Two beats, one run: the second finds the slot taken.
        Index("uq_credit_refresh_runs_slot", "slot", unique=True, postgresql_where=text("NOT dry_run")),
        Index("uq_credit_refresh_runs_slot_dry", "slot", unique=True, postgresql_where=text("dry_run")),
        # A run is applied once, and rolled back once: but for single users, and for what a cancelled rollback left. A
        # grant knows by itself that it was taken back.
        Index(
            "uq_credit_refresh_runs_parent",
            "parent_run_id",
            "kind",
            unique=True,
            postgresql_where=text(
                "kind IN ('apply', 'rollback') AND NOT dry_run"
                " AND NOT (kind = 'rollback' AND (status = 'cancelled' OR selection -> 'users' IS NOT NULL))"
            ),
        ),
        Index("ix_credit_refresh_runs_running", "id", postgresql_where=text("status = 'running'")),
        Index("ix_credit_refresh_runs_created_at", "created_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    kind: Mapped[str] = mapped_column(server_default="refresh")
    work: Mapped[str] = mapped_column(server_default="refresh")
    source: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="running")
    dry_run: Mapped[bool] = mapped_column(server_default=text("false"))
    as_of: Mapped[datetime | None]
    window_end: Mapped[datetime | None]
    slot: Mapped[datetime | None]
    parent_run_id: Mapped[UUID | None] = mapped_column(ForeignKey("credit_refresh_runs.id"))
    subject_run_id: Mapped[UUID | None] = mapped_column(ForeignKey("credit_refresh_runs.id"))
    selection: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=text("'{}'"))
    force: Mapped[bool] = mapped_column(server_default=text("false"))
    keep_window: Mapped[bool] = mapped_column(server_default=text("false"))
    amount: Mapped[Credits | None]
    atomic: Mapped[bool] = mapped_column(server_default=text("false"))
    reason: Mapped[str | None]
    requested_by: Mapped[str]
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    max_users_per_second: Mapped[int | None] = mapped_column(Integer)
    paced_until: Mapped[datetime | None]
    users_selected: Mapped[int] = mapped_column(server_default=text("0"))
    users_refreshed: Mapped[int] = mapped_column(server_default=text("0"))
    users_held: Mapped[int] = mapped_column(server_default=text("0"))
    users_skipped: Mapped[int] = mapped_column(server_default=text("0"))
    users_failed: Mapped[int] = mapped_column(server_default=text("0"))
    credits_granted: Mapped[Credits] = mapped_column(server_default=text("0"))
    batches_total: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    # `metadata` is taken on a declarative class.
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB, server_default=text("'{}'"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None]
