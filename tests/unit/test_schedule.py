from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refresh.schedule import slot_at

HOUR = timedelta(hours=1)
INSTANTS = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@given(INSTANTS, st.integers(1, 8_760).map(lambda hours: HOUR * hours))
def test_a_slot_holds_its_instant_and_begins_a_whole_number_of_intervals_after_the_epoch(
    now: datetime, interval: timedelta
) -> None:
    slot = slot_at(now, interval)
    assert slot <= now < slot + interval
    assert (slot - datetime(1970, 1, 1, tzinfo=UTC)) % interval == timedelta(0)


def test_all_instants_of_an_hour_share_a_slot_whatever_zone_they_are_written_in() -> None:
    first = datetime(2026, 11, 21, 10, tzinfo=UTC)
    last = first + HOUR - timedelta(microseconds=1)
    assert slot_at(first, HOUR) == slot_at(last, HOUR) == first
    assert slot_at(last.astimezone(timezone(timedelta(hours=5, minutes=45))), HOUR) == first


@pytest.mark.parametrize(
    ("now", "slot"),
    [
        ("2026-11-21T02:00:00+00:00", "2026-11-21T02:00:00+00:00"),
        ("2026-11-21T02:00:00.000001+00:00", "2026-11-21T02:00:00+00:00"),
        ("2026-11-21T01:59:59.999999+00:00", "2026-11-20T02:00:00+00:00"),
        ("2026-11-21T03:30:00+02:00", "2026-11-20T02:00:00+00:00"),
    ],
)
def test_a_cron_slot_is_the_last_tick(now: str, slot: str) -> None:
    assert slot_at(datetime.fromisoformat(now), HOUR, "0 2 * * *") == datetime.fromisoformat(slot)
