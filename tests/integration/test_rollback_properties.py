"""Any people, any interleaving of what can happen to them, rollbacks among it: as a ledger in plain Python says.

The ledger keeps balances, dates and shortfalls by itself, from docs/runs.md and the oracle's arithmetic, and reads none
of them from the database. Plans are rolling, of every mode: what grids do is the business of other tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refresh.errors import RefusedError
from refresh.runs import Opened
from tests import oracle
from tests.integration.population import MODES, add_plans
from tests.integration.rollbacks import call_function, open_rollback, refresh, roll_back, spend, work_off

if TYPE_CHECKING:
    from uuid import UUID

    from tests.integration.world import World

EXAMPLES = max(80, settings.default.max_examples // 100) if settings.default else 80
PEOPLE = 4
AMOUNT, CAP, INTERVAL = 1_000, 300, timedelta(days=7)
"""Of the plans rolling-*."""

# Far from the boundaries, which lie 7 days apart: an example takes less than minutes.
overdue = st.sampled_from([timedelta(minutes=10), timedelta(days=1), timedelta(days=8), timedelta(days=20)])


@dataclass(eq=False)
class Grant:
    """A grant, and what was before it."""

    run_id: UUID | None
    mode: str
    credits: int
    old_balance: int
    shortfall: int
    start: datetime
    end: datetime
    previous_date: datetime | None
    previous_grant: Grant | None
    taken_back: bool = False
    reopened: bool = False

    @property
    def forced(self) -> bool:
        return self.previous_date is None or self.previous_date > self.start


@dataclass
class Person:
    """One user, and what each happening does to them."""

    id: int
    name: str
    mode: str
    balance: int
    date: datetime | None
    grants: list[Grant] = field(default_factory=list)
    refreshed_by: Grant | None = None
    shortfall: int = 0
    held: bool = False
    active: bool = True
    reversed: int = 0
    skipped: int = 0

    def live(self) -> list[Grant]:
        return [grant for grant in self.grants if not grant.taken_back]

    def refresh(self, at: datetime, run_id: UUID | None, *, force: bool = False, amount: int | None = None) -> None:
        forced = force and (self.date is None or self.date > at)
        if not self.active or self.held or not (forced or (self.date is not None and self.date <= at)):
            return
        if forced:
            start, end = at, max(at + INTERVAL, self.date or at)
        else:
            assert self.date is not None
            start = self.date + (at - self.date) // INTERVAL * INTERVAL
            end = start + INTERVAL
        assert start not in [grant.start for grant in self.live()]
        target = max((amount or AMOUNT) - self.shortfall, 0)
        added = oracle.credits(self.mode, target, CAP, self.balance)
        assert added is not None
        grant = Grant(run_id, self.mode, added, self.balance, self.shortfall, start, end, self.date, self.refreshed_by)
        self.grants.append(grant)
        self.balance += added
        self.date, self.refreshed_by, self.shortfall = end, grant, 0

    def roll_back(self, grant: Grant, *, reopen: bool, allow_negative: bool) -> None:
        if self.live()[-1] is not grant:
            self.skipped += 1
            return
        there = min(grant.credits, max(self.balance, 0))
        missing = grant.credits - there
        self.balance -= grant.credits if allow_negative else there
        grant.taken_back, grant.reopened = True, reopen or grant.forced
        self.reversed += 1
        if self.refreshed_by is grant:
            self.refreshed_by = grant.previous_grant
        if self.date == grant.end and (grant.forced or reopen):
            ends = [other.end for other in self.live()]
            self.date = max([grant.previous_date, *ends]) if grant.previous_date else None
        if reopen and grant.mode in {"fill", "reset"}:
            # These pay off debts: those that a rollback makes as well, and those that there were before.
            self.shortfall += max(missing + grant.shortfall - max(-grant.old_balance, 0), 0)
        elif reopen:
            self.shortfall += grant.shortfall + (0 if allow_negative else missing)
        elif grant.forced:
            self.shortfall += grant.shortfall


@dataclass
class Ledger:
    """What the books must say, computed beside the database."""

    world: World
    people: list[Person]
    runs: list[UUID] = field(default_factory=list)
    undone: set[UUID] = field(default_factory=set)

    def happen(self, what: str, who: int, value: Any) -> None:
        getattr(self, what)(self.people[who % len(self.people)], value)

    def spend(self, person: Person, credits_: int) -> None:
        person.balance -= credits_
        spend(self.world, person.id, credits_)

    def top_up(self, person: Person, credits_: int) -> None:
        self.spend(person, -credits_)

    def hold(self, person: Person, held: bool) -> None:  # noqa: FBT001
        person.held = held
        self.world.sql.execute("UPDATE users SET credit_refresh_hold = %s WHERE id = %s", (held, person.id))

    def activate(self, person: Person, active: bool) -> None:  # noqa: FBT001
        person.active = active
        self.world.sql.execute("UPDATE users SET active = %s WHERE id = %s", (active, person.id))

    def change_plan(self, person: Person, mode: str) -> None:
        if person.date is not None and any(person.date < grant.end for grant in person.grants if not grant.reopened):
            return  # become_due() has put the date where no grid has it, and a new plan would take it away
        person.mode = mode
        self.world.sql.execute("UPDATE users SET plan_code = %s WHERE id = %s", (f"rolling-{mode}", person.id))

    def become_due(self, person: Person, overdue_by: timedelta) -> None:
        """As a restore of the users table does, past all triggers; to an instant of its own."""
        person.date = self.now() - overdue_by
        self.world.restore("UPDATE users SET next_refresh_at = %s WHERE id = %s", person.date, person.id)

    def call(self, person: Person, _: None) -> None:
        person.refresh(self.now(), None)
        call_function(self.world, person.name)

    def scan(self, _: Person, amount: int | None) -> None:
        run = refresh(self.world, amount=amount)
        self.refreshed(run, force=False, amount=amount)

    def scan_all(self, _: Person, overdue_by: timedelta) -> None:
        for person in self.people:
            self.become_due(person, overdue_by)
        self.scan(person, None)

    def force(self, _: Person, amount: int | None) -> None:
        run = refresh(self.world, force=True, amount=amount)
        self.refreshed(run, force=True, amount=amount)

    def refreshed(self, run: Opened, *, force: bool, amount: int | None) -> None:
        row = self.world.row("SELECT * FROM credit_refresh_runs WHERE id = %s", run.run_id)
        at = (row["as_of"] if force else row["created_at"]).astimezone(UTC)
        self.runs.append(run.run_id)
        for person in self.people:
            person.refresh(at, run.run_id, force=force, amount=amount)

    def roll_back(self, person: Person, value: tuple[int, bool, bool, bool, bool]) -> None:
        number, reopen, allow_negative, alone, dry_run = value
        if not self.runs:
            return
        run_id = self.runs[-1 - number % len(self.runs)]
        chosen = [person] if alone else self.people
        given_ = [(p, grant) for p in chosen for grant in p.live() if grant.run_id == run_id]
        options = {"reopen": reopen, "allow_negative": allow_negative, "users": [person.name] if alone else None}
        try:
            run = open_rollback(self.world, run_id, request={"dry_run": dry_run}, **options)
        except RefusedError:
            assert not given_ or (not alone and run_id in self.undone)
            return
        assert isinstance(run, Opened)
        assert given_
        assert run.users_selected == len(given_)
        assert work_off(self.world, run).status == "succeeded"
        if dry_run:
            return
        if not alone:
            self.undone.add(run_id)
        for affected, grant in given_:
            affected.roll_back(grant, reopen=reopen, allow_negative=allow_negative)

    def now(self) -> datetime:
        at: datetime = self.world.value("SELECT now()")
        return at.astimezone(UTC)

    def compare(self) -> None:
        for person in self.people:
            user = self.world.see(person.id)
            rows = self.world.history(person.id)
            granted = [row for row in rows if row["status"] == "refreshed"]
            assert [row["credits_added"] for row in granted] == [grant.credits for grant in person.grants]
            last = person.refreshed_by and granted[person.grants.index(person.refreshed_by)]["created_at"]
            assert user["credit_balance"] == person.balance
            assert (user["next_refresh_at"], user["last_credit_refresh"]) == (person.date, last)
            assert user["refresh_shortfall"] == person.shortfall
            assert [row["reversed_by_run_id"] is not None for row in granted] == [g.taken_back for g in person.grants]
            for status, count in (("reversed", person.reversed), ("skipped", person.skipped)):
                assert len([row for row in rows if row["status"] == status]) == count


whom = st.integers(0, PEOPLE - 1)


def _op(what: str, value: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[str, int, Any]]:
    return st.tuples(st.just(what), whom, value)


rollbacks = _op(
    "roll_back",
    st.tuples(
        st.sampled_from([0, 0, 0, 1, 2, 3]), st.booleans(), st.booleans(), st.sampled_from([False, False, True]),
        st.sampled_from([False, False, False, True]),
    ),
)  # fmt: skip
amounts = st.sampled_from([None, None, 1, 5_000])
spends = _op("spend", st.integers(1, 2_000))
happening = st.one_of(
    _op("top_up", st.integers(1, 2_000)),
    _op("hold", st.sampled_from([False, False, True])),
    _op("activate", st.sampled_from([True, True, False])),
    _op("change_plan", st.sampled_from(MODES)),
    _op("become_due", overdue),
    _op("call", st.none()),
    _op("scan", amounts),
    _op("scan_all", overdue),
    _op("force", amounts),
)
# In rounds: a refresh, what happens after it, a rollback. Left to itself, chance seldom has one take back anything.
rounds = st.lists(
    st.tuples(
        st.one_of(_op("scan_all", overdue), _op("force", amounts)),
        st.lists(st.one_of(spends, happening), min_size=1, max_size=5),
        rollbacks,
    ),
    min_size=1, max_size=4,
)  # fmt: skip
people = st.lists(
    st.tuples(
        st.sampled_from(MODES),
        st.one_of(st.integers(-500, 3_000), st.sampled_from([-400, 0, 300, 1_000])),
        st.one_of(overdue, overdue, st.none(), st.just(timedelta(days=-3))),
    ),
    min_size=2,
    max_size=PEOPLE,
)


def begin(world: World, chosen: list[tuple[str, int, timedelta | None]]) -> Ledger:
    world.sql.execute("DELETE FROM users")
    ledger = Ledger(world, [])
    for number, (mode, balance, overdue_by) in enumerate(chosen):
        name = f"person-{number}"
        date = None if overdue_by is None else ledger.now() - overdue_by
        id_ = world.user(name, plan_code=f"rolling-{mode}", credit_balance=balance, due_in=None)
        world.restore("UPDATE users SET next_refresh_at = %s WHERE id = %s", date, id_)
        ledger.people.append(Person(id_, name, mode, balance, date))
    return ledger


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(people, rounds)
def test_rollbacks_amid_anything_leave_what_a_ledger_says(
    world: World, chosen: list[tuple[str, int, timedelta | None]], going: list[Any]
) -> None:
    if not world.rows("SELECT FROM plans WHERE code = 'rolling-add'"):
        add_plans(world)
    ledger = begin(world, chosen)
    # At the end the next scan, which refreshes those whose window was given back.
    for refreshed, happened, undone in [*going, (("scan", 0, None), [], ("scan", 0, None))]:
        for what, who, value in [refreshed, *happened, undone]:
            ledger.happen(what, who, value)
        ledger.compare()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.sampled_from(MODES),
    st.integers(0, 2_000),
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=4),
)
def test_going_round_and_round_gains_nobody_anything(
    world: World, mode: str, balance: int, rounds: list[tuple[float, bool]]
) -> None:
    """Of one window nobody keeps more than its amount; where grants add, the round trip leaves no trace at all."""
    if not world.rows("SELECT FROM plans WHERE code = 'rolling-add'"):
        add_plans(world)
    ledger = begin(world, [(mode, balance, timedelta(minutes=10))])
    (person,) = ledger.people
    run = refresh(world)
    for share, allow_negative in rounds:
        before = int(world.see(person.id)["credit_balance"] * (1 - share))
        world.sql.execute("UPDATE users SET credit_balance = %s WHERE id = %s", (before, person.id))
        roll_back(world, run, reopen=True, allow_negative=allow_negative)
        run = refresh(world)
        after = world.see(person.id)["credit_balance"]
        kept = world.value("SELECT sum(credits_added) FROM credit_refresh_histories WHERE user_id = %s", person.id)
        assert kept <= AMOUNT
        assert after >= 0
        assert after == before or mode != "add"
        assert after <= max(before, AMOUNT) or mode == "rollover"
