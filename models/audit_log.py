"""The audit log: who did what to whose balance. Append-only."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Identity, Index, PrimaryKeyConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Credits


class AuditLog(Base):
    """One act. Triggers of the migration refuse UPDATE, DELETE and TRUNCATE; retention drops whole partitions."""

    __tablename__ = "credit_audit_logs"
    __table_args__ = (
        # Time first: the log is read by time, and a grant's row is found from its history row, which shares the
        # transaction's now(). So grants need no index by user here (one more index costs a twelfth of the speed).
        PrimaryKeyConstraint("occurred_at", "id"),
        Index(
            "ix_credit_audit_logs_user_id",
            "user_id",
            "occurred_at",
            postgresql_where=text("action <> 'refreshed'"),
        ),
        {"postgresql_partition_by": "RANGE (occurred_at)"},
    )

    id: Mapped[int] = mapped_column(Identity(always=True))
    occurred_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    actor: Mapped[str]
    action: Mapped[str]
    user_id: Mapped[int | None]
    run_id: Mapped[UUID | None]
    balance_before: Mapped[Credits | None]
    balance_after: Mapped[Credits | None]
    credits: Mapped[Credits | None]
    correlation_id: Mapped[str | None]
    detail: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
