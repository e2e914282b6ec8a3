"""Beat's scheduler: Celery's own, with a heartbeat file for health checks, and with an eye on its clock."""

from __future__ import annotations

from typing import Any

from celery.beat import PersistentScheduler

from tasks.app import heartbeat_path


class Scheduler(PersistentScheduler):
    """Touches the heartbeat file at each turn of the loop, `beat_max_loop_interval` apart at most."""

    def setup_schedule(self) -> None:
        """Open the timetable's file, in a folder that a new machine does not have yet."""
        heartbeat_path("beat").parent.mkdir(parents=True, exist_ok=True)
        super().setup_schedule()

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Send what is due; returns the seconds until the next look."""
        heartbeat_path("beat").touch()
        self._forget_the_future()
        return float(super().tick(*args, **kwargs))

    def _forget_the_future(self) -> None:
        """Where the clock was set back, entries ran in the future, and would be silent until that has come."""
        now = self.app.now()
        ahead = [entry for entry in self.schedule.values() if entry.last_run_at and entry.last_run_at > now]
        for entry in ahead:
            entry.last_run_at = now
        if ahead:
            self._heap = None  # ordered by the instants of another clock
