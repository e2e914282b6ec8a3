"""The time zones that plans and users may name."""

from __future__ import annotations

from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base


class Timezone(Base):
    """One IANA name that this PostgreSQL knows. A foreign key refuses the others before they can fail a batch."""

    __tablename__ = "timezones"

    name: Mapped[str] = mapped_column(primary_key=True)
