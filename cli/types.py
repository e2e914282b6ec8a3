"""Parameter types that several commands share."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time

import click

_WALL_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")


class Instant(click.ParamType[datetime]):
    """An ISO 8601 date and time with its offset from UTC."""

    name = "instant"

    def convert(self, value: str | datetime, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Parse, and insist on a zone: a time without one means something else on each machine."""
        if isinstance(value, datetime):
            return value
        try:
            parsed = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not an instant such as 2026-12-01T00:00:00Z", param, ctx)
        if parsed.tzinfo is None:
            self.fail(f"{value!r} names no zone: write {value}Z for UTC, or {value}+02:00", param, ctx)
        try:
            return parsed.astimezone(UTC)
        except OverflowError:
            self.fail(f"{value!r} lies outside the years 1 to 9999", param, ctx)


class WallTime(click.ParamType[time]):
    """A time of day on a clock on the wall."""

    name = "time"

    def convert(self, value: str | time, param: click.Parameter | None, ctx: click.Context | None) -> time:
        """Parse hours and minutes."""
        if isinstance(value, time):
            return value
        found = _WALL_TIME.fullmatch(value)
        if found is None:
            self.fail(f"{value!r} is not allowed: 00:00 to 23:59 are", param, ctx)
        return time(int(found[1]), int(found[2]))
