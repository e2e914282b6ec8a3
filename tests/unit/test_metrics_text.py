"""The text of /metrics, read back by Prometheus' own parser."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from api.metrics import exposition
from refresh.metrics import DURATIONS, ENDS, WORKS, Ended, Pending, Snapshot
from settings import CHECKOUT
from tasks.broker import Queues

if TYPE_CHECKING:
    from prometheus_client import Metric

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
LARGE = 3 * (2**63 - 1)
WITHIN = (0, 1, 1, 2, 2, 2, 2, 2, 2, 2)

SNAPSHOT = Snapshot(
    at=NOW,
    enabled=False,
    all_dry=False,
    last_scan_at=NOW - MINUTE,
    last_success_at=None,
    users_due=7,
    due_since=NOW - 90 * MINUTE,
    users_waiting=9,
    pending=(
        Pending(scheduled=True, runs=1, batches=3, users=250, retrying=1, published_at=NOW - MINUTE),
        Pending(scheduled=False),
    ),
    ended={
        ("refresh", False, "succeeded"): Ended(
            3, 5, 1, 0, 0, LARGE, 40, timed=2, microseconds=2_500_000, within=WITHIN
        ),
        ("refresh", False, "partial"): Ended(
            1, 2, 0, 0, 3, 10, 0, timed=1, microseconds=250_000, within=(0, *(1,) * 9)
        ),
        ("refresh", True, "succeeded"): Ended(9, 9, 9, 9, 9, 9, 9, timed=9, microseconds=9_000_000, within=(9,) * 10),
        ("rollback", False, "succeeded"): Ended(1, 2, 0, 0, 0, 0, 30),
    },
    batch_seconds=(0.001, 0.002, 0.003),
)
QUEUES = Queues({"control": 1, "batches": 2, "bulk": 0, "dead": 5}, unacked=4)


def families(snapshot: Snapshot | None, queues: Queues | None) -> dict[str, Metric]:
    text = exposition(snapshot, queues).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(found: dict[str, Metric]) -> dict[str, float]:
    """By their names as Prometheus shows them."""
    return {
        sample.name + "".join(f" {key}={sample.labels[key]}" for key in sorted(sample.labels)): sample.value
        for family in found.values()
        for sample in family.samples
    }


def test_nobody_answers() -> None:
    assert samples(families(None, None)) == {"credits_database_up": 0, "credits_broker_up": 0}


def test_each_metric_is_ours_and_says_what_it_is() -> None:
    found = families(SNAPSHOT, QUEUES)
    assert len(found) > 15
    for family in found.values():
        assert family.name.startswith("credits_")
        assert len(family.documentation) > 20
        assert family.documentation.endswith(".")
        assert family.type in {"gauge", "counter", "histogram"}
        assert family.type != "counter" or all(sample.name.endswith("_total") for sample in family.samples)


def test_what_is() -> None:
    found = samples(families(SNAPSHOT, QUEUES))
    expected = {
        "credits_database_up": 1,
        "credits_broker_up": 1,
        "credits_paused": 1,
        "credits_all_runs_dry": 0,
        "credits_users_due": 7,
        "credits_oldest_overdue_seconds": 5_400,
        "credits_users_waiting": 9,
        "credits_last_scan_timestamp_seconds": (NOW - MINUTE).timestamp(),
        "credits_runs_running queue=batches": 1,
        "credits_runs_running queue=bulk": 0,
        "credits_batches_pending queue=batches": 3,
        "credits_batch_users_pending queue=batches": 250,
        "credits_batches_retrying queue=batches": 1,
        "credits_oldest_message_age_seconds queue=batches": 60,
        "credits_oldest_message_age_seconds queue=bulk": 0,
        "credits_queue_messages queue=control": 1,
        "credits_queue_messages queue=dead": 5,
        "credits_queue_unacked_messages": 4,
        "credits_batch_duration_seconds statistic=median": 0.001,
        "credits_batch_duration_seconds statistic=max": 0.003,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "credits_last_successful_scan_timestamp_seconds" not in found


def test_what_was_done() -> None:
    found = samples(families(SNAPSHOT, QUEUES))
    expected = {
        "credits_runs_finished_total dry_run=false status=succeeded work=refresh": 3,
        "credits_runs_finished_total dry_run=false status=partial work=refresh": 1,
        "credits_runs_finished_total dry_run=true status=succeeded work=refresh": 9,
        "credits_runs_finished_total dry_run=false status=failed work=apply": 0,
        "credits_run_users_total outcome=refreshed work=refresh": 7,
        "credits_run_users_total outcome=held work=refresh": 1,
        "credits_run_users_total outcome=failed work=refresh": 3,
        "credits_run_users_total outcome=refreshed work=rollback": 2,
        "credits_granted_total work=refresh": float(LARGE + 10),
        "credits_granted_total work=rollback": 0,
        "credits_taken_total work=refresh": 40,
        "credits_taken_total work=rollback": 30,
        "credits_run_duration_seconds_bucket le=0.1 work=refresh": 0,
        "credits_run_duration_seconds_bucket le=0.5 work=refresh": 2,
        "credits_run_duration_seconds_bucket le=5.0 work=refresh": 3,
        "credits_run_duration_seconds_bucket le=+Inf work=refresh": 3,
        "credits_run_duration_seconds_count work=refresh": 3,
        "credits_run_duration_seconds_sum work=refresh": 2.75,
        "credits_run_duration_seconds_count work=regrid": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    finished = [name for name in found if name.startswith("credits_runs_finished_total")]
    assert len(finished) == len(WORKS) * 2 * len(ENDS)
    assert len([name for name in found if "_seconds_bucket" in name]) == len(WORKS) * (len(DURATIONS) + 1)


def test_rabbitmq_says_nothing_of_what_is_not_acknowledged() -> None:
    found = families(None, Queues({"bulk": 3}, unacked=None))
    assert samples(found) == {
        "credits_database_up": 0, "credits_broker_up": 1, "credits_queue_messages queue=bulk": 3
    }  # fmt: skip


def test_the_page_names_each_metric_and_no_other() -> None:
    page = (CHECKOUT / "docs" / "monitoring.md").read_text()
    exposed = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in families(SNAPSHOT, QUEUES).values()
    } | {"credits_last_successful_scan_timestamp_seconds"}
    assert set(re.findall(r"\bcredits_[a-z_]+", page)) == exposed
