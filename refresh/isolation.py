"""Isolation: one user whom the database refuses does not cost the others their refresh.

A balance that overflows, a constraint of the host's, a trigger of the host's that raises: any of them fails the whole
statement of a batch. The batch is then halved, and each half that fails again, until the users who fail stand alone.
They are noted as failed, and the others are done, by the same message.

    one transaction: lock the batch row → deferred constraints made immediate → two halves, each a batch of its own,
    done in a savepoint → halve again what raises → note the users who raise alone → close the batch: its users went on

One user among 100 takes 14 attempts and 0.1 s, 10 take 0.35 s, all 100 take 2.3 s: most of it is planning, since a
savepoint that is rolled back costs psycopg its prepared statements. Nobody waits for a lock meanwhile, as little as in
a batch of many (docs/adr/0003-never-wait-holding-a-lock.md): users who are locked are put off like any others.

Errors of the connection, of locks and of resources say nothing about a user. They, and all others that are not listed
here, undo everything and count as a failed attempt, which upkeep repeats (delivery.py).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import class_row

from db import one, one_line, transaction
from refresh.closing import DEFERRED_BACKOFF_SECONDS, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from refresh.work import Pending

POISON_CLASSES = frozenset({"22", "23", "P0"})
"""Of SQLSTATE: data exceptions, violated constraints, and what PL/pgSQL raises."""

# Of a batch that is all or none, see models/batch.py.
_ALL_OR_NONE = "ck_credit_refresh_batches_all_or_none"


def is_poison(error: psycopg.Error) -> bool:
    """Whether an error says something about the users, so that fewer of them may do without it."""
    return (_sqlstate(error) or "")[:2] in POISON_CLASSES


def describe(error: psycopg.Error) -> str:
    """The error for people, in a line."""
    if error.diag.constraint_name == _ALL_OR_NONE:
        return (
            "one of its users failed (credits that do not fit 64 bits, or in an apply a planned row that was changed): "
            "it is all users or none, so nobody was changed"
        )
    return f"{one_line(error)} (SQLSTATE {_sqlstate(error)})"


def _sqlstate(error: psycopg.Error) -> str | None:
    return error.diag.sqlstate or error.sqlstate


_OUTCOME = ", ".join(f"b.{field.name}" for field in fields(Outcome))

_TAKE = """
SELECT cardinality(b.user_ids)
FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE b.id = %(batch_id)s AND b.status IS NOT DISTINCT FROM 'pending' AND r.status = 'running'
    AND (SELECT enabled FROM settings)
FOR UPDATE OF b SKIP LOCKED
"""

_HALVE = """
INSERT INTO credit_refresh_batches (run_id, seq, user_ids, attempts)
SELECT b.run_id, b.seq, h.user_ids, b.attempts
FROM (
    SELECT run_id, seq, attempts, user_ids, cardinality(user_ids) / 2 AS middle
    FROM credit_refresh_batches WHERE id = %(batch_id)s
) AS b
CROSS JOIN LATERAL (VALUES (b.user_ids[:b.middle]), (b.user_ids[b.middle + 1:])) AS h (user_ids)
RETURNING id, cardinality(user_ids), seq
"""
_HALVED = """
UPDATE credit_refresh_batches SET
    status = 'done', finished_at = clock_timestamp(), error = NULL, users_deferred = cardinality(user_ids)
WHERE id = %(batch_id)s
"""

# A plan has no row for those who fail, only a count. Whoever is locked now is noted at the next attempt, lest the row
# name a balance that is being changed; whoever is gone is nobody's failure.
_FAIL_USER = f"""
WITH batch AS MATERIALIZED (
    SELECT
        b.id, b.run_id, b.user_ids[1] AS user_id, r.dry_run, coalesce(r.as_of, now()) AS as_of, r.requested_by,
        r.metadata ->> 'correlationId' AS correlation_id,
        r.reason,
        jsonb_strip_nulls(jsonb_build_object(
            'reason', CASE WHEN r.source <> 'beat' THEN r.reason END, 'error', %(error)s::text
        )) AS detail
    FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
    WHERE b.id = %(batch_id)s
),
locked AS MATERIALIZED (
    SELECT u.id, u.plan_code, u.credit_balance, u.last_credit_refresh, u.next_refresh_at
    FROM users AS u
    WHERE u.id = (SELECT user_id FROM batch WHERE NOT dry_run)
    FOR NO KEY UPDATE SKIP LOCKED
),
history AS (
    INSERT INTO credit_refresh_histories (
        run_id, user_id, status, window_start, plan_code, old_balance, credits_added, new_balance,
        previous_next_refresh_at, previous_last_refresh, reason, error
    )
    SELECT
        b.run_id, l.id, 'failed', least(coalesce(l.next_refresh_at, b.as_of), b.as_of), l.plan_code, l.credit_balance,
        0, l.credit_balance, l.next_refresh_at, l.last_credit_refresh, b.reason, %(error)s::text
    FROM batch AS b CROSS JOIN locked AS l
),
audit AS (
    INSERT INTO credit_audit_logs (
        actor, action, user_id, run_id, balance_before, balance_after, credits, correlation_id, detail
    )
    SELECT
        b.requested_by, 'refresh_failed', l.id, b.run_id, l.credit_balance, l.credit_balance, 0, b.correlation_id,
        b.detail
    FROM batch AS b CROSS JOIN locked AS l
),
found AS (
    SELECT
        f.failed, f.is_there AND NOT f.failed AS busy, NOT f.is_there AS gone
    FROM (
        SELECT
            b.dry_run OR EXISTS (SELECT FROM locked) AS failed,
            b.dry_run OR EXISTS (SELECT FROM users AS u WHERE u.id = b.user_id) AS is_there
        FROM batch AS b
    ) AS f
)
UPDATE credit_refresh_batches AS b SET
    status = CASE WHEN f.busy THEN 'pending' ELSE 'done' END,
    finished_at = CASE WHEN NOT f.busy THEN clock_timestamp() END,
    attempts = b.attempts + f.busy::integer,
    next_attempt_at = CASE
        WHEN f.busy THEN now() + make_interval(secs => %(backoff_seconds)s * 2 ^ least(b.attempts, 8))
    END,
    users_failed = f.failed::integer, users_skipped = f.gone::integer,
    error = CASE WHEN NOT f.gone THEN %(error)s::text END
FROM found AS f
WHERE b.id = %(batch_id)s
RETURNING {_OUTCOME}
"""  # noqa: S608 - the names of Outcome's fields

_FAIL_ALL = """
UPDATE credit_refresh_batches AS b SET
    status = 'failed', finished_at = clock_timestamp(), attempts = b.attempts + 1, next_attempt_at = NULL,
    error = %(error)s
FROM (
    SELECT id FROM credit_refresh_batches WHERE id = %(batch_id)s AND status IS NOT DISTINCT FROM 'pending'
    FOR NO KEY UPDATE SKIP LOCKED -- whoever has it now decides what becomes of it
) AS tried
WHERE b.id = tried.id
RETURNING b.run_id, b.seq, 0 AS users_refreshed, 0 AS users_held, 0 AS users_skipped,
    cardinality(b.user_ids) AS users_failed, 0 AS users_deferred, 0 AS credits_granted
"""


def fail_all(connection: psycopg.Connection[Any], batch_id: int, error: psycopg.Error) -> Outcome | None:
    """Fail a batch that is all users or none, at once and for good: what refused one of them will do so again.

    Returns:
        All of its users as failed; None when somebody else has the batch or had it.
    """
    with connection.cursor(row_factory=class_row(Outcome)) as cursor:
        return cursor.execute(_FAIL_ALL, {"batch_id": batch_id, "error": describe(error)}).fetchone()


def isolate(
    connection: psycopg.Connection[Any],
    pending: Pending,
    error: psycopg.Error,
    do: Callable[[psycopg.Connection[Any], Pending], Outcome | None],
) -> Outcome | None:
    """Do a batch that has raised, all but the users who raise alone.

    Args:
        connection: in autocommit.
        pending: the batch.
        error: what it raised; `is_poison()` says that this is the place for it.
        do: does a batch in a transaction, as part of which it is called here.

    Returns:
        What became of all its users; None when somebody else has the batch or had it, or the service is paused.

    Raises:
        psycopg.Error: nothing was changed; upkeep tries again.
    """
    with transaction(connection):
        taken = connection.execute(_TAKE, {"batch_id": pending.id}).fetchone()
        if taken is None:
            return None
        # A constraint trigger that is deferred would otherwise raise at the commit, and name nobody.
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        return _divide(connection, pending, taken[0], error, do)


def _divide(
    connection: psycopg.Connection[Any],
    failing: Pending,
    users: int,
    error: psycopg.Error,
    do: Callable[[psycopg.Connection[Any], Pending], Outcome | None],
) -> Outcome:
    if users == 1:
        return _fail_user(connection, failing.id, error)
    halves = connection.execute(_HALVE, {"batch_id": failing.id}).fetchall()
    connection.execute(_HALVED, {"batch_id": failing.id})
    outcomes = []
    for batch_id, size, seq in sorted(halves):
        # Not lone, though it may have one user: a lone batch waits for locks.
        half = replace(failing, id=batch_id, lone=False)
        try:
            with transaction(connection):
                outcome = do(connection, half)
        except psycopg.Error as again:
            if not is_poison(again):
                raise
            outcome = _divide(connection, half, size, again, do)
        # None: paused a moment ago, so the half stays pending.
        outcomes.append(outcome or Outcome(failing.run_id, seq, 0, 0, 0, 0, size, 0))
    return _sum(*outcomes)


def _fail_user(connection: psycopg.Connection[Any], batch_id: int, error: psycopg.Error) -> Outcome:
    parameters = {"batch_id": batch_id, "error": describe(error), "backoff_seconds": DEFERRED_BACKOFF_SECONDS}
    with connection.cursor(row_factory=class_row(Outcome)) as cursor:
        outcome = one(cursor.execute(_FAIL_USER, parameters))
    return outcome if outcome.users_failed or outcome.users_skipped else replace(outcome, users_deferred=1)


def _sum(first: Outcome, second: Outcome) -> Outcome:
    """What became of the users of two halves."""
    return Outcome(
        first.run_id,
        first.seq,
        first.users_refreshed + second.users_refreshed,
        first.users_held + second.users_held,
        first.users_skipped + second.users_skipped,
        first.users_failed + second.users_failed,
        first.users_deferred + second.users_deferred,
        first.credits_granted + second.credits_granted,
    )
