"""The host app: it spends credits of users at random, signs users up, and now and then makes a mistake.

Several threads, each with a connection of its own that goes past the proxies. Whatever happens to the database, a
thread opens its next transaction as soon as it can; what became of the last one it need not know, because each says in
the same transaction what it does (population.py).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import timedelta
from random import Random
from typing import TYPE_CHECKING, Any, Self

import psycopg

from db import one
from tests.faults import population

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

THREADS = 3
TRANSACTIONS_PER_SECOND = 100
SPEND_MAX = 20
SEVERAL = 3
STAY_SECONDS_MAX = 0.4
AGAIN_SECONDS = 0.5

_SPEND = """
WITH spent AS (
    UPDATE credits.users SET credit_balance = credit_balance - %(amount)s
    WHERE external_id = %(user)s AND credit_balance >= %(amount)s
    RETURNING external_id
)
INSERT INTO host.spends (external_id, amount) SELECT external_id, %(amount)s FROM spent
"""
_ABOUT_TO_BE_DUE = """
SELECT external_id FROM credits.users
WHERE wake_at < now() + interval '0.2 seconds' AND active ORDER BY wake_at DESC LIMIT 30
"""
_REFRESH = "SELECT credits.refresh_credits_if_due(%s)"

# Of beat's grants alone: what operators grant, they may also take back.
_MISTAKE = """
SELECT u.id, u.external_id, u.next_refresh_at, h.window_start
FROM credits.users AS u
JOIN credits.credit_refresh_histories AS h ON h.user_id = u.id AND h.window_end = u.next_refresh_at
JOIN credits.credit_refresh_runs AS r ON r.id = h.run_id
WHERE u.external_id = %s AND h.status = 'refreshed' AND h.reversed_by_run_id IS NULL AND r.source = 'beat'
FOR NO KEY UPDATE OF u
"""
# As a restore or a replication would, the triggers do not look.
_UNWATCHED = "SET LOCAL session_replication_role = replica"
_SET_BACK = "UPDATE credits.users SET next_refresh_at = %s WHERE id = %s"
_MOVED = "INSERT INTO host.moved (external_id, from_at, to_at) VALUES (%s, %s, %s)"


class Host:
    """Works until the end of the `with` block.

    Args:
        url: of the database, past the proxies.
        seed: of who does what, and when.
        users: external ids of those who are there; newcomers are added.
    """

    def __init__(self, url: str, seed: int, users: list[str]) -> None:
        self.done: Counter[str] = Counter()
        self.error: BaseException | None = None
        """What ended a thread: a fault of the suite's own."""
        self._url = url
        self._seed = seed
        self._users = users
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(THREADS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End what is in hand, and begin nothing more."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        try:
            client = _Client(self._url, Random(f"{self._seed}/host/{number}"), f"host{number}", self._users)  # noqa: S311
            while not self._stopping.wait(client.pause()):
                name = client.act()
                self.done[name] += 1
                if name == "failed" and self._stopping.wait(AGAIN_SECONDS):
                    break
            client.close()
        except BaseException as error:
            self.error = error
            raise


class _Client:
    """One thread's connection and chances."""

    def __init__(self, url: str, random: Random, name: str, users: list[str]) -> None:
        self._url = url
        self._random = random
        self._name = name
        self._users = users
        self._newcomers = 0
        self._connection: psycopg.Connection[Any] | None = None
        self._actions: dict[Callable[[psycopg.Connection[Any]], None], int] = {
            self._spend: 85,
            self._spend_of_due: 2,
            self._refresh_and_spend: 4,
            self._sign_up: 3,
            self._import: 1,
            self._mistake: 2,
        }

    def pause(self) -> float:
        """Seconds until the next transaction."""
        return self._random.expovariate(TRANSACTIONS_PER_SECOND / THREADS)

    def act(self) -> str:
        """Do a transaction; returns what it was, or 'failed' where its end is not known or it was undone."""
        (action,) = self._random.choices(list(self._actions), weights=list(self._actions.values()))
        try:
            connection = self._connect()
            with connection.transaction():
                action(connection)
        except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError):
            self.close()
            return "failed"
        return action.__name__.strip("_").replace("_", " ")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _connect(self) -> psycopg.Connection[Any]:
        if self._connection is None:
            self._connection = psycopg.connect(
                self._url,
                autocommit=True,
                application_name="host",
                connect_timeout=5,
                options="-c statement_timeout=30s -c lock_timeout=10s",
            )
        return self._connection

    def _spend(self, connection: psycopg.Connection[Any]) -> None:
        values = {"user": self._random.choice(self._users), "amount": self._random.randint(1, SPEND_MAX)}
        connection.execute(_SPEND, values)

    def _spend_of_due(self, connection: psycopg.Connection[Any]) -> None:
        """Of several who are due or about to be, in no order at all, each lock kept to the end."""
        found = [user for (user,) in connection.execute(_ABOUT_TO_BE_DUE)]
        for user in self._random.sample(found, min(SEVERAL, len(found))):
            connection.execute(_SPEND, {"user": user, "amount": self._random.randint(1, SPEND_MAX)})
        self._stay(STAY_SECONDS_MAX)

    def _refresh_and_spend(self, connection: psycopg.Connection[Any]) -> None:
        """As a host does that wants the credits which are due before it spends."""
        user = self._random.choice(self._users)
        connection.execute(_REFRESH, (user,))
        self._stay(STAY_SECONDS_MAX / 20)
        connection.execute(_SPEND, {"user": user, "amount": self._random.randint(1, SPEND_MAX)})

    def _sign_up(self, connection: psycopg.Connection[Any]) -> None:
        self._bring(connection, None)

    def _import(self, connection: psycopg.Connection[Any]) -> None:
        for _ in range(3):
            days = self._random.choice((0, 0, self._random.uniform(0, 100)))
            self._bring(connection, timedelta(seconds=self._random.uniform(-10, 20)) - timedelta(days=days))

    def _bring(self, connection: psycopg.Connection[Any], due_in: timedelta | None) -> None:
        now: datetime
        (now,) = one(connection.execute("SELECT now()"))
        self._newcomers += 1
        external_id = f"{self._name}-{self._newcomers:06d}"
        kind, due_at = ("new", None) if due_in is None else ("dated", now + due_in)
        population.bring(connection, population.make_user(self._random, external_id, due_at, kind), now)
        # Perhaps the commit fails, and nobody has this name: then nobody is found by it.
        self._users.append(external_id)

    def _mistake(self, connection: psycopg.Connection[Any]) -> None:
        row = connection.execute(_MISTAKE, (self._random.choice(self._users),)).fetchone()
        if row is None:
            return
        user_id, external_id, from_at, to_at = row
        connection.execute(_UNWATCHED)
        connection.execute(_SET_BACK, (to_at, user_id))
        connection.execute(_MOVED, (external_id, from_at, to_at))

    def _stay(self, seconds_max: float) -> None:
        """Inside the transaction, holding its locks, as a request of a real app does."""
        time.sleep(self._random.uniform(0, seconds_max))
