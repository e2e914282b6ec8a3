"""Plans: what a tier grants, and when."""

from __future__ import annotations

from datetime import time

from sqlalchemy import CheckConstraint, ForeignKey, Integer, SmallInteger, text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base, Credits


class Plan(Base):
    """A user's tier. The checks admit what the rule can use."""

    __tablename__ = "plans"
    __table_args__ = (
        CheckConstraint("amount > 0", name="amount"),
        CheckConstraint("grant_mode IN ('fill', 'reset', 'add', 'rollover')", name="grant_mode"),
        CheckConstraint("cadence IN ('rolling', 'monthly', 'daily', 'external')", name="cadence"),
        CheckConstraint("grant_mode <> 'rollover' OR rollover_cap IS NOT NULL", name="rollover_has_cap"),
        CheckConstraint("cadence <> 'monthly' OR day_of_month IS NOT NULL", name="monthly_has_day"),
        CheckConstraint("cadence <> 'daily' OR time_of_day IS NOT NULL", name="daily_has_time"),
        CheckConstraint("time_of_day < '24:00'", name="time_of_day"),
        CheckConstraint("interval_days BETWEEN 1 AND 3660", name="interval_days"),
        CheckConstraint("day_of_month BETWEEN 1 AND 31", name="day_of_month"),
        CheckConstraint("rollover_cap >= 0", name="rollover_cap"),
    )

    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    amount: Mapped[Credits]
    grant_mode: Mapped[str] = mapped_column(server_default="fill")
    rollover_cap: Mapped[Credits | None]
    cadence: Mapped[str] = mapped_column(server_default="rolling")
    interval_days: Mapped[int] = mapped_column(Integer, server_default=text("30"))
    day_of_month: Mapped[int | None] = mapped_column(SmallInteger)
    time_of_day: Mapped[time | None]
    timezone: Mapped[str] = mapped_column(ForeignKey("timezones.name"), server_default="UTC")
    atomic: Mapped[bool] = mapped_column(server_default=text("false"))
    active: Mapped[bool] = mapped_column(server_default=text("true"))
