"""Users: the balances, and when each is next refreshed."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, Computed, ForeignKey, Identity, Index, SmallInteger, text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Credits

# When the scan next has to look at a user. NULL keeps a row out of the wake index: an inactive user, and one
# whose hold has been noted and has no end, cost the hourly scan nothing.
WAKE_AT = """
CASE
    WHEN NOT active THEN NULL
    WHEN credit_refresh_hold AND held_window = next_refresh_at THEN hold_until
    ELSE next_refresh_at
END
"""


class User(Base):
    """One user of the host app, under the host's `external_id`. The host spends with a plain UPDATE."""

    __tablename__ = "users"
    __table_args__ = (
        CheckConstraint("credit_refresh_day BETWEEN 1 AND 31", name="credit_refresh_day"),
        CheckConstraint("custom_credit_amount > 0", name="custom_credit_amount"),
        CheckConstraint("isfinite(next_refresh_at)", name="next_refresh_at"),
        CheckConstraint("refresh_shortfall >= 0", name="refresh_shortfall"),
        Index("ix_users_wake_at", "wake_at", postgresql_where=text("wake_at IS NOT NULL")),
    )

    id: Mapped[int] = mapped_column(Identity(always=False), primary_key=True)
    external_id: Mapped[str] = mapped_column(unique=True)
    email: Mapped[str | None]
    plan_code: Mapped[str | None] = mapped_column(ForeignKey("plans.code"))
    credit_balance: Mapped[Credits]
    last_credit_refresh: Mapped[datetime | None]
    next_refresh_at: Mapped[datetime | None]
    credit_refresh_hold: Mapped[bool] = mapped_column(server_default=text("false"))
    hold_reason: Mapped[str | None]
    hold_until: Mapped[datetime | None]
    held_window: Mapped[datetime | None]
    credit_refresh_day: Mapped[int | None] = mapped_column(SmallInteger)
    custom_credit_amount: Mapped[Credits | None]
    refresh_shortfall: Mapped[Credits] = mapped_column(server_default=text("0"))
    timezone: Mapped[str | None] = mapped_column(ForeignKey("timezones.name"))
    active: Mapped[bool] = mapped_column(server_default=text("true"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    updated_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    wake_at: Mapped[datetime | None] = mapped_column(Computed(WAKE_AT, persisted=True))
