"""Beat whose clock was set back rings as before; Celery's own is silent until the old time has come round again."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from celeryconfig import beat_schedule
from tasks.app import app
from tasks.beat import Scheduler

if TYPE_CHECKING:
    from pathlib import Path

STEP = timedelta(hours=2)


def test_entries_that_ran_in_the_future_ring_again_within_their_interval(tmp_path: Path) -> None:
    scheduler = Scheduler(app, schedule_filename=str(tmp_path / "schedule"), lazy=True)
    scheduler.setup_schedule()
    try:
        later = app.now() + STEP
        for name in beat_schedule:
            scheduler.schedule[name].last_run_at = later
        assert scheduler.schedule["upkeep"].is_due()[1] > STEP.total_seconds()

        scheduler.tick()

        assert scheduler.schedule["upkeep"].is_due()[1] <= timedelta(minutes=1).total_seconds()
        assert scheduler.schedule["scan"].is_due()[1] <= timedelta(hours=1).total_seconds()
    finally:
        scheduler.close()
