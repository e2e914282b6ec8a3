"""What monitoring asks every few seconds: one snapshot of what is due, what is under way, and what has been done.

By indexes alone, and bounded: milliseconds, whatever the number of users. Totals are those of the runs, which stay for
ever with them (retention.py): so they never fall, and each process that is asked says the same. Grants that came in by
no run (insert, function, trigger) are not among them: their rows go with their months.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row

from db import one

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    import psycopg

    from db import Database

USERS_MAX = 10_000
"""Users who have waited longest, among whom the due are counted: up to as many blocks of the table."""
RUNS_MAX = 1_000
BATCHES_MAX = 10_000
"""Of each of so many runs that are running, pending batches that are looked at."""
SAMPLE_BATCHES = 100
SAMPLE_RUNS = 1_000
"""Batches whose durations are looked up, and runs among which the one is looked for that had them."""
SETTLED_AFTER = timedelta(hours=1)
"""A run is written `runs.OPENING_LOCK_TIMEOUT` or twice that after its created_at. What is older is read once."""
TIMEOUT = timedelta(minutes=1)
"""Of one statement: the first reading has all runs, and takes seconds for a million of them. Whoever cannot wait that
long finds it done when they ask again."""

DURATIONS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0)
"""Seconds that runs are sorted by."""
WORKS = ("refresh", "apply", "rollback", "regrid")
ENDS = ("succeeded", "partial", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Ended:
    """Runs that have ended, of one work, live or dry, and of one status.

    Attributes:
        users_refreshed: granted; of a regrid, moved to another date; of a rollback, taken back from.
        credits_added: the sum over the runs that added more credits than they took.
        credits_taken: the sum over the others, as a positive number.
        timed: runs that had users and were not cancelled.
        microseconds: the sum of their durations; whole, for a sum of fractions may come out smaller the next time.
        within: of these, how many took no longer than each of `DURATIONS`.
    """

    runs: int = 0
    users_refreshed: int = 0
    users_held: int = 0
    users_skipped: int = 0
    users_failed: int = 0
    credits_added: int = 0
    credits_taken: int = 0
    timed: int = 0
    microseconds: int = 0
    within: tuple[int, ...] = (0,) * len(DURATIONS)

    def __add__(self, other: Ended) -> Ended:
        names = [field.name for field in fields(self) if field.name != "within"]
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Ended(**sums, within=tuple(map(sum, zip(self.within, other.within, strict=True))))


Which = tuple[str, bool, str]
"""Work, whether dry, status."""


@dataclass(frozen=True, slots=True)
class Pending:
    """What is under way in one of the two queues.

    Attributes:
        scheduled: of beat's runs, or of those that somebody asked for.
        runs: that have not ended.
        batches: that are not done, with the users in them.
        retrying: of these, tried before.
        published_at: when the batch was published that has waited longest for a worker; None: none waits.
    """

    scheduled: bool
    runs: int = 0
    batches: int = 0
    users: int = 0
    retrying: int = 0
    published_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The service at one instant.

    Attributes:
        at: the database's now().
        enabled: False: the service is paused.
        all_dry: every run is a dry one.
        last_scan_at: when beat's last live run was opened.
        last_success_at: when the last one ended that succeeded for all of its users.
        users_due: up to `USERS_MAX`.
        due_since: since when the longest of them is; None where nobody is.
        users_waiting: whose date has passed, due or of no plan that grants; up to `USERS_MAX`.
        pending: by queue.
        ended: since ever.
        batch_seconds: the median, the 95th percentile and the longest, of a sample of the last run of several users;
            None where there was none.
    """

    at: datetime
    enabled: bool
    all_dry: bool
    last_scan_at: datetime | None
    last_success_at: datetime | None
    users_due: int
    due_since: datetime | None
    users_waiting: int
    pending: tuple[Pending, Pending]
    ended: Mapping[Which, Ended]
    batch_seconds: tuple[float, float, float] | None


_BEGIN = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
# Stale statistics, or none, make other ways look cheap (runs.py), and no other way is bounded.
_BY_INDEX = """
SELECT
    set_config('statement_timeout', %(timeout)s, true), set_config('enable_seqscan', 'off', true),
    set_config('enable_bitmapscan', 'off', true), set_config('enable_sort', 'off', true)
"""

_SITUATION = """
SELECT
    now(), s.enabled, s.dry_run,
    (
        SELECT created_at FROM credit_refresh_runs WHERE slot IS NOT NULL AND NOT dry_run ORDER BY slot DESC LIMIT 1
    ),
    (
        SELECT finished_at FROM credit_refresh_runs
        WHERE slot IS NOT NULL AND NOT dry_run AND status = 'succeeded' ORDER BY slot DESC LIMIT 1
    )
FROM settings AS s
"""

# The limit comes first: users without a plan, who are never due, would be walked over without an end. So enough of them
# hide who is due; how many were looked at says so.
_DUE = """
SELECT
    coalesce(sum(u.users) FILTER (WHERE p.code IS NOT NULL), 0)::bigint, min(u.since) FILTER (WHERE p.code IS NOT NULL),
    coalesce(sum(u.users), 0)::bigint
FROM (
    SELECT w.plan_code, count(*) AS users, min(w.wake_at) AS since
    FROM (SELECT plan_code, wake_at FROM users WHERE wake_at <= now() ORDER BY wake_at LIMIT %(limit)s) AS w
    GROUP BY 1
) AS u
LEFT JOIN plans AS p ON p.code = u.plan_code AND p.active AND p.cadence <> 'external'
"""

# A batch in its backoff has no message.
_PENDING = """
SELECT
    r.slot IS NOT NULL AS scheduled, count(*) AS runs, sum(b.batches)::bigint AS batches, sum(b.users)::bigint AS users,
    sum(b.retrying)::bigint AS retrying, min(b.published_at) AS published_at
FROM (SELECT id, slot FROM credit_refresh_runs WHERE status = 'running' ORDER BY id LIMIT %(runs)s) AS r
CROSS JOIN LATERAL (
    SELECT
        count(*) AS batches, coalesce(sum(cardinality(p.user_ids)), 0) AS users,
        count(*) FILTER (WHERE p.attempts > 0) AS retrying,
        min(p.published_at) FILTER (WHERE p.next_attempt_at IS NULL) AS published_at
    FROM (
        SELECT user_ids, attempts, next_attempt_at, published_at FROM credit_refresh_batches
        WHERE run_id = r.id AND status = 'pending' ORDER BY id LIMIT %(batches)s
    ) AS p
) AS b
GROUP BY 1
"""

_WITHIN = ", ".join(f"count(*) FILTER (WHERE t.took <= interval '{seconds} s')" for seconds in DURATIONS)
_ENDED = f"""
SELECT
    {{settled}}, r.work, r.dry_run, r.status, count(*), sum(r.users_refreshed), sum(r.users_held), sum(r.users_skipped),
    sum(r.users_failed), sum(greatest(r.credits_granted, 0)), sum(greatest(-r.credits_granted, 0)),
    count(t.took), coalesce(extract(epoch FROM sum(t.took)) * 1000000, 0)::bigint, ARRAY[{_WITHIN}]
FROM credit_refresh_runs AS r
CROSS JOIN LATERAL (
    SELECT CASE WHEN r.batches_total > 0 AND r.status <> 'cancelled' THEN
        greatest(r.finished_at - r.started_at, interval '0') -- a clock that was set back
    END AS took
) AS t
WHERE r.status <> 'running' AND {{which}}
GROUP BY 1, 2, 3, 4
"""  # noqa: S608 - constants
_ENDED_SINCE = _ENDED.format(settled="r.created_at < %(until)s::timestamptz", which="r.created_at >= %(since)s")
_ENDED_THESE = _ENDED.format(settled="true", which="r.id = ANY (%(run_ids)s)")
_STILL_RUNNING = "SELECT id FROM credit_refresh_runs WHERE status = 'running' AND created_at < %(until)s"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# A batch is a transaction, at whose beginning its rows of history are dated, and closes with the clock of that moment.
# So nothing has to be written for it. Evenly over the run, by a user of each; a window that began long ago, as of a run
# that looked back, is not worth opening every month.
_SAMPLE = """
WITH last AS MATERIALIZED (
    SELECT n.id, n.batches_total, n.created_at, n.finished_at
    FROM (SELECT * FROM credit_refresh_runs ORDER BY created_at DESC LIMIT %(runs)s) AS n
    WHERE n.status IN ('succeeded', 'partial') AND n.work = 'refresh' AND NOT n.dry_run AND n.users_selected > 1
    ORDER BY n.created_at DESC LIMIT 1
)
SELECT percentile_cont(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY d.seconds)
FROM last AS l
CROSS JOIN generate_series(0, %(batches)s - 1) AS n
JOIN credit_refresh_batches AS b
    ON b.run_id = l.id AND b.seq = n * greatest(l.batches_total, %(batches)s) / %(batches)s AND b.status = 'done'
CROSS JOIN LATERAL (
    SELECT extract(epoch FROM b.finished_at - h.created_at)::double precision AS seconds
    FROM credit_refresh_histories AS h
    WHERE h.user_id = b.user_ids[1] AND h.run_id = b.run_id AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL
        AND h.window_start > l.created_at - interval '40 days' AND h.window_start <= l.finished_at
    LIMIT 1
) AS d
"""


class Reader:
    """Reads snapshots, and remembers the totals of runs that ended long ago: the first one reads all of them."""

    def __init__(self) -> None:
        self._alone = threading.Lock()
        self._settled: dict[Which, Ended] = {}
        self._until = _EPOCH
        self._running: set[UUID] = set()

    def read(self, database: Database) -> Snapshot:
        """The service now.

        Args:
            database: the same one each time.

        Raises:
            DatabaseError, psycopg.Error: it does not answer, or not in time.
        """
        with self._alone, database.transaction() as connection:
            connection.execute(_BEGIN)
            return self.look(connection)

    def look(self, connection: psycopg.Connection[Any]) -> Snapshot:
        """The same in a transaction that sees one snapshot; nobody else looks meanwhile."""
        connection.execute(_BY_INDEX, {"timeout": f"{TIMEOUT // timedelta(milliseconds=1)}ms"})
        at, enabled, all_dry, last_scan_at, last_success_at = one(connection.execute(_SITUATION))
        users_due, due_since, users_waiting = one(connection.execute(_DUE, {"limit": USERS_MAX}))
        return Snapshot(
            at=at,
            enabled=enabled,
            all_dry=all_dry,
            last_scan_at=last_scan_at,
            last_success_at=last_success_at,
            users_due=users_due,
            due_since=due_since,
            users_waiting=users_waiting,
            pending=_pending(connection),
            ended=self._ended(connection, at),
            batch_seconds=_sample(connection),
        )

    def _ended(self, connection: psycopg.Connection[Any], at: datetime) -> dict[Which, Ended]:
        # Runs that were opened before `until` and have ended are added up for good. Those of them that were running
        # then are looked at by their ids, until they have ended.
        until = max(self._until, at - SETTLED_AFTER)
        running = {run_id for (run_id,) in connection.execute(_STILL_RUNNING, {"until": until})}
        rows = connection.execute(_ENDED_SINCE, {"since": self._until, "until": until}).fetchall()
        if over := self._running - running:
            rows += connection.execute(_ENDED_THESE, {"run_ids": list(over)}).fetchall()
        settled, ended = dict(self._settled), dict[Which, Ended]()
        for (
            is_settled,
            *which,
            runs,
            refreshed,
            held,
            skipped,
            failed,
            added,
            taken,
            timed,
            microseconds,
            within,
        ) in rows:
            users = (int(refreshed), int(held), int(skipped), int(failed))
            found = Ended(runs, *users, int(added), int(taken), timed, microseconds, tuple(within))
            sums, key = settled if is_settled else ended, (which[0], which[1], which[2])
            sums[key] = sums.get(key, Ended()) + found
        self._settled, self._until, self._running = settled, until, running
        for key, found in settled.items():
            ended[key] = ended.get(key, Ended()) + found
        return ended


def _pending(connection: psycopg.Connection[Any]) -> tuple[Pending, Pending]:
    with connection.cursor(row_factory=class_row(Pending)) as cursor:
        rows = cursor.execute(_PENDING, {"runs": RUNS_MAX, "batches": BATCHES_MAX}).fetchall()
    found = {pending.scheduled: pending for pending in rows}
    return found.get(True, Pending(scheduled=True)), found.get(False, Pending(scheduled=False))


def _sample(connection: psycopg.Connection[Any]) -> tuple[float, float, float] | None:
    (found,) = one(connection.execute(_SAMPLE, {"runs": SAMPLE_RUNS, "batches": SAMPLE_BATCHES}))
    return (found[0], found[1], found[2]) if found else None
