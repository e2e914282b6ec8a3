"""Ten guards, each of which can be taken out: the checker has to miss it, or it would not see a fault there either.

A guard goes by SQL, which whoever makes the database executes as superuser after the migration, and by replaced texts
and functions in the processes of the service (broken.py). The product knows nothing of this: a text that is not there
any more raises, and somebody has to look again where the guard has gone.

Guards stand behind each other. What made a guard the only one is said with each; test_breaks.py shows each with the
shortest sequence that needs it, and that the same sequence is harmless while it is there.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from psycopg.pq import TransactionStatus

import db

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import psycopg


class GoneError(RuntimeError):
    """What a break replaces is not there any more."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A text of the product's with something else in it.

    Attributes:
        where: module and attribute, `refresh.work.GRANT_MANY`.
        old: what is there, once.
        new: what comes instead.
    """

    where: str
    old: str
    new: str = ""

    def value(self, present: Any) -> Any:
        """The new text.

        Raises:
            GoneError: the old one is not in it, or is there more than once.
        """
        if not isinstance(present, str) or present.count(self.old) != 1:
            raise GoneError(f"{self.where} has not once: {self.old!r}")
        return present.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Swap:
    """Another function in the place of one of the product's."""

    where: str
    function: Callable[..., Any]

    def value(self, present: Any) -> Any:
        """The function.

        Raises:
            GoneError: there was none.
        """
        if not callable(present):
            raise GoneError(f"{self.where} is no function")
        return self.function


@dataclass(frozen=True, slots=True)
class Break:
    """A guard and how it is taken out.

    Attributes:
        guard: what it is.
        why: what makes it the only one, and so what it costs to lose it.
        rules: of the checker, or `recovery`; one of them turns red.
        faults: under which; none: under the load alone.
        sql: for the database.
        changes: for the processes.
    """

    guard: str
    why: str
    rules: tuple[str, ...]
    faults: tuple[str, ...] = ()
    sql: str = ""
    changes: tuple[Edit | Swap, ...] = field(default=())


def take_out(name: str, put: Callable[[Any, str, Any], object] = setattr) -> None:
    """Take a guard out of this process.

    Args:
        name: of `BREAKS`.
        put: how an attribute is replaced; a test puts it back.

    Raises:
        GoneError: what is to be replaced is not there any more.
    """
    for change in BREAKS[name].changes:
        module_name, _, attribute = change.where.rpartition(".")
        module = import_module(module_name)
        if not hasattr(module, attribute):
            raise GoneError(f"{change.where} is gone")
        put(module, attribute, change.value(getattr(module, attribute)))


def _publish() -> None:
    """As upkeep's step, and never rings."""


def _no_savepoint(connection: psycopg.Connection[Any]) -> AbstractContextManager[None]:
    """As db.transaction(), but not inside another one."""
    if connection.info.transaction_status == TransactionStatus.IDLE:
        return db.transaction(connection)
    return nullcontext()


_SKIPPING = "FOR NO KEY UPDATE SKIP LOCKED"
_WAITING = "FOR NO KEY UPDATE"
_PENDING = "AND b.status IS NOT DISTINCT FROM 'pending' "
_DRAINED = """
    AND (
        SELECT b.id FROM credit_refresh_batches AS b WHERE b.run_id = r.id AND b.status = 'pending'
        ORDER BY b.id DESC LIMIT 1
    ) IS NULL
"""


def _recheck(where: str) -> tuple[Edit, ...]:
    return (
        Edit(where, "p.grant_mode, d.verdict, d.window_start", "p.grant_mode, 'due' AS verdict, d.window_start"),
        Edit(where, "d.verdict = 'held' AND l.next_refresh_at", "false AND l.next_refresh_at"),
    )


BREAKS: dict[str, Break] = {
    "unique-key": Break(
        "the unique index over live grants, by user and window",
        "A host that sets a date back past the triggers, as a restore of users alone does, makes a window due again "
        "that was granted. The batch finds it due, and nothing but the key refuses it.",
        ("granted-twice",),
        sql="DROP INDEX credits.uq_credit_refresh_histories_grant",
    ),
    "row-lock": Break(
        "the lock on a batch's users",
        "A host that spends while the batch decides: without the lock, the batch decides by a balance that is no "
        "more. The row's own lock keeps the sum right, but not what the ledger says, nor a hold that came meanwhile.",
        ("movement", "held", "rollback", "negative"),
        changes=(
            *(Edit(f"refresh.work.{name}", _SKIPPING) for name in ("GRANT_MANY", "TELL_MANY")),
            *(Edit(f"refresh.work.{name}", _WAITING) for name in ("GRANT_ONE", "TELL_ONE")),
            Edit("refresh.apply._LOCK_MANY", _SKIPPING),
            Edit("refresh.apply._LOCK_ONE", _WAITING),
            Edit("refresh.reversal._LOCK_MANY", _SKIPPING),
            Edit("refresh.reversal._LOCK_ONE", _WAITING),
        ),
    ),
    "recheck": Break(
        "the verdict of a batch over each of its users",
        "A scan takes whoever is due, held or not, and somebody may be held, deactivated or refreshed between a run's "
        "opening and its batch. Without a verdict all of them are granted; whoever was refreshed meanwhile is saved by "
        "a CHECK, and fails.",
        ("held", "inactive", "poison"),
        changes=tuple(
            edit
            for name in ("GRANT_MANY", "TELL_MANY", "GRANT_ONE", "TELL_ONE")
            for edit in _recheck(f"refresh.work.{name}")
        ),
    ),
    "advisory-lock": Break(
        "the lock at the door, which lets one run at a time look for its users",
        "Two openings at once, of a scan and of people: neither sees the other's batches, and both take the same "
        "users. The row lock and the recheck keep anybody from being granted twice, but a run that says whom it "
        "takes says so of users who are another's.",
        ("two-batches",),
        faults=("openings-at-once",),
        changes=(
            Edit(
                "refresh.runs._LOCK",
                "pg_advisory_xact_lock(hashtextextended(current_schema() || '.open_run', 0))",
                "1",
            ),
        ),
    ),
    "upkeep": Break(
        "upkeep's publishing of what was lost or put off",
        "A message that is lost, or a user who was locked for a moment: the batch is pending, its run is running, and "
        "so no scan takes its users. Nobody else rings again.",
        ("recovery", "unfinished", "due-left"),
        faults=("redis-flushed", "worker-killed"),
        changes=(Swap("tasks.upkeep._publish", _publish),),
    ),
    "savepoint": Break(
        "the savepoint around each half of a batch that raises",
        "One user whom the host's trigger refuses fails the statement of the whole batch. Without the savepoint the "
        "error ends the transaction, and the healthy wait with that user for as long as the host refuses.",
        ("poison", "recovery", "due-left"),
        changes=(Swap("refresh.isolation.transaction", _no_savepoint),),
    ),
    "batch-claim": Break(
        "that only a pending batch is done",
        "A message that comes twice, the second time while its run still has others to do. The recheck keeps anybody "
        "from being granted again, but the batch is closed anew and says that it has skipped those it had refreshed.",
        ("runs",),
        faults=("messages-twice",),
        changes=(
            Edit("refresh.work._PENDING", _PENDING),
            *(
                Edit(f"refresh.work.{name}", _PENDING)
                for name in ("GRANT_MANY", "TELL_MANY", "GRANT_ONE", "TELL_ONE", "GRANT_ALL", "TELL_ALL", "PLAN")
            ),
        ),
    ),
    "run-finish": Break(
        "that a run ends when nothing of it is pending",
        "A worker that has done the first of several batches ends the run, and nobody does the others: the next scan "
        "takes their users up, and what the run says of itself is not true.",
        ("runs", "two-batches"),
        changes=tuple(
            Edit(f"refresh.totals.{name}", _DRAINED, "\n") for name in ("_DRAINED_THESE", "_DRAINED_ANY", "_FINISH")
        ),
    ),
    "slot": Break(
        "that a slot is taken once: asked behind the door, and the unique index behind that",
        "Two beats ring at the same moment, and upkeep for a slot that it takes to be missed. Each opens a run of its "
        "own for the same slot.",
        ("slot",),
        sql="DROP INDEX credits.uq_credit_refresh_runs_slot",
        changes=(
            Edit("refresh.runs._SITUATION", "END\n        AS slot_taken", "END AND false\n        AS slot_taken"),
        ),
    ),
    "idempotency-key": Break(
        "that a key opens one run: looked up behind the door, and the unique constraint behind that",
        "Somebody whose request succeeded and who never heard of it asks again. A forced run grants a window of its "
        "own each time, so that they pay twice.",
        ("key",),
        sql="ALTER TABLE credits.credit_refresh_runs DROP CONSTRAINT uq_credit_refresh_runs_idempotency_key",
        changes=(Edit("refresh.runs._BY_KEY", "WHERE idempotency_key", "WHERE false AND idempotency_key"),),
    ),
}
