"""The database as the acceptance tests see it: plain SQL, nothing of the service's own code."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

    from db import Database

_GATE = 20_260_701  # any number that nobody else locks

# Without a limit of its own the trigger would be ended by the worker's lock_timeout.
_HOSTS_TRIGGER = f"""
CREATE FUNCTION host_gate() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = 0 AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared({_GATE});
    RETURN NEW;
END
$$;
CREATE TRIGGER host_gate BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION host_gate();
"""


class Ledger:
    """Users, runs and grants of the test's database.

    Args:
        database: fresh and migrated.
        connection: to it, in autocommit.
    """

    def __init__(self, database: Database, connection: psycopg.Connection[Any]) -> None:
        self._database = database
        self._connection = connection

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self._connection.execute(query, parameters or None).fetchall()

    def value(self, query: str, *parameters: object) -> Any:
        ((value,),) = self.rows(query, *parameters)
        return value

    def execute(self, statement: str, *parameters: object) -> int:
        return self._connection.execute(statement, parameters or None).rowcount

    def add_due_users(self, count: int) -> int:
        """Users of the free tier (1,000 credits), due an hour ago, with 0 to 999 credits left.

        Returns:
            The credits that fill them all up.
        """
        self.execute(
            """
            INSERT INTO users (external_id, plan_code, credit_balance, next_refresh_at)
            SELECT 'user-' || n, 'free', n %% 1000, now() - interval '1 hour' FROM generate_series(1, %s) AS n
            """,
            count,
        )
        return sum(1_000 - number % 1_000 for number in range(1, count + 1))

    def runs_with_users(self) -> list[Any]:
        """The runs that found somebody, oldest first."""
        rows = self.rows("SELECT id FROM credit_refresh_runs WHERE users_selected > 0 ORDER BY created_at")
        return [id_ for (id_,) in rows]

    def run_status(self, run_id: object) -> str:
        return str(self.value("SELECT status FROM credit_refresh_runs WHERE id = %s", run_id))

    def batches(self, status: str) -> list[int]:
        rows = self.rows("SELECT id FROM credit_refresh_batches WHERE status = %s ORDER BY id", status)
        return [id_ for (id_,) in rows]

    def an_hour_passes(self) -> None:
        """Free the slot that the worker's start took, so that the next scan opens a run as it would in an hour."""
        # By a year, so that two neighbours do not collide on the way.
        self.execute("UPDATE credit_refresh_runs SET slot = slot - interval '1 year'")

    def a_minute_passes(self) -> None:
        """Make what was published long enough ago to count as lost."""
        self.execute(
            "UPDATE credit_refresh_batches SET published_at = published_at - interval '1 minute'"
            " WHERE status = 'pending'"
        )
        self.execute("UPDATE credit_refresh_runs SET paced_until = paced_until - interval '1 minute'")

    def assert_nothing_granted(self) -> None:
        assert self.value("SELECT count(*) FROM credit_refresh_histories") == 0
        assert self.value("SELECT count(*) FROM credit_audit_logs WHERE user_id IS NOT NULL") == 0
        assert self.value("SELECT count(*) FROM users WHERE last_credit_refresh IS NOT NULL") == 0

    def assert_all_granted_once(self, run_id: object) -> None:
        """Each user of `add_due_users()` was filled up once, by this run, and each credit is on record."""
        users, credits_due = self.rows("SELECT count(*), sum(1000 - substr(external_id, 6)::int % 1000) FROM users")[0]
        assert self.rows(
            """
            SELECT count(*), count(DISTINCT user_id), sum(credits_added), bool_and(run_id = %s),
                min(status), max(status)
            FROM credit_refresh_histories
            """,
            run_id,
        ) == [(users, users, credits_due, True, "refreshed", "refreshed")]
        # Each history row has its audit row, and both tell what really happened to the balance.
        assert self.rows(
            """
            SELECT count(*), count(DISTINCT a.user_id), sum(a.credits)
            FROM credit_audit_logs AS a
            JOIN credit_refresh_histories AS h ON h.user_id = a.user_id AND h.run_id = a.run_id
            JOIN users AS u ON u.id = a.user_id
            WHERE a.action = 'refreshed' AND a.credits = h.credits_added
                AND (a.balance_before, a.balance_after) = (h.old_balance, h.new_balance)
                AND h.old_balance = substr(u.external_id, 6)::int % 1000 AND h.new_balance = u.credit_balance
                AND u.next_refresh_at = h.window_end AND u.next_refresh_at > now()
                AND u.last_credit_refresh = h.created_at
            """
        ) == [(users, users, credits_due)]
        assert self.value("SELECT count(*) FROM credit_audit_logs WHERE user_id IS NOT NULL") == users
        assert self.rows(
            """
            SELECT status, finished_at IS NOT NULL, error, users_selected, users_refreshed, credits_granted,
                users_held + users_skipped + users_failed
            FROM credit_refresh_runs WHERE id = %s
            """,
            run_id,
        ) == [("succeeded", True, None, users, users, credits_due, 0)]

    @contextmanager
    def gate(self) -> Iterator[Gate]:
        """A host's trigger that keeps each batch inside its transaction until the block ends or the gate opens."""
        with self._database.statements() as connection:
            connection.execute("SELECT pg_advisory_lock(%s)", (_GATE,))
            self.execute(_HOSTS_TRIGGER)
            gate = Gate(self, connection)
            try:
                yield gate
            finally:
                gate.open()


class Gate:
    """What holds the batches, closed until `open()`."""

    def __init__(self, ledger: Ledger, connection: psycopg.Connection[Any]) -> None:
        self._ledger = ledger
        self._connection = connection

    def held(self) -> list[int]:
        """The server processes of workers that are inside a batch's statement at this instant."""
        rows = self._ledger.rows(
            """
            SELECT pid FROM pg_stat_activity
            WHERE datname = current_database() AND application_name = 'credits-worker' AND state = 'active'
                AND (wait_event_type, wait_event) = ('Lock', 'advisory') AND query LIKE '%WITH batch AS%'
            """
        )
        return [pid for (pid,) in rows]

    def open(self) -> None:
        self._connection.execute("SELECT pg_advisory_unlock_all()")
