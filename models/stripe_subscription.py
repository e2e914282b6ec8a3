"""Stripe's subscriptions: how each stands by the newest event about it."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Index, SmallInteger
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base


class StripeSubscription(Base):
    """One subscription. `plan_code` is the plan that its price names, where there is such a plan.

    `anniversary` is its billing cycle's anchor, where a period is longer than a month. `event_*` say which event it is
    so by: an older one changes nothing.
    """

    __tablename__ = "stripe_subscriptions"
    __table_args__ = (Index("ix_stripe_subscriptions_customer_id", "customer_id"),)

    subscription_id: Mapped[str] = mapped_column(primary_key=True)
    customer_id: Mapped[str]
    status: Mapped[str]
    created: Mapped[datetime]
    price_id: Mapped[str | None]
    plan_code: Mapped[str | None]
    anniversary: Mapped[datetime | None]
    event_id: Mapped[str]
    event_created: Mapped[datetime]
    event_rank: Mapped[int] = mapped_column(SmallInteger)
