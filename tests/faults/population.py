"""The users of the suite, and the schema `host`: what the host app knows of them, apart from the service.

The checker has two sources: the service's tables and these. Whoever writes here says so in the transaction that does
what is written, or before anybody is asked for it, so that a caller who never hears how a commit ended need not know.

    host.born      a user as they came: balance, first due instant, plan, target, the days of a window. In the
                   transaction that inserts the user.
                   kind: 'dated' came with a balance and a date · 'new' came without a balance, and is granted by the
                   service's trigger from that instant on (born with 0, due at that instant) · 'poison' is 'dated', and
                   refused by the host's own trigger for a while
    host.spends    credits spent, in the transaction that spends them
    host.asked     what operators ask for, written before it is asked. An ask that nobody has answered is asked again
                   with the same key; the same key may stand in two rows, which are asked by two operators at once.
                   what: 'bulk' 'dry-run' 'apply' 'rollback' 'retry' 'hold' 'release'; detail: plan, users, force, run,
                   reopen, user, until, as it applies. exit_code 0 or 3: done; 2: refused; answer: what the command
                   said in JSON (runId, existing, …).
    host.poisoned  whom the host's trigger refuses, when the service would change their balance. Deleted when cured.
    host.moved     dates that the host has set back by mistake, past the trigger that watches over them, to the
                   beginning of a window that was granted: the unique key alone stands there
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from db import one

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    import psycopg

INTERVAL_DAYS = 30

DUE_PER_SECOND = 40
"""Users who fall due in each second of the run. Two cores do about a thousand."""
POISON_USERS = 6

_PAST_DAYS = 40
_LONG_PAST_DAYS = 200
_BALANCE_MAX = 1_500
_CUSTOM_AMOUNT = 750
_CUSTOM_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """A rolling plan of `INTERVAL_DAYS`."""

    code: str
    mode: str
    amount: int
    rollover_cap: int | None = None


PLANS = (
    Plan("filled", "fill", 1_000),
    Plan("reset", "reset", 600),
    Plan("added", "add", 300),
    Plan("rolled", "rollover", 800, 200),
)


@dataclass(frozen=True, slots=True)
class User:
    """Somebody as they come.

    Attributes:
        balance: in credits; None: the service's trigger gives the first grant.
        due_at: None with the balance.
        custom_amount: instead of their plan's.
    """

    external_id: str
    plan: Plan
    balance: int | None
    due_at: datetime | None
    custom_amount: int | None
    kind: str

    def born(self, now: datetime) -> tuple[object, ...]:
        """The row of `host.born`."""
        target = self.custom_amount or self.plan.amount
        balance, due_at = self.balance or 0, self.due_at or now
        return (self.external_id, balance, due_at, self.plan.code, target, INTERVAL_DAYS, self.kind)

    def row(self) -> tuple[object, ...]:
        """The row of `credits.users`."""
        return (self.external_id, self.plan.code, self.balance, self.due_at, self.custom_amount)


_SCHEMA = """
CREATE SCHEMA host;
CREATE TABLE host.born (
    external_id text PRIMARY KEY, born_balance bigint NOT NULL, due_at timestamptz NOT NULL, plan_code text NOT NULL,
    target bigint NOT NULL, interval_days integer NOT NULL, kind text NOT NULL
);
CREATE TABLE host.spends (
    id bigserial PRIMARY KEY, external_id text NOT NULL, amount bigint NOT NULL,
    spent_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE host.asked (
    id bigserial PRIMARY KEY, what text NOT NULL, key text, detail jsonb NOT NULL, arguments text[] NOT NULL,
    asked_at timestamptz NOT NULL DEFAULT now(),
    operator text, taken_at timestamptz, attempts integer NOT NULL DEFAULT 0,
    answered_at timestamptz, exit_code integer, answer jsonb, said text
);
CREATE INDEX ON host.asked (id) WHERE answered_at IS NULL;
CREATE TABLE host.poisoned (external_id text PRIMARY KEY);
CREATE TABLE host.moved (
    id bigserial PRIMARY KEY, external_id text NOT NULL, from_at timestamptz NOT NULL, to_at timestamptz NOT NULL,
    moved_at timestamptz NOT NULL DEFAULT now()
);

-- The service is known by the name of its connections: the host itself may spend for whomever it likes.
CREATE FUNCTION host.refuse_poisoned() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('application_name') LIKE 'credits%'
        AND EXISTS (SELECT FROM host.poisoned WHERE external_id = new.external_id)
    THEN
        RAISE 'the host refuses %', new.external_id;
    END IF;
    RETURN new;
END
$$;
CREATE TRIGGER host_refuses BEFORE UPDATE OF credit_balance ON credits.users
    FOR EACH ROW EXECUTE FUNCTION host.refuse_poisoned();
"""
_PLAN = """
INSERT INTO credits.plans (code, name, amount, grant_mode, rollover_cap, cadence, interval_days)
VALUES (%s, %s, %s, %s, %s, 'rolling', %s)
"""
_BORN = """
INSERT INTO host.born (external_id, born_balance, due_at, plan_code, target, interval_days, kind)
VALUES (%s, %s, %s, %s, %s, %s, %s)
"""
_USER = """
INSERT INTO credits.users (external_id, plan_code, credit_balance, next_refresh_at, custom_credit_amount)
VALUES (%s, %s, %s, %s, %s)
"""
_COPY_BORN = """
COPY host.born (external_id, born_balance, due_at, plan_code, target, interval_days, kind) FROM STDIN
"""
_COPY_USERS = """
COPY credits.users (external_id, plan_code, credit_balance, next_refresh_at, custom_credit_amount) FROM STDIN
"""


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Make the schema `host` and the plans, in a migrated database."""
    with connection.transaction():
        connection.execute(_SCHEMA)
        for plan in PLANS:
            values = (plan.code, plan.code, plan.amount, plan.mode, plan.rollover_cap, INTERVAL_DAYS)
            connection.execute(_PLAN, values)


def fill(connection: psycopg.Connection[Any], random: Random, *, seconds: float) -> list[str]:
    """Bring in the users who are there when it begins.

    Args:
        connection: in autocommit.
        random: who they are.
        seconds: of the run, in each of which as many fall due.

    Returns:
        Their external ids.
    """
    with connection.transaction():
        (now,) = one(connection.execute("SELECT now()"))
        users = list(_first_users(random, now, seconds))
        with connection.cursor() as cursor:
            for statement, rows in (
                (_COPY_BORN, [user.born(now) for user in users]),
                (_COPY_USERS, [user.row() for user in users]),
            ):
                with cursor.copy(statement) as copy:
                    for row in rows:
                        copy.write_row(row)
            cursor.executemany(
                "INSERT INTO host.poisoned VALUES (%s)",
                [(user.external_id,) for user in users if user.kind == "poison"],
            )
    connection.execute("ANALYZE credits.users")
    return [user.external_id for user in users]


def bring(connection: psycopg.Connection[Any], user: User, now: datetime) -> None:
    """Bring in one more user.

    Args:
        connection: in a transaction of the host's.
        user: with an external id that nobody had.
        now: the transaction's `now()`, at which the service's trigger begins the window of a user without a balance.
    """
    connection.execute(_BORN, user.born(now))
    connection.execute(_USER, user.row())


def make_user(random: Random, external_id: str, due_at: datetime | None, kind: str) -> User:
    """Somebody on one of the plans, with some balance where they have a date."""
    return User(
        external_id,
        random.choice(PLANS),
        None if due_at is None else random.randrange(_BALANCE_MAX),
        due_at,
        _CUSTOM_AMOUNT if random.randrange(_CUSTOM_ONE_IN) == 0 else None,
        kind,
    )


def _first_users(random: Random, now: datetime, seconds: float) -> Iterator[User]:
    due = int(DUE_PER_SECOND * seconds)
    ahead = [now + timedelta(seconds=random.uniform(0, seconds)) for _ in range(due)]
    past = [now - timedelta(days=random.uniform(0, _PAST_DAYS)) for _ in range(due // 6)]
    long_past = [now - timedelta(days=random.uniform(0, _LONG_PAST_DAYS)) for _ in range(due // 30)]
    later = [now + timedelta(days=random.uniform(1, INTERVAL_DAYS)) for _ in range(due // 5)]
    dates = [(at, "dated") for at in (*ahead, *past, *long_past, *later)]
    # In the run's first half, so that there is time left to be cured in.
    dates += [(now + timedelta(seconds=random.uniform(0, seconds / 2)), "poison") for _ in range(POISON_USERS)]
    random.shuffle(dates)  # neighbours on disk, and so in a batch, have nothing else in common
    for number, (at, kind) in enumerate(dates):
        yield make_user(random, f"user-{number:06d}", at, kind)
