"""The engine: one fault after the other, in an order that the seed decides, under load, with a look at the books.

arena → users → load → (a fault → its end → everybody who was due then is refreshed → the checker looks) … → no more
load → all work done → beats and workers stopped → the checker looks for the last time
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Self

import psycopg

from cli.output import err
from tests.faults import checker, population, recovery, witness
from tests.faults.breaks import BREAKS
from tests.faults.checker import Finding
from tests.faults.faults.catalogue import FAULTS
from tests.faults.faults.kinds import Hits
from tests.faults.host import Host
from tests.faults.load import Desk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.faults.arena import Arena

OPERATORS = 2
WATCH_SECONDS = 0.2
LOOK_SECONDS = 5.0
"""With a guard taken out, the checker looks as often as this, and the first finding that was expected ends the run."""
BROKEN_LIMIT_SECONDS = 60.0
"""And recovery need not be waited for so long: with all guards in their place it takes 35 s at most."""
LAST_ROUNDS = 3
AIMED_AGAIN_MAX = 3
"""So often a fault that has hit nothing yet, or not all that it is meant to, is injected once more at the end."""


# For the report: each query gives names and numbers.
_DONE = (
    """
    SELECT format('asked: %s, exit code %s', what, coalesce(exit_code::text, 'none')), count(*)
    FROM host.asked GROUP BY what, exit_code ORDER BY 1
    """,
    "SELECT 'asked again, as no answer came', coalesce(sum(attempts - 1), 0)::int FROM host.asked WHERE attempts > 1",
    """
    SELECT format('runs: %s of %s', status, CASE WHEN slot IS NULL THEN 'operators' ELSE 'beat' END), count(*)
    FROM credits.credit_refresh_runs WHERE users_selected > 0 GROUP BY 1 ORDER BY 1
    """,
    """
    SELECT format('users %s by %s', status, source), count(*)
    FROM credits.credit_refresh_histories GROUP BY 1 ORDER BY 1
    """,
    "SELECT 'batches tried more than once', count(*) FROM credits.credit_refresh_batches WHERE attempts > 0",
    "SELECT 'refused by the unique key', count(*) FROM credits.credit_audit_logs WHERE action = 'already_granted'",
)


class EnoughError(Exception):
    """The run may end: a guard was taken out, and that was found."""


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault, once.

    Attributes:
        began_seconds: since the load began.
        lasted_seconds: until it had healed what it broke.
        hits: what it hit, and how often.
        users_due: when it had ended.
        recovery_seconds: until the last of them was refreshed; None: not within the limit.
    """

    name: str
    began_seconds: float
    lasted_seconds: float
    hits: dict[str, int]
    users_due: int
    recovery_seconds: float | None


@dataclass(slots=True)
class Story:
    """What happened in a run of the suite.

    Attributes:
        aims: of each fault that ran, what it is meant to hit.
        not_run: faults that cannot run here, with the reason.
        did: what the load did, and how often things were started again.
        ended: it came to its end; else it was cut, and what it did not find says nothing.
    """

    seed: int
    minutes: float
    broken: str | None
    injections: list[Injection] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    aims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    did: dict[str, int] = field(default_factory=dict)
    ended: bool = False

    def find(self, rule: str, text: str) -> None:
        """Note a finding, once."""
        finding = Finding(rule, text)
        if finding not in self.findings:
            self.findings.append(finding)


class Engine:
    """Runs the suite once.

    Args:
        arena: started.
        story: what it writes to, which its caller reads whatever happens.
        only: the faults to choose from; empty: all of them.
    """

    def __init__(self, arena: Arena, story: Story, only: Sequence[str]) -> None:
        self._arena = arena
        self._story = story
        self._url = arena.admin_url
        self._names = only or (BREAKS[story.broken].faults if story.broken else tuple(FAULTS))
        self._random = Random(story.seed)  # noqa: S311
        self._began = 0.0
        self._looked = 0.0
        self._host: Host | None = None
        self._desk: Desk | None = None
        self._watch: _Watch | None = None

    def run(self) -> None:
        """Everything, from the first user to the last look at the books."""
        seconds = 60 * self._story.minutes
        with psycopg.connect(self._url, autocommit=True) as connection:
            population.prepare(connection)
            witness.install(connection)
            if self._story.broken:
                connection.execute(BREAKS[self._story.broken].sql)
            users = population.fill(connection, self._random, seconds=seconds)
        arena = self._arena
        for number in range(1, OPERATORS + 1):
            name = f"operator{number}"
            program = [sys.executable, "-m", "tests.faults.operator", "--host", arena.host_url, "--name", name]
            arena.operators.append(arena.keep(name, program))
        with ExitStack() as stack:
            self._watch = stack.enter_context(_Watch(self._url))
            self._host = stack.enter_context(Host(arena.host_url, self._story.seed, users))
            self._desk = stack.enter_context(Desk(arena.host_url, arena.logs, self._story.seed, users))
            self._began = self._looked = time.monotonic()
            try:
                self._inject(seconds)
                self._rest()
                self._find_misses()
            except EnoughError:
                pass
            self._story.ended = True
            self._tell_what_was_done()

    def _inject(self, seconds: float) -> None:
        self._recover("(none)", 0.0, 0.0, Hits())
        numbers = count()
        for name in self._timetable():
            if self._elapsed() >= seconds:
                break
            self._inject_one(next(numbers), name)
        for _ in range(AIMED_AGAIN_MAX):
            for name in dict.fromkeys(name for name, _aim in self._missed()):
                self._inject_one(next(numbers), name)
        while self._elapsed() < seconds:  # there is no fault to inject
            time.sleep(recovery.POLL_SECONDS)
            self._look()

    def _inject_one(self, number: int, name: str) -> None:
        began, hits = self._elapsed(), Hits()
        FAULTS[name].run(self._arena, Random(f"{self._story.seed}/{number}/{name}"), hits)  # noqa: S311
        self._recover(name, began, self._elapsed() - began, hits)

    def _timetable(self) -> Iterator[str]:
        """Each fault once, in a shuffled round, then the next round."""
        here: list[str] = []
        for name in self._names:
            reason = FAULTS[name].unavailable(self._arena)
            if reason is None:
                here.append(name)
                self._story.aims[name] = FAULTS[name].aims
            else:
                self._story.not_run[name] = reason
        while here:
            yield from self._random.sample(here, len(here))

    def _recover(self, name: str, began: float, lasted: float, hits: Hits) -> None:
        limit = recovery.LIMIT_SECONDS if self._story.broken is None else BROKEN_LIMIT_SECONDS
        found = recovery.await_recovery(self._url, self._look, limit_seconds=limit)
        self._story.injections.append(Injection(name, began, lasted, dict(hits.counts), found.users, found.seconds))
        how = f"recovered in {found.seconds:.1f} s" if found.seconds is not None else "not recovered"
        what = ", ".join(
            [f"{name}: lasted {lasted:.1f} s", *(f"{times} {what}" for what, times in hits.counts.items())]
        )
        err.print(f"{began:6.0f} s  {what}; {found.users:,} users due, {how}", soft_wrap=True)
        bound = FAULTS[name].bound_seconds if name in FAULTS and self._story.broken is None else limit
        if found.seconds is None:
            text = f"{found.left} of {found.users} users were not refreshed {limit:.0f} s after {name}"
            self._story.find("recovery", text)
        elif found.seconds > bound:
            text = f"{found.users} users were refreshed {found.seconds:.1f} s after {name}; its bound is {bound:.0f} s"
            self._story.find("recovery", text)
        self._check(finished=False)
        self._look()

    def _rest(self) -> None:
        """End the load, let the service finish, stop it, and look for the last time."""
        assert self._host is not None
        assert self._desk is not None
        self._host.stop()
        self._desk.stop()
        for _ in range(LAST_ROUNDS):
            undone = recovery.await_rest(self._url, self._look)
            self._stop_service()
            # A message that was on its way may have opened a run after all.
            runs_running = recovery.look_once(self._url).runs_running
            if not undone.nothing or not runs_running:
                break
            self._start_service()
        if not undone.nothing:
            self._story.find("recovery", f"at the end, with no more load and no more faults: {undone}")
        self._check(finished=True)

    def _missed(self) -> list[tuple[str, str]]:
        """The faults that have run and what they have never hit."""
        hits: dict[str, Counter[str]] = {}
        for injection in self._story.injections:
            hits.setdefault(injection.name, Counter()).update(injection.hits)
        return [
            (name, aim)
            for name, aims in self._story.aims.items()
            if name in hits
            for aim in aims
            if not hits[name][aim]
        ]

    def _find_misses(self) -> None:
        """A fault that never hits what it is aimed at shows nothing."""
        for name, aim in self._missed():
            self._story.find("aim", f"{name} never hit {aim}")

    def _stop_service(self) -> None:
        for group in (self._arena.beats, self._arena.workers):
            for kept in group:
                kept.hold()
                kept.signal(signal.SIGTERM)
            for kept in group:
                kept.wait_down()

    def _start_service(self) -> None:
        for kept in (*self._arena.workers, *self._arena.beats):
            kept.release()

    def _check(self, *, finished: bool) -> None:
        with psycopg.connect(self._url, autocommit=True, application_name="checker") as connection:
            for finding in checker.check(connection, finished=finished):
                self._story.find(finding.rule, finding.text)
        self._looked = time.monotonic()

    def _look(self) -> None:
        """What is seen in passing, again and again.

        Raises:
            EnoughError: a guard was taken out, and that was found.
        """
        assert self._watch is not None
        helpers: tuple[Host | Desk | _Watch | None, ...] = (self._host, self._desk, self._watch)
        for helper in helpers:
            if helper is not None and helper.error is not None:
                raise RuntimeError("the suite itself failed") from helper.error
        for finding in self._watch.findings():
            self._story.find(finding.rule, finding.text)
        if self._story.broken is None:
            return
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._check(finished=False)
        if any(finding.rule in BREAKS[self._story.broken].rules for finding in self._story.findings):
            raise EnoughError

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _tell_what_was_done(self) -> None:
        assert self._host is not None
        did = self._story.did
        did.update({f"host: {what}": times for what, times in sorted(self._host.done.items())})
        with psycopg.connect(self._url, autocommit=True) as connection:
            for query in _DONE:
                did.update(connection.execute(query))  # names and numbers
        starts: Counter[str] = Counter()
        for kept in (*self._arena.workers, *self._arena.beats, *self._arena.operators):
            starts[f"{kept.name.rstrip('0123456789')}s started again"] += kept.restarts
        did.update(starts)


class _Watch:
    """Looks every 0.2 s for what can only be seen while it happens.

    Args:
        url: of the database, past the proxies.
    """

    def __init__(self, url: str) -> None:
        self.error: BaseException | None = None
        self._url = url
        self._found: list[Finding] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopping.set()
        self._thread.join()

    def findings(self) -> list[Finding]:
        """What was found so far."""
        return list(self._found)

    def _work(self) -> None:
        try:
            while not self._stopping.wait(WATCH_SECONDS):
                try:
                    with psycopg.connect(
                        self._url, autocommit=True, application_name="watch", connect_timeout=5
                    ) as connection:
                        while not self._stopping.wait(WATCH_SECONDS):
                            self._found += checker.watch(connection)
                except psycopg.OperationalError:
                    continue  # it restarts
        except BaseException as error:
            self.error = error
            raise
