"""Any people, a dry run, anything that can happen meanwhile, then apply: the books are as a ledger in Python says.

The ledger keeps balances by itself, from what people began with, what was spent and what the oracle says of each grant.
From the database it takes people's plans, dates and holds, which other tests look after.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import psycopg
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from db import Database
from tests import oracle
from tests.integration.applying import applied, plan
from tests.integration.ledger import check_ledger
from tests.integration.population import PLANS, ZONES, add_plans, add_users, offsets, users
from tests.integration.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from uuid import UUID

    from tests.cluster import Cluster

Decided = tuple[oracle.Decision, str | None, str | None]
"""A decision, the plan's code and its mode."""

EXAMPLES = 40
PEOPLE_MAX = 25
ASKED = [
    oracle.SCAN,
    oracle.SCAN,
    oracle.Asked(amount=500),
    oracle.Asked(force=True),
    oracle.Asked(force=True, keep_window=True, amount=1_500),
]

CHANGES: dict[str, str] = {
    "hold": "credit_refresh_hold = true, hold_until = NULL",
    "short hold": "credit_refresh_hold = true, hold_until = now() - interval '10 minutes'",
    "long hold": "credit_refresh_hold = true, hold_until = now() + interval '2 days'",
    "release": "credit_refresh_hold = false",
    "stop": "active = false",
    "start": "active = true",
    "plan": "plan_code = %s",
    "custom": "custom_credit_amount = %s",
    "day": "credit_refresh_day = %s",
    "zone": "timezone = %s",
    "date": "next_refresh_at = now() + %s",
}
PLAN_CHANGES = {
    "amount": "amount = %s",
    "mode": "grant_mode = %s",
    "interval": "interval_days = %s",
    "retire": "active = false",
    "cadence": "cadence = %s",
}
whom = st.integers(0, PEOPLE_MAX - 1)
nothing = st.none()


def _op(
    who: st.SearchStrategy[Any], what: str, value: st.SearchStrategy[Any]
) -> st.SearchStrategy[tuple[Any, str, Any]]:
    return st.tuples(who, st.just(what), value)


happenings = st.lists(
    st.one_of(
        _op(whom, "spend", st.integers(1, 2_000)),
        _op(whom, "spend", st.integers(1, 2_000)),
        _op(whom, "refresh", nothing),
        _op(whom, "delete", nothing),
        *(_op(whom, what, nothing) for what in ("hold", "short hold", "long hold", "release", "stop", "start")),
        _op(whom, "plan", st.sampled_from([*PLANS, None])),
        _op(whom, "custom", st.sampled_from([None, 1, 1_000, 7_777])),
        _op(whom, "day", st.sampled_from([None, 1, 15, 31])),
        _op(whom, "zone", st.sampled_from([None, *ZONES])),
        _op(whom, "date", offsets),
        _op(st.sampled_from(PLANS[:12]), "amount", st.sampled_from([1_000, 5])),
        _op(st.sampled_from(PLANS[:12]), "mode", st.sampled_from(["fill", "add"])),
        _op(st.sampled_from(PLANS[:4]), "interval", st.sampled_from([7, 8])),
        _op(st.sampled_from(PLANS[:12]), "cadence", st.sampled_from(["rolling", "daily", "external"])),
        _op(st.sampled_from(PLANS[:12]), "retire", nothing),
    ),
    min_size=5,
    max_size=30,
)


@dataclass
class Ledger:
    """What the balances must be, computed beside the database."""

    world: World
    balances: dict[int, int] = field(default_factory=dict)
    spent: dict[int, int] = field(default_factory=dict)
    granted: dict[int, list[datetime]] = field(default_factory=dict)
    """When the windows began that the host has had refreshed since."""

    def begin(self) -> None:
        self.balances = {row["id"]: row["credit_balance"] for row in self.world.rows("SELECT * FROM users")}
        self.spent = dict(self.balances)

    def now(self) -> datetime:
        at: datetime = self.world.value("SELECT now()")
        return at.astimezone(UTC)

    def decide(self, as_of: datetime, asked: oracle.Asked = oracle.SCAN) -> dict[int, Decided]:
        """Of each user, with the balance that this ledger says."""
        plans = {row["code"]: _plan(row) for row in self.world.rows("SELECT * FROM plans")}
        decided = {}
        for row in self.world.rows("SELECT * FROM users"):
            on = plans.get(row["plan_code"])
            decision = oracle.decide(_user(row, self.balances[row["id"]]), on, as_of, asked)
            decided[row["id"]] = (decision, row["plan_code"], on.grant_mode if on else None)
        return decided

    def happen(self, ids: list[int], who: int | str, what: str, value: Any) -> None:
        given_ = () if value is None and what not in {"plan", "custom", "day", "zone", "date"} else (value,)
        if isinstance(who, str):
            self.world.sql.execute(f"UPDATE plans SET {PLAN_CHANGES[what]} WHERE code = %s", (*given_, who))  # noqa: S608
            return
        user = ids[who % len(ids)]
        if user not in self.balances:
            return
        if what == "spend":
            self.balances[user] -= value
            self.spent[user] -= value
            self.world.sql.execute("UPDATE users SET credit_balance = credit_balance - %s WHERE id = %s", (value, user))
        elif what == "refresh":
            decision, _, _ = self.decide(self.now())[user]
            if decision.verdict == "due" and decision.credits_added is not None and decision.window is not None:
                self.balances[user] += decision.credits_added
                self.granted.setdefault(user, []).append(decision.window.start)
            self.world.sql.execute("SELECT refresh_user(%s, 'function', 'host')", (user,))
        elif what == "delete":
            self.world.sql.execute("DELETE FROM users WHERE id = %s", (user,))
            del self.balances[user], self.spent[user]
        else:
            self.world.sql.execute(f"UPDATE users SET {CHANGES[what]} WHERE id = %s", (*given_, user))  # noqa: S608


def _plan(row: dict[str, Any]) -> oracle.Plan:
    names = (
        "amount",
        "grant_mode",
        "rollover_cap",
        "cadence",
        "interval_days",
        "day_of_month",
        "time_of_day",
        "active",
    )
    return oracle.Plan(**{name: row[name] for name in names}, timezone=ZoneInfo(row["timezone"]))


def _user(row: dict[str, Any], balance: int) -> oracle.User:
    return oracle.User(
        balance=balance,
        next_refresh_at=row["next_refresh_at"] and row["next_refresh_at"].astimezone(UTC),
        held=row["credit_refresh_hold"],
        hold_until=row["hold_until"],
        refresh_day=row["credit_refresh_day"],
        custom_amount=row["custom_credit_amount"],
        timezone=ZoneInfo(row["timezone"]) if row["timezone"] else None,
        active=row["active"],
        shortfall=row["refresh_shortfall"],
    )


@contextmanager
def new_world(cluster: Cluster) -> Iterator[World]:
    """A database for one example."""
    name = cluster.create(cluster.template)
    try:
        url = cluster.url(name)
        with (
            closing(Database(url, "credits", name="test", pool=2)) as database,
            psycopg.connect(
                url.replace("+psycopg", "", 1), autocommit=True, row_factory=dict_row,
                options="-c search_path=credits -c timezone=UTC",
            ) as sql,
        ):  # fmt: skip
            yield World(database, sql)
    finally:
        cluster.drop(name)


def same(before: Decided, now: Decided) -> bool:
    """Whether the rule would grant what it would have granted, whatever the balance."""
    (planned, *on), (decided, *on_now) = before, now
    assert planned.window is not None
    return (
        decided.verdict == "due"
        and decided.window is not None
        and (decided.window.start, decided.window.end) == (planned.window.start, planned.window.end)
        and (on, planned.target) == (on_now, decided.target)
    )


def check_planned(world: World, dry: UUID, decided: dict[int, Decided]) -> None:
    query = "SELECT * FROM credit_refresh_histories WHERE status = 'planned' AND run_id = %s"
    stored = {
        row["user_id"]: (row["window_start"], row["window_end"], row["target"], row["credits_added"], row["grant_mode"])
        for row in world.rows(query, dry)
    }
    assert stored == {
        user: (decision.window.start, decision.window.end, decision.target, decision.credits_added, mode)
        for user, (decision, _code, mode) in decided.items()
        if decision.verdict == "due" and decision.window is not None
    }


def expected(ledger: Ledger, before: dict[int, Decided], after: dict[int, Decided]) -> set[int]:
    """Of those who were planned, who gets what was planned."""
    now = ledger.now()
    granted = set()
    for user, (planned, _code, _mode) in before.items():
        if (
            planned.verdict != "due"
            or planned.window is None
            or user not in after
            or not same(before[user], after[user])
        ):
            continue
        ended = planned.window.end is not None and planned.window.end <= now
        if not ended and all(start <= planned.window.start for start in ledger.granted.get(user, [])):
            granted.add(user)
    return granted


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(users(), min_size=5, max_size=PEOPLE_MAX),
    st.sampled_from(ASKED),
    happenings,
    st.sampled_from([None, None, None, timedelta(days=-3), timedelta(days=-20)]),
)
def test_apply_leaves_what_a_ledger_of_ones_own_says(
    cluster: Cluster,
    people: list[dict[str, Any]],
    asked: oracle.Asked,
    happened: list[tuple[Any, str, Any]],
    ago: timedelta | None,
) -> None:
    with new_world(cluster) as world:
        add_plans(world)
        add_users(world, "u", people)
        ledger = Ledger(world)
        ledger.begin()
        ids = list(ledger.balances)
        untouched = world.rows("SELECT * FROM users ORDER BY id")
        dry = plan(world, as_of=ledger.now() + ago if ago else None, **asdict(asked))
        as_of = world.value("SELECT as_of FROM credit_refresh_runs")
        before = ledger.decide(as_of or ledger.now(), asked)
        check_planned(world, dry, before)
        assert world.rows("SELECT * FROM users ORDER BY id") == untouched

        for who, what, value in happened:
            ledger.happen(ids, who, what, value)

        after = ledger.decide(as_of or ledger.now(), asked)
        rows = {row["id"]: row for row in world.rows("SELECT * FROM users")}
        granted = expected(ledger, before, after)
        planned = sum(decision.verdict == "due" for decision, _, _ in before.values())
        for user in granted:
            ledger.balances[user] += after[user][0].credits_added or 0
        if planned:
            run = applied(world, dry)
            assert (run.users_refreshed, run.users_skipped) == (len(granted), planned - len(granted))
            assert (run.status, run.users_failed) == ("succeeded", 0)
            assert run.credits_granted == sum(after[user][0].credits_added or 0 for user in granted)
        event(f"{min(len(granted), 3)} or more granted, {min(planned - len(granted), 3)} or more drifted")
        for row in world.rows("SELECT * FROM users"):
            user = row["id"]
            assert row["credit_balance"] == ledger.balances[user]
            if user not in granted:
                assert row == rows[user]
                continue
            window = before[user][0].window
            assert window is not None
            assert row["next_refresh_at"] == (window.end or rows[user]["next_refresh_at"])
            assert not row["credit_refresh_hold"]
        check_ledger(world, ledger.spent)
