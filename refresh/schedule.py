"""Slots: which scheduled run an instant belongs to."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cronsim import CronSim

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def slot_at(now: datetime, interval: timedelta, cron: str | None = None) -> datetime:
    """The slot that `now` lies in: the run that beat's scan of this moment stands for.

    Args:
        now: the database's `now()`, aware.
        interval: the width of a slot; as `date_bin(interval, now, 'epoch')` cuts time.
        cron: a wall-clock timetable in UTC instead; the slot is its last tick at or before `now`.

    Returns:
        The slot's first instant, in UTC.
    """
    if cron is None:
        return _EPOCH + (now - _EPOCH) // interval * interval
    # Walking back, CronSim starts strictly before the instant it is given, and thinks in whole seconds.
    return next(CronSim(cron, now.astimezone(UTC).replace(microsecond=0) + timedelta(seconds=1), reverse=True))


def next_slot(now: datetime, interval: timedelta, cron: str | None = None) -> datetime:
    """The slot that begins next: when beat scans again; arguments as of `slot_at()`."""
    if cron is None:
        return slot_at(now, interval) + interval
    return next(CronSim(cron, now.astimezone(UTC)))
