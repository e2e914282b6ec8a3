"""Stripe's events, as they came, and what became of each."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base


class StripeEvent(Base):
    """One event, whole. Without an outcome it is still to be processed; with `look_at`, upkeep looks at it again then.

    `outcome` is one of `OUTCOMES` in refresh/stripe_inbox.py, which says what each means. No foreign key to users: the
    event stays when the host deletes the user.
    """

    __tablename__ = "stripe_events"
    __table_args__ = (
        CheckConstraint(
            "outcome IN ('granted', 'already_granted', 'plan_set', 'unchanged', 'outdated', 'linked', 'ignored',"
            " 'unknown_customer', 'unknown_plan', 'no_period', 'period_over', 'before_books', 'not_external',"
            " 'other_subscription', 'awaits_subscription', 'not_begun', 'held', 'inactive', 'no_plan', 'paused',"
            " 'failed')",
            name="outcome",
        ),
        CheckConstraint("(outcome IS NULL) = (processed_at IS NULL)", name="processed"),
        CheckConstraint("outcome <> 'granted' OR run_id IS NOT NULL", name="granted"),
        Index("ix_stripe_events_look_at", "look_at", postgresql_where=text("look_at IS NOT NULL")),
        Index("ix_stripe_events_customer_id", "customer_id", "created"),
        Index("ix_stripe_events_received_at", "received_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    type: Mapped[str]
    livemode: Mapped[bool]
    created: Mapped[datetime]
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
    customer_id: Mapped[str | None]
    subscription_id: Mapped[str | None]
    period_start: Mapped[datetime | None]
    period_end: Mapped[datetime | None]
    received_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    processed_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    user_id: Mapped[int | None]
    run_id: Mapped[UUID | None] = mapped_column(ForeignKey("credit_refresh_runs.id"))
    note: Mapped[str | None]
    error: Mapped[str | None]
    look_at: Mapped[datetime | None] = mapped_column(server_default=text("now() + interval '1 minute'"))
