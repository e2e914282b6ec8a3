"""Webhook endpoints: who is told of what."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, Integer, Text, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base


class WebhookEndpoint(Base):
    """One address. `secret` signs what is sent there; a chat has none, its address is the secret."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (
        CheckConstraint("format IN ('standard', 'slack', 'discord')", name="format"),
        CheckConstraint(
            "events <@ ARRAY['run.finished', 'notice.run_failed', 'user.refreshed', 'user.held', 'verify.finding']",
            name="events",
        ),
        CheckConstraint("(format = 'standard') = (secret IS NOT NULL)", name="secret"),
        CheckConstraint("no_grants_days BETWEEN 1 AND 366", name="no_grants_days"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=text("gen_random_uuid()"))
    url: Mapped[str]
    secret: Mapped[str | None]
    format: Mapped[str] = mapped_column(server_default="standard")
    events: Mapped[list[str]] = mapped_column(ARRAY(Text))
    no_grants_days: Mapped[int | None] = mapped_column(Integer)
    description: Mapped[str | None]
    active: Mapped[bool] = mapped_column(server_default=text("true"))
    inactive_reason: Mapped[str | None]
    created_by: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    failures: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    resume_at: Mapped[datetime | None]
    silence_checked_at: Mapped[datetime | None]
    silence_noticed_at: Mapped[datetime | None]
