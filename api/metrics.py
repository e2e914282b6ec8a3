"""The metrics under their names, in Prometheus' words: base units, `_total` for what never falls.

Everything comes from the database and the broker and nothing from this process: of several, scrape one, or take `max()`
over them and never `sum()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from celeryconfig import QueueNames
from refresh.metrics import DURATIONS, ENDS, USERS_MAX, WORKS, Ended

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from prometheus_client import Metric

    from refresh.metrics import Pending, Snapshot
    from tasks.broker import Queues

_WORK = "`work` is what the runs do: refresh, apply (of a dry run), rollback, or regrid (to another plan's dates)."
_QUEUES = "`batches` has those of beat's runs, `bulk` those of runs that somebody asked for."


def exposition(snapshot: Snapshot | None, queues: Queues | None) -> bytes:
    """The text that Prometheus reads, of a registry of its own.

    Args:
        snapshot: None: the database did not answer.
        queues: None: the broker did not.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(snapshot, queues))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, snapshot: Snapshot | None, queues: Queues | None) -> None:
        self._snapshot = snapshot
        self._queues = queues

    def collect(self) -> Iterator[Metric]:
        up = self._snapshot is not None
        yield _gauge(
            "credits_database_up", "1 while the database answers in time; without it most others are missing.", up
        )
        yield _gauge("credits_broker_up", "1 while the broker (Redis or RabbitMQ) answers.", self._queues is not None)
        if self._snapshot is not None:
            yield from _now(self._snapshot)
            yield from _under_way(self._snapshot)
            yield from _done(self._snapshot)
            yield from _durations(self._snapshot)
        if self._queues is not None:
            yield from _waiting(self._queues)


def _now(snapshot: Snapshot) -> Iterator[Metric]:
    yield _gauge(
        "credits_paused", "1 while the service is paused: nothing is granted on any path.", not snapshot.enabled
    )
    yield _gauge("credits_all_runs_dry", "1 while every run is a dry one, and changes no balance.", snapshot.all_dry)
    yield _gauge(
        "credits_users_due",
        f"Users who are due for the next scan, among the {USERS_MAX} who have waited longest: {USERS_MAX} may be more.",
        snapshot.users_due,
    )
    yield _gauge(
        "credits_oldest_overdue_seconds",
        "Seconds since the first of these users fell due, 0 where nobody is due. The scan's interval is usual.",
        _age(snapshot, snapshot.due_since),
    )
    yield _gauge(
        "credits_users_waiting",
        f"Users whose date has passed, up to {USERS_MAX}: the due, and those of no plan that grants. At {USERS_MAX} "
        "the two above see no further.",
        snapshot.users_waiting,
    )
    for name, text, at in (
        ("scan", "beat's last scan opened its run", snapshot.last_scan_at),
        ("successful_scan", "the last of beat's runs ended that failed for nobody", snapshot.last_success_at),
    ):
        family = GaugeMetricFamily(
            f"credits_last_{name}_timestamp_seconds", f"When {text}, in seconds since 1970. Missing before the first."
        )
        if at is not None:
            family.add_metric([], at.timestamp())
        yield family


def _under_way(snapshot: Snapshot) -> Iterator[Metric]:
    facts = {
        "credits_runs_running": (f"Runs that have not ended, by the queue of their batches: {_QUEUES}", "runs"),
        "credits_batches_pending": ("Batches of these runs that are not done.", "batches"),
        "credits_batch_users_pending": ("Users in the pending batches.", "users"),
        "credits_batches_retrying": ("Pending batches that were tried before: they failed, or were lost.", "retrying"),
    }
    for name, (text, attribute) in facts.items():
        family = GaugeMetricFamily(name, text, labels=["queue"])
        for pending in snapshot.pending:
            family.add_metric([_queue(pending)], getattr(pending, attribute))
        yield family
    family = GaugeMetricFamily(
        "credits_oldest_message_age_seconds",
        "Seconds since the pending batch was published that waits longest for a worker, 0 where none waits. As the "
        "database knows it: its message may be in the queue, in a worker's hands, or lost until upkeep sends another.",
        labels=["queue"],
    )
    for pending in snapshot.pending:
        family.add_metric([_queue(pending)], _age(snapshot, pending.published_at))
    yield family


def _done(snapshot: Snapshot) -> Iterator[Metric]:
    runs = CounterMetricFamily(
        "credits_runs_finished", f"Runs that have ended, since ever. {_WORK}", labels=["work", "dry_run", "status"]
    )
    users = CounterMetricFamily(
        "credits_run_users",
        "Users of live runs that have ended, by what became of them: refreshed (of a rollback, taken back from; of a "
        "regrid, moved), held, skipped, or failed. A run counts when it ends. Grants at a user's insert, by the "
        f"function and by the trigger are no run's. {_WORK}",
        labels=["work", "outcome"],
    )
    granted = CounterMetricFamily(
        "credits_granted",
        "Credits that live runs have added to balances, over the runs that added more than they took. A run counts "
        f"when it ends. Grants at a user's insert, by the function and by the trigger are no run's. {_WORK}",
        labels=["work"],
    )
    taken = CounterMetricFamily(
        "credits_taken",
        "Credits that live runs have taken off balances, over the runs that took more than they added: rollbacks, and "
        f"refreshes where plans reset balances that were higher. credits_granted_total less this is the sum. {_WORK}",
        labels=["work"],
    )
    for work in WORKS:
        for dry_run in (False, True):
            for status in ENDS:
                ended = snapshot.ended.get((work, dry_run, status), Ended())
                runs.add_metric([work, str(dry_run).lower(), status], ended.runs)
        live = _live(snapshot, work)
        for outcome in ("refreshed", "held", "skipped", "failed"):
            users.add_metric([work, outcome], getattr(live, f"users_{outcome}"))
        granted.add_metric([work], live.credits_added)
        taken.add_metric([work], live.credits_taken)
    yield from (runs, users, granted, taken)


def _durations(snapshot: Snapshot) -> Iterator[Metric]:
    durations = HistogramMetricFamily(
        "credits_run_duration_seconds",
        "Seconds from the opening of a live run to its end, waiting for workers and pace included; of runs that had "
        f"users and were not cancelled, since ever. {_WORK}",
        labels=["work"],
    )
    for work in WORKS:
        live = _live(snapshot, work)
        buckets = [*zip(map(str, DURATIONS), map(float, live.within), strict=True), ("+Inf", float(live.timed))]
        durations.add_metric([work], buckets, live.microseconds / 1e6)
    yield durations
    batches = GaugeMetricFamily(
        "credits_batch_duration_seconds",
        "Seconds that batches took in the database, from the beginning of their transaction: median, 95th percentile "
        "and longest of up to 100 batches, evenly over the last refresh of several users. Missing before the first.",
        labels=["statistic"],
    )
    for statistic, seconds in zip(("median", "p95", "max"), snapshot.batch_seconds or (), strict=False):
        batches.add_metric([statistic], seconds)
    yield batches


def _waiting(queues: Queues) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "credits_queue_messages",
        f"Messages that no worker has taken. {_QUEUES} `control` has scans and upkeep, `webhooks` what "
        "endpoints are to be told; `dead` keeps refused messages.",
        labels=["queue"],
    )
    for queue, messages in queues.waiting.items():
        family.add_metric([queue], messages)
    yield family
    if queues.unacked is not None:
        yield _gauge(
            "credits_queue_unacked_messages",
            "Messages that Redis keeps as taken and not acknowledged. Workers of this service acknowledge as they take "
            "(docs/adr/0002): more than 0 is another program's, or from before. Not there on RabbitMQ.",
            queues.unacked,
        )


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))


def _live(snapshot: Snapshot, work: str) -> Ended:
    return sum((snapshot.ended.get((work, False, status), Ended()) for status in ENDS), Ended())


def _queue(pending: Pending) -> str:
    return QueueNames.BATCHES if pending.scheduled else QueueNames.BULK


def _age(snapshot: Snapshot, since: datetime | None) -> float:
    return max(0.0, (snapshot.at - since).total_seconds()) if since is not None else 0.0
