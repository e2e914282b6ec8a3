"""What the database can say of the service's health: one question each, which another one's failure does not touch.

What is no question to the database is asked in cli/doctor.py: settings, broker, workers, heartbeats, this machine's
clock. Not for watching a service minute by minute; some of these count rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from db import one
from refresh.partitions import MONTHS_AHEAD
from refresh.schedule import slot_at

if TYPE_CHECKING:
    from datetime import datetime

    import psycopg

    from settings import Settings

State = Literal["ok", "wrong", "info", "unasked"]

POSTGRES_MIN = 150_000
"""PostgreSQL 15, as server_version_num says it."""
COUNTED_MAX = 10_000
"""Users and stray rows are counted up to here: the answer stays "many", and the question cheap."""
SLOT_GRACE_SECONDS = 180
"""Beat rings at the slot's first second; should that be lost, upkeep opens the slot within a minute or two."""
STUCK_AFTER_SECONDS = 1_200
"""Twice as long as upkeep waits before it rings again for a batch that may still be queued."""
LOCK_TIMEOUT_MIN_MS = 50
FAILURES_MANY = 5
"""An endpoint that fails is asked again after 5 s, 10 s, 20 s, …: that often, it has failed for over a minute."""
UNSENT_AFTER_SECONDS = 600
"""Upkeep rings for messages every minute, and a round takes seconds."""
CONNECTIONS_MIN = 10
"""What a process of ours may hold at most (db.py)."""
_MANY_SLOTS = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question.

    Attributes:
        state: ok; wrong, and `todo` says what to do; info: neither; unasked: something else must be right first.
        text: what was found.
        todo: the way out.
    """

    state: State
    text: str
    todo: str | None = None

    @property
    def sentence(self) -> str:
        """What was found and what to do, for people."""
        return f"{self.text}: {self.todo}" if self.todo else self.text


def server_version(connection: psycopg.Connection[Any]) -> Finding:
    """Whether PostgreSQL is one that we work with."""
    query = "SELECT current_setting('server_version'), current_setting('server_version_num')::integer"
    version, number = one(connection.execute(query))
    if number < POSTGRES_MIN:
        return Finding("wrong", f"PostgreSQL {version} answers", "the service needs PostgreSQL 15 or later")
    return Finding("ok", f"PostgreSQL {version} answers")


_PARTITIONS = """
SELECT
    parent.name || to_char(m.begins, '"_y"YYYY"m"MM') AS name,
    CASE parent.name
        WHEN 'credit_refresh_histories' THEN EXISTS (
            SELECT FROM credit_refresh_histories_default
            WHERE window_start >= m.begins AT TIME ZONE 'UTC'
                AND window_start < (m.begins + interval '1 month') AT TIME ZONE 'UTC'
        )
        ELSE EXISTS (
            SELECT FROM credit_audit_logs_default
            WHERE occurred_at >= m.begins AT TIME ZONE 'UTC'
                AND occurred_at < (m.begins + interval '1 month') AT TIME ZONE 'UTC'
        )
    END AS blocked
FROM generate_series(0, %(months)s) AS month
CROSS JOIN LATERAL (
    SELECT date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => month) AS begins
) AS m
CROSS JOIN (VALUES ('credit_refresh_histories'), ('credit_audit_logs')) AS parent (name)
WHERE to_regclass(parent.name || to_char(m.begins, '"_y"YYYY"m"MM')) IS NULL
ORDER BY m.begins, parent.name
"""


def partitions(connection: psycopg.Connection[Any]) -> Finding:
    """Whether the partitions of this month and the next three are there."""
    missing = connection.execute(_PARTITIONS, {"months": MONTHS_AHEAD}).fetchall()
    if not missing:
        return Finding("ok", f"there are partitions for this month and the {MONTHS_AHEAD} to come")
    names = ", ".join(name for name, _ in missing)
    blocked = [name for name, is_blocked in missing if is_blocked]
    if blocked:
        todo = f"rows of {', '.join(blocked)} lie in the default partition; move them out, then upkeep makes them"
    else:
        todo = "upkeep makes them every minute, so are beat and a worker running?"
    return Finding("wrong", f"partitions are missing ({names})", todo)


_ASTRAY = """
SELECT
    (SELECT count(*) FROM (SELECT FROM credit_refresh_histories_default LIMIT %(limit)s) AS h),
    (SELECT count(*) FROM (SELECT FROM credit_audit_logs_default LIMIT %(limit)s) AS a)
"""


def default_partitions(connection: psycopg.Connection[Any]) -> Finding:
    """How many rows lie in no month's partition."""
    histories, audit = one(connection.execute(_ASTRAY, {"limit": COUNTED_MAX + 1}))
    if audit:
        # An audit row is written now, and this month's partition is made months ahead.
        return Finding(
            "wrong",
            f"{_many(audit)} audit rows lie in the default partition",
            "upkeep did not run for months when they were written; retention drops them with their months",
        )
    if histories:
        return Finding(
            "info",
            f"{_many(histories)} history rows lie in the default partition: windows older than the first month's",
        )
    return Finding("ok", "the default partitions are empty")


def switch(connection: psycopg.Connection[Any], settings: Settings) -> Finding:
    """Whether anything is granted at all."""
    enabled, dry = one(connection.execute("SELECT enabled, dry_run FROM settings"))
    if not enabled:
        return Finding("wrong", "the service is paused, nothing is granted", "`credits resume`")
    if not settings.credit_refresh_enabled:
        return Finding("wrong", "CREDIT_REFRESH_ENABLED is false here", "unset it, in the workers' environment too")
    if dry:
        return Finding(
            "wrong",
            "all runs are dry, nothing is granted",
            f"set dry_run to false in {settings.database_schema}.settings",
        )
    if settings.credit_refresh_dry_run:
        return Finding("wrong", "CREDIT_REFRESH_DRY_RUN is true here, scheduled runs are dry", "unset it when done")
    return Finding("ok", "refreshes are on")


_LAST_SLOT = """
SELECT now(), s.enabled, (
    SELECT max(r.slot) FROM (
        SELECT max(slot) AS slot FROM credit_refresh_runs WHERE NOT dry_run
        UNION ALL
        SELECT max(slot) FROM credit_refresh_runs WHERE dry_run
    ) AS r
)
FROM settings AS s
"""


def scheduled_run(connection: psycopg.Connection[Any], settings: Settings) -> Finding:
    """Whether the current slot has its run."""
    now, enabled, last = one(connection.execute(_LAST_SLOT))
    slot = slot_at(now, settings.interval, settings.credit_refresh_cron)
    said = f"the last one is that of {_moment(last)}" if last is not None else "there was none yet"
    if not enabled or not settings.credit_refresh_enabled:
        return Finding("info", f"no run is opened while paused or disabled; {said}")
    if last is not None and last >= slot:
        return Finding("ok", said)
    before = slot_at(slot - timedelta(microseconds=1), settings.interval, settings.credit_refresh_cron)
    in_time = last is not None and last >= before
    if in_time and now - slot < timedelta(seconds=SLOT_GRACE_SECONDS):
        return Finding("ok", f"{said}, and the slot of {_moment(slot)} has just begun")
    return Finding(
        "wrong",
        f"the slot of {_moment(slot)} has no run, {said}",
        "are beat and a worker running, with these settings?",
    )


_DUE_SOON = """
SELECT count(*) FROM (SELECT FROM users WHERE wake_at <= now() + %(interval)s LIMIT %(limit)s) AS u
"""


def pace(connection: psycopg.Connection[Any], settings: Settings) -> Finding:
    """Whether a scheduled run of those who are due by the next slot has ended before the one after it."""
    most = settings.scheduled_max_users_per_second
    if most is None:
        return Finding("ok", "scheduled runs go as fast as the workers can")
    (now,) = one(connection.execute("SELECT now()"))
    slot = slot_at(now, settings.interval, settings.credit_refresh_cron)
    interval = slot - slot_at(slot - timedelta(microseconds=1), settings.interval, settings.credit_refresh_cron)
    room = int(most * interval.total_seconds())
    (users,) = one(connection.execute(_DUE_SOON, {"interval": interval, "limit": room + 1}))
    said = f"scheduled runs refresh {most:,} users per second at most, {room:,} in {interval}"
    if users > room:
        return Finding(
            "wrong", f"{said}, and more than that are due by then", "raise CREDIT_REFRESH_MAX_USERS_PER_SECOND"
        )
    return Finding("ok", said)


_OVERDUE = """
SELECT count(*), min(o.external_id) FROM (
    SELECT u.external_id
    FROM users AS u
    WHERE u.wake_at <= %(before)s
        AND EXISTS (SELECT FROM plans AS p WHERE p.code = u.plan_code AND p.active AND p.cadence <> 'external')
    ORDER BY u.wake_at
    LIMIT %(limit)s
) AS o
"""


def overdue_users(connection: psycopg.Connection[Any], settings: Settings) -> Finding:
    """Whether somebody is due whom two whole scans have left out."""
    (slot,) = one(connection.execute("SELECT now()"))
    slot = slot_at(slot, settings.interval, settings.credit_refresh_cron)
    for _ in range(_MANY_SLOTS):
        slot = slot_at(slot - timedelta(microseconds=1), settings.interval, settings.credit_refresh_cron)
    users, example = one(connection.execute(_OVERDUE, {"before": slot, "limit": COUNTED_MAX + 1}))
    if not users:
        return Finding("ok", f"nobody is due since before {_moment(slot)}")
    return Finding(
        "wrong",
        f"{_many(users)} {'user is' if users == 1 else 'users are'} due since before {_moment(slot)}",
        f"`credits why {example}` says why; `credits scan` refreshes who is only late",
    )


# A batch in its backoff is not stuck, and a run whose batches are done is finished by the next upkeep.
_STUCK = """
SELECT r.id, r.created_at
FROM credit_refresh_runs AS r
WHERE r.status = 'running'
    AND r.created_at < now() - make_interval(secs => %(after)s)
    AND NOT EXISTS (
        SELECT FROM credit_refresh_batches AS b
        WHERE b.run_id = r.id AND (
            b.finished_at > now() - make_interval(secs => %(after)s)
            OR b.status = 'pending' AND b.next_attempt_at > now()
        )
    )
ORDER BY r.created_at
LIMIT %(limit)s
"""


def stuck_runs(connection: psycopg.Connection[Any]) -> Finding:
    """Whether a run is open in which nothing has moved for a while."""
    if not one(connection.execute("SELECT enabled FROM settings"))[0]:
        return Finding("info", "no run moves while paused")
    stuck = connection.execute(_STUCK, {"after": STUCK_AFTER_SECONDS, "limit": COUNTED_MAX + 1}).fetchall()
    if not stuck:
        return Finding("ok", "no run is stuck")
    run_id, created_at = stuck[0]
    return Finding(
        "wrong",
        f"in {_many(len(stuck))} {'run' if len(stuck) == 1 else 'runs'} nothing has moved for "
        f"{STUCK_AFTER_SECONDS // 60} minutes, the oldest is of {_moment(created_at)}",
        f"is a worker running? `credits runs show {run_id}`",
    )


# Dead messages are looked for by the index over them; what waits by each endpoint's.
_WEBHOOKS = """
SELECT
    count(*) FILTER (WHERE e.active),
    min(e.id::text) FILTER (WHERE e.active AND e.failures >= %(failures)s),
    min(e.id::text) FILTER (WHERE NOT e.active AND e.inactive_reason IS NOT NULL),
    min(d.due_at) FILTER (WHERE e.active AND e.failures = 0),
    (SELECT count(*) FROM (SELECT FROM webhook_deliveries WHERE status = 'dead' LIMIT %(limit)s) AS w)
FROM webhook_endpoints AS e
CROSS JOIN LATERAL (
    SELECT min(next_attempt_at) AS due_at FROM webhook_deliveries
    WHERE endpoint_id = e.id AND status = 'pending' AND next_attempt_at < now() - make_interval(secs => %(after)s)
) AS d
"""


def webhooks(connection: psycopg.Connection[Any]) -> Finding:
    """Whether webhook endpoints take what they are told, and somebody sends it."""
    values = {"failures": FAILURES_MANY, "after": UNSENT_AFTER_SECONDS, "limit": COUNTED_MAX + 1}
    active, failing, gone, due_at, dead = one(connection.execute(_WEBHOOKS, values))
    if due_at is not None:
        todo = "does a worker run (`celery -A tasks worker --queues=webhooks`), and do the endpoints keep up?"
        return Finding("wrong", f"messages wait since {_moment(due_at)} for endpoints that take them", todo)
    if failing is not None:
        todo = f"`credits webhooks deliveries list --endpoint {failing}` shows what it answers"
        return Finding("wrong", f"endpoint {failing} takes nothing, {FAILURES_MANY} times in a row or more", todo)
    if gone is not None:
        todo = "`credits webhooks endpoints remove`, or switch it on again by PATCH"
        return Finding("wrong", f"endpoint {gone} says that it is gone, and was switched off", todo)
    if dead:
        todo = "`credits webhooks deliveries list --status dead`"
        return Finding("info", f"{_many(dead)} {'message' if dead == 1 else 'messages'} could not be delivered", todo)
    return Finding("ok", f"{active} {'endpoint takes' if active == 1 else 'endpoints take'} what there is to tell")


_LOCKS = """
SELECT
    (extract(epoch FROM current_setting('lock_timeout')::interval) * 1000)::integer,
    (extract(epoch FROM current_setting('deadlock_timeout')::interval) * 1000)::integer
"""


def lock_waits(connection: psycopg.Connection[Any]) -> Finding:
    """Whether our lock waits end before PostgreSQL looks for a deadlock, in which a host might be the victim."""
    lock_ms, deadlock_ms = one(connection.execute(_LOCKS))
    said = f"lock_timeout is {lock_ms:,} ms, deadlock_timeout {deadlock_ms:,} ms"
    if lock_ms == 0 or lock_ms >= deadlock_ms:
        return Finding("wrong", said, "ours must be the shorter; a pooler in between may drop what a session sets")
    if lock_ms < LOCK_TIMEOUT_MIN_MS:
        return Finding("wrong", said, "raise deadlock_timeout to 100 ms or more, ours is half of it")
    return Finding("ok", said)


# For an ordinary role; its own limit and the database's, where they have one.
_CONNECTIONS = """
SELECT
    least(
        current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer
            - coalesce(current_setting('reserved_connections', true)::integer, 0)
            - (SELECT count(*) FROM pg_stat_activity WHERE usename IS NOT NULL AND datname IS NOT NULL),
        CASE WHEN r.rolconnlimit >= 0
            THEN r.rolconnlimit - (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user) END,
        CASE WHEN d.datconnlimit >= 0
            THEN d.datconnlimit - (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()) END
    )::integer,
    current_setting('max_connections')::integer
FROM pg_roles AS r CROSS JOIN pg_database AS d
WHERE r.rolname = current_user AND d.datname = current_database()
"""


def connections(connection: psycopg.Connection[Any]) -> Finding:
    """Whether another process of ours would find room."""
    free, most = one(connection.execute(_CONNECTIONS))
    said = f"{max(free, 0):,} connections are free (max_connections is {most:,})"
    if free < CONNECTIONS_MIN:
        return Finding("wrong", said, "raise the limit, or put a pooler before the app")
    return Finding("ok", said)


def spend_trigger(connection: psycopg.Connection[Any]) -> Finding:
    """Whether a spend refreshes whoever is due."""
    query = """
        SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'users'::regclass AND tgname = 'refresh_on_spend')
    """
    on = one(connection.execute(query))[0]
    return Finding("info", "a spend refreshes whoever is due first" if on else "off: a spend refreshes nobody")


def clock(connection: psycopg.Connection[Any]) -> datetime:
    """The database's clock at this moment, for whoever has another one to compare."""
    at: datetime = one(connection.execute("SELECT clock_timestamp()"))[0]
    return at


def _many(number: int) -> str:
    return f"more than {COUNTED_MAX:,}" if number > COUNTED_MAX else f"{number:,}"


def _moment(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"
