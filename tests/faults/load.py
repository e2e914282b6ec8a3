"""What people do while faults happen: ask for runs, take some back, hold users, let them go, mend the host's trigger.

It asks by rows of `host.asked`; operators take them from there (operator.py). Whatever asks for a run has an
idempotency key, and some of it is asked by two operators at the same time, as people do who click twice.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg.types.json import Jsonb

from tests.faults.population import PLANS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ASKS_PER_SECOND = 0.8
TWICE_ONE_IN = 3
PACED_ONE_IN = 3
PACE = 200
"""Users a second, of runs that have a pace of their own; beat's have the product's."""
CURES_PER_SECOND = 0.05
AGAIN_SECONDS = 0.5

_ASK = """
INSERT INTO host.asked (what, key, detail, arguments) SELECT %s, %s, %s, %s FROM generate_series(1, %s)
"""
_CURE = """
DELETE FROM host.poisoned WHERE external_id = (
    SELECT p.external_id FROM host.poisoned AS p JOIN host.born AS b ON b.external_id = p.external_id
    WHERE b.due_at < now() - interval '10 seconds' ORDER BY b.due_at LIMIT 1
)
"""
_UNANSWERED = "SELECT count(*) FROM host.asked WHERE answered_at IS NULL"

# Done, by this answer, and nobody has asked for that yet.
_DRY_RUN = """
SELECT d.answer ->> 'runId' FROM host.asked AS d
WHERE d.what = 'dry-run' AND d.exit_code IN (0, 3) AND NOT EXISTS (
    SELECT FROM host.asked AS a WHERE a.what = 'apply' AND a.detail ->> 'run' = d.answer ->> 'runId'
)
ORDER BY d.id LIMIT 1
"""
_FORCED = """
SELECT b.answer ->> 'runId' FROM host.asked AS b
WHERE b.what = 'bulk' AND (b.detail ->> 'force')::boolean AND b.exit_code IN (0, 3) AND NOT EXISTS (
    SELECT FROM host.asked AS a WHERE a.what = 'rollback' AND a.detail ->> 'run' = b.answer ->> 'runId'
)
ORDER BY b.id DESC LIMIT 1
"""
_FAILED = """
SELECT r.id::text FROM credits.credit_refresh_runs AS r
WHERE r.users_failed > 0 AND NOT r.dry_run AND NOT EXISTS (
    SELECT FROM host.asked AS a WHERE a.what = 'retry' AND a.detail ->> 'run' = r.id::text
)
ORDER BY r.created_at DESC LIMIT 1
"""
_SOON_DUE = """
SELECT external_id FROM credits.users
WHERE next_refresh_at > now() AND NOT credit_refresh_hold ORDER BY next_refresh_at OFFSET %s LIMIT 1
"""
_HELD = "SELECT external_id FROM credits.users WHERE credit_refresh_hold ORDER BY updated_at OFFSET %s LIMIT 1"


class Desk:
    """Asks until the end of the `with` block.

    Args:
        url: of the database, past the proxies.
        folder: for the files of users that commands read.
        seed: of what is asked, and when.
        users: external ids, with newcomers as they come.
    """

    def __init__(self, url: str, folder: Path, seed: int, users: list[str]) -> None:
        self.error: BaseException | None = None
        """What ended it: a fault of the suite's own."""
        self._url = url
        self._folder = folder
        self._random = Random(f"{seed}/desk")  # noqa: S311
        self._users = users
        self._asked = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._actions: dict[Callable[[psycopg.Connection[Any]], None], int] = {
            self._bulk: 3,
            self._forced: 4,
            self._dry_run: 2,
            self._apply: 2,
            self._rollback: 2,
            self._retry: 1,
            self._hold: 4,
            self._release: 3,
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask for nothing more. What was asked is still to be answered: see `unanswered()`."""
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    with psycopg.connect(
                        self._url, autocommit=True, application_name="desk", connect_timeout=5
                    ) as connection:
                        self._serve(connection)
                except psycopg.OperationalError:
                    self._stopping.wait(AGAIN_SECONDS)
        except BaseException as error:
            self.error = error
            raise

    def _serve(self, connection: psycopg.Connection[Any]) -> None:
        while not self._stopping.wait(self._random.expovariate(ASKS_PER_SECOND)):
            (action,) = self._random.choices(list(self._actions), weights=list(self._actions.values()))
            action(connection)
            if self._random.random() < CURES_PER_SECOND / ASKS_PER_SECOND:
                connection.execute(_CURE)

    def _bulk(self, connection: psycopg.Connection[Any]) -> None:
        plan = self._random.choice((None, *(plan.code for plan in PLANS)))
        whom = ["--plan", plan] if plan else ["--all"]
        pace = ["--max-users-per-second", str(PACE)] if self._random.randrange(PACED_ONE_IN) == 0 else []
        self._ask(connection, "bulk", ["bulk-refresh", *whom, *pace, "--yes"], plan=plan, force=False)

    def _forced(self, connection: psycopg.Connection[Any]) -> None:
        users, file = self._some_users()
        self._ask(connection, "bulk", ["bulk-refresh", "--users", file, "--force", "--yes"], users=users, force=True)

    def _dry_run(self, connection: psycopg.Connection[Any]) -> None:
        if self._random.random() < 0.5:
            users, file = self._some_users()
            arguments = ["bulk-refresh", "--users", file, "--force", "--dry-run", "--wait"]
            self._ask(connection, "dry-run", arguments, users=users, force=True)
        else:
            self._ask(connection, "dry-run", ["bulk-refresh", "--all", "--dry-run", "--wait"], force=False)

    def _apply(self, connection: psycopg.Connection[Any]) -> None:
        if run := _found(connection, _DRY_RUN):
            self._ask(connection, "apply", ["runs", "apply", run, "--yes"], run=run)

    def _rollback(self, connection: psycopg.Connection[Any]) -> None:
        if run := _found(connection, _FORCED):
            reopen = self._random.random() < 0.5
            arguments = ["runs", "rollback", run, *["--reopen"] * reopen, "--yes"]
            self._ask(connection, "rollback", arguments, run=run, reopen=reopen)

    def _retry(self, connection: psycopg.Connection[Any]) -> None:
        if run := _found(connection, _FAILED):
            self._ask(connection, "retry", ["runs", "retry", run, "--yes"], run=run)

    def _hold(self, connection: psycopg.Connection[Any]) -> None:
        if user := _found(connection, _SOON_DUE, self._random.randrange(300)):
            until = None
            if self._random.random() < 0.5:
                until = (datetime.now(UTC) + timedelta(seconds=self._random.uniform(10, 40))).isoformat()
            arguments = ["hold", user, "--reason", "a question", *(["--until", until] if until else [])]
            self._ask(connection, "hold", arguments, user=user, until=until)

    def _release(self, connection: psycopg.Connection[Any]) -> None:
        if user := _found(connection, _HELD, self._random.randrange(5)):
            self._ask(connection, "release", ["release", user], user=user)

    def _some_users(self) -> tuple[list[str], str]:
        users = self._random.sample(self._users, self._random.randint(3, 50))
        file = self._folder / f"users-{self._asked}.txt"
        file.write_text("\n".join(users) + "\n")
        return users, str(file)

    def _ask(self, connection: psycopg.Connection[Any], what: str, arguments: list[str], **detail: object) -> None:
        self._asked += 1
        key, times = None, 1
        arguments = [*arguments, "--json"]
        if what not in {"hold", "release"}:
            key = f"ask-{self._asked}"
            arguments += ["--reason", "the fault suite", "--idempotency-key", key]
            times = 2 if self._random.randrange(TWICE_ONE_IN) == 0 else 1
        connection.execute(_ASK, (what, key, Jsonb(detail), arguments, times))


def unanswered(connection: psycopg.Connection[Any]) -> int:
    """How much was asked and is not answered yet."""
    return int(_found(connection, _UNANSWERED) or 0)


def _found(connection: psycopg.Connection[Any], query: str, *values: object) -> Any:
    row = connection.execute(query, values).fetchone()
    return row[0] if row else None
