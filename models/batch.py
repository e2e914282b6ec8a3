"""Batches: the users that one transaction refreshes, and the queue's truth."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Identity, Index, Integer, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Credits


class Batch(Base):
    """At most `CREDIT_REFRESH_BATCH_SIZE` users of a run. A message in Redis is only a pointer to such a row."""

    __tablename__ = "credit_refresh_batches"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'done', 'failed', 'cancelled')", name="status"),
        # Nobody is dropped in silence: a statement that closes a batch without accounting for each user fails.
        CheckConstraint(
            "status <> 'done' OR users_refreshed + users_held + users_skipped + users_failed + users_deferred"
            " = cardinality(user_ids)",
            name="accounted",
        ),
        # The statement that would close it without one of its users fails, and so changes nobody.
        CheckConstraint("NOT atomic OR status <> 'done' OR users_failed + users_deferred = 0", name="all_or_none"),
        Index("ix_credit_refresh_batches_run_id_seq", "run_id", "seq"),
        Index("ix_credit_refresh_batches_pending", "run_id", "id", postgresql_where=text("status = 'pending'")),
        # Filled to half, closing a batch finds room on its own page.
        {"postgresql_with": {"fillfactor": "50"}},
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    run_id: Mapped[UUID] = mapped_column(ForeignKey("credit_refresh_runs.id"))
    seq: Mapped[int] = mapped_column(Integer)
    user_ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    atomic: Mapped[bool] = mapped_column(server_default=text("false"))
    status: Mapped[str] = mapped_column(server_default="pending")
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    next_attempt_at: Mapped[datetime | None]
    published_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    users_refreshed: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    users_held: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    users_skipped: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    users_failed: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    users_deferred: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    credits_granted: Mapped[Credits] = mapped_column(server_default=text("0"))
    error: Mapped[str | None]
