"""Stripe's customers: which of them is which user."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base


class StripeCustomer(Base):
    """One customer of Stripe's. A user may be several: Stripe's checkout makes a new one whenever it is given none."""

    __tablename__ = "stripe_customers"
    __table_args__ = (Index("ix_stripe_customers_user_id", "user_id"),)

    customer_id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    linked_by: Mapped[str]
    linked_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
