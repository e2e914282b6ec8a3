"""A real beat fires the scan: one run a slot, however many beats there are and however they end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from settings import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import Launcher
    from tests.acceptance.service import Service

INTERVAL = timedelta(seconds=2)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
USERS = 250


@pytest.fixture
def default_worker_env(default_worker_env: dict[str, str]) -> dict[str, str]:
    return default_worker_env | {"CREDIT_REFRESH_INTERVAL_SECONDS": str(int(INTERVAL.total_seconds()))}


def slots(ledger: Ledger) -> list[datetime]:
    return [slot for (slot,) in ledger.rows("SELECT slot FROM credit_refresh_runs ORDER BY created_at")]


def assert_one_run_a_slot(ledger: Ledger) -> None:
    """Each run stands for the slot that it was opened in, and no slot has two."""
    rows = ledger.rows("SELECT slot, created_at, source, requested_by FROM credit_refresh_runs ORDER BY created_at")
    for slot, created_at, source, requested_by in rows:
        assert (slot - EPOCH) % INTERVAL == timedelta(0)
        assert slot <= created_at < slot + INTERVAL
        assert (source, requested_by) == ("beat", "beat")
    taken = slots(ledger)
    assert taken == sorted(set(taken))


def test_beat_opens_a_run_in_each_slot_and_goes_on_after_it_was_killed(
    service: Service, ledger: Ledger, tmp_path: Path
) -> None:
    ledger.add_due_users(USERS)
    before = len(slots(ledger))
    beat = service.start_beat(CREDITS_STATE_DIR=str(tmp_path))
    service.until(lambda: len(slots(ledger)) >= before + 3, "three more slots have a run")
    beat.kill()
    killed = slots(ledger)
    beat.restart()
    service.until(lambda: len(slots(ledger)) >= len(killed) + 2, "two more slots have a run")

    assert_one_run_a_slot(ledger)
    (run_id,) = ledger.runs_with_users()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    assert list(tmp_path.glob("celerybeat-schedule*"))
    assert (tmp_path / "beat.heartbeat").exists()
    assert not list(CHECKOUT.glob("celerybeat*"))


def test_two_beats_open_each_slot_once(service: Service, ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_due_users(USERS)
    # On two machines, as it were: they do not share the timetable's file.
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    beats = [service.start_beat(f"beat-{folder.name}", CREDITS_STATE_DIR=str(folder)) for folder in folders]
    sent = "Sending due task scan"
    service.until(lambda: all(beat.logs().count(sent) >= 3 for beat in beats), "both beats rang three times")
    service.until(lambda: service.waiting() == 0, "the worker took the messages")

    assert_one_run_a_slot(ledger)
    (run_id,) = ledger.runs_with_users()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    service.worker.assert_log_exists("Nothing to open: this slot's scan has run already")


def test_beat_makes_its_state_folder(launcher: Launcher, default_worker_env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    beat = launcher.beat(default_worker_env | {"CREDITS_STATE_DIR": str(folder)})
    beat.container.wait_for("Sending due task scan")
    assert list(folder.glob("celerybeat-schedule*"))
    assert "Traceback" not in beat.logs()
