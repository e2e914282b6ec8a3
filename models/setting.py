"""The run-time switches: one row."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base


class Setting(Base):
    """What `credits pause | resume` turns. The primary key admits one row."""

    __tablename__ = "settings"
    __table_args__ = (CheckConstraint("singleton", name="singleton"),)

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    dry_run: Mapped[bool] = mapped_column(server_default=text("false"))
    books_since: Mapped[datetime | None]
