"""A soak: thousands of runs on the same processes, and what these hold on to: memory, connections, descriptors."""

from __future__ import annotations

import math
import socket
import statistics
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import combinations
from threading import Event
from typing import TYPE_CHECKING, Any, LiteralString
from uuid import UUID

import click
import psutil

from bench.report import benchmark
from bench.service import PATIENCE_SECONDS
from bench.worlds import DUE_NOW, Worlds
from cli.output import err
from cli.processes import Service
from db import Database, one
from embedded import Servers
from embedded.processes import Supervisor
from refresh import rollback, runs, verify
from refresh.selection import Selection
from tasks.app import app, use_broker
from tasks.publish import publish_asked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import psycopg

    from bench.report import Report

BAR_MB = 1.0
"""Memory may grow by so much in 1,000 runs: 170 MB in a year of a run every three minutes."""
INTERVAL = timedelta(seconds=1)
"""Of beat, an hour elsewhere."""
WORKERS = ("worker1", "worker2")
WARM_UP_RUNS = 20
REST_SECONDS = 3.0
"""Of looks at processes that have nothing to do but beat's empty scans. The lowest is what they hold on to: a scan has
a connection more for its milliseconds."""
_REST_INTERVAL_SECONDS = 0.1
_POLL_SECONDS = 0.03
_MB = 1e6

# Every fifth user has the plan pro, and is refreshed by operators alone.
_DUE = f"CASE WHEN {{n}} % 5 = 0 THEN now() + interval '10 days' ELSE {DUE_NOW} END"
_PRO = Selection(plan="pro")

_DONE = "SELECT count(*) FROM credit_refresh_runs WHERE users_selected > 0 AND finished_at IS NOT NULL"
_KINDS = """
SELECT
    CASE
        WHEN slot IS NOT NULL THEN 'scheduled'
        WHEN work = 'rollback' AND (selection ->> 'reopen')::boolean THEN 'rollback, due again'
        WHEN work = 'rollback' THEN 'rollback'
        WHEN dry_run THEN 'dry' ELSE 'bulk'
    END AS kind,
    count(*), sum(users_selected)
FROM credit_refresh_runs
WHERE users_selected > 0
GROUP BY 1 ORDER BY 1
"""
_GRANTED = """
SELECT r.id
FROM credit_refresh_runs AS r
WHERE r.slot IS NOT NULL AND r.users_refreshed > 0
    AND NOT EXISTS (SELECT FROM credit_refresh_runs AS b WHERE b.parent_run_id = r.id AND b.kind = 'rollback')
ORDER BY r.created_at LIMIT 1
"""
_ENDED = "SELECT id FROM credit_refresh_runs WHERE id = %(run_id)s AND finished_at IS NOT NULL"
_BACKENDS = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'credits-worker'
"""


@dataclass(frozen=True)
class Look:
    """What was held at an instant.

    Attributes:
        runs: that were done by then.
        memory: megabytes that each process has allocated itself: resident, without files and shared buffers.
        held: connections, file descriptors and threads.
    """

    runs: int
    memory: dict[str, float]
    held: dict[str, int]


class _Observer:
    """Looks at the service's processes, which are our children, and asks the servers.

    Args:
        running: the servers.
        database: of the soak.
    """

    def __init__(self, running: Servers, database: Database) -> None:
        self._database = database
        self._local = "postgres" in running.processes
        self._processes: dict[str, psutil.Process] = {}
        if "redis" in running.processes:
            self._processes["Redis"] = psutil.Process(running.processes["redis"].pid)
        for child in psutil.Process().children():
            words = child.cmdline()
            if "tasks" in words:  # celery -A tasks …
                kind = words[words.index("tasks") + 1]
                self._processes[words[words.index("--hostname") + 1].split("@")[0] if kind == "worker" else kind] = (
                    child
                )

    def look(self) -> Look:
        with self._database.statements() as connection:
            done = _runs_done(connection)
            backends = [pid for (pid,) in connection.execute(_BACKENDS)]
        memory, held = self._servers(backends)
        for name, process in self._processes.items():
            with process.oneshot():
                memory[name] = _allocated(process)
                held[f"{name}: descriptors"] = process.num_fds()
                held[f"{name}: threads"] = process.num_threads()
        return Look(done, memory, held)

    def _servers(self, backends: Sequence[int]) -> tuple[dict[str, float], dict[str, int]]:
        with app.connection_for_read() as broker:
            channel: Any = broker.default_channel
            memory = {"Redis: used_memory": channel.client.info("memory")["used_memory"] / _MB}
            held = {"Redis: connections": len(channel.client.client_list())}
        held["PostgreSQL: connections of workers and beat"] = len(backends)
        if self._local and backends:
            with suppress(psutil.NoSuchProcess):  # it was replaced by another in between
                memory["PostgreSQL: largest backend"] = max(_allocated(psutil.Process(pid)) for pid in backends)
        return memory, held

    def rest(self) -> Look:
        """The lowest of each while nobody asks for anything."""
        looks = []
        until = time.monotonic() + REST_SECONDS
        while time.monotonic() < until:
            looks.append(self.look())
            time.sleep(_REST_INTERVAL_SECONDS)
        return Look(
            looks[-1].runs,
            {name: min(look.memory.get(name, math.inf) for look in looks) for name in looks[-1].memory},
            {name: min(look.held[name] for look in looks) for name in looks[-1].held},
        )


class _Operators:
    """Two operators, each of whom asks for a run as soon as the one before has ended.

    Args:
        url: the database.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url, "credits", pool=2)
        self._until_runs = 0
        self._stopped = Event()

    def work(self, until_runs: int, meanwhile: Callable[[], None], interval_seconds: float) -> None:
        """Until so many runs are done in all; looks are taken meanwhile."""
        self._until_runs = until_runs
        self._stopped.clear()
        with ThreadPoolExecutor(2) as pool:
            working = [pool.submit(self._take_back_beats_runs), pool.submit(self._dry_bulk_take_back)]
            try:
                while True:
                    done, going_on = wait(working, timeout=interval_seconds, return_when=FIRST_EXCEPTION)
                    for operator in done:
                        operator.result()
                    if not going_on:
                        return
                    meanwhile()
            finally:
                self._stopped.set()

    def close(self) -> None:
        self._database.close()

    def _take_back_beats_runs(self) -> None:
        """Take each scheduled run back, so that its users are due again; the last one stays."""
        while run_id := self._await(_GRANTED):
            if self._enough():
                return
            self._take_back(run_id, reopen=True)

    def _dry_bulk_take_back(self) -> None:
        """A dry run, a bulk run of the same users, due or not, and its rollback, again and again."""
        request = runs.Request("cli", "operator", 20, force=True, reason="soak")
        while not self._enough():
            self._carry_out(partial(runs.open_run, request=replace(request, dry_run=True), asked=_PRO))
            self._take_back(self._carry_out(partial(runs.open_run, request=request, asked=_PRO)), reopen=False)

    def _take_back(self, run_id: UUID, *, reopen: bool) -> None:
        asked = rollback.Asked(run_id=run_id, reopen=reopen)
        request = asked.request(runs.Request("cli", "operator", 100, reason="soak"))
        self._carry_out(partial(rollback.open_rollback, request=request, asked=asked))

    def _carry_out(self, open_: Callable[[psycopg.Connection[Any]], runs.Opened | runs.NotOpened]) -> UUID:
        """Open a run, publish it and stay to its end, as a command with --wait does."""
        with self._database.transaction(lock_timeout=runs.OPENING_LOCK_TIMEOUT) as connection:
            opened = open_(connection)
        if not isinstance(opened, runs.Opened):
            raise SystemExit(opened.text)
        publish_asked(self._database, opened.run_id, max_attempts=5)
        self._await(_ENDED, opened.run_id)
        return opened.run_id

    def _await(self, query: LiteralString, run_id: UUID | None = None) -> UUID | None:
        """The run that the query finds, once it does; None when there is to be no more waiting."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._stopped.wait(_POLL_SECONDS):
            with self._database.statements() as connection:
                for (found,) in connection.execute(query, {"run_id": run_id}):
                    return UUID(str(found))
            if time.monotonic() > deadline:
                raise SystemExit("the soak's workers did not do it: no end in sight")
        return None

    def _enough(self) -> bool:
        with self._database.statements() as connection:
            return self._stopped.is_set() or _runs_done(connection) >= self._until_runs


@contextmanager
def _service(running: Servers, url: str, *, flower: bool) -> Iterator[Supervisor]:
    """Workers, beat and perhaps Flower over a database."""
    servers = Servers(database_url=url, redis_url=running.redis_url, state=running.state)
    variables = {
        "CREDIT_REFRESH_INTERVAL_SECONDS": f"{INTERVAL.total_seconds():.0f}",
        "CREDIT_REFRESH_TASK_EVENTS": str(flower).lower(),
        "LOG_LEVEL": "WARNING",
    }
    with Supervisor() as supervisor:
        service = Service(supervisor, servers, logs=running.state, **variables)
        for name in WORKERS:
            service.start_worker(name)
        service.start_beat()
        if flower:
            service.start_flower(_free_port(), "credits:soak")
        use_broker(running.redis_url)
        if app.conf.broker_write_url != running.redis_url:
            raise SystemExit("CELERY_BROKER_URL is set, and Celery would publish there: unset it")
        yield supervisor


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _runs_done(connection: psycopg.Connection[Any]) -> int:
    return int(one(connection.execute(_DONE))[0])


def _allocated(process: psutil.Process) -> float:
    memory: Any = process.memory_info()
    return float(memory.rss - memory.shared) / _MB


def _verify(database: Database) -> None:
    """What was refreshed by leaking processes, or by sound ones, is to be right."""
    found: list[verify.Finding] = []
    with database.transaction() as connection:
        verify.verify(connection, verify.Terms(INTERVAL, None), limit=10, on_finding=found.append)
    if found:
        raise SystemExit("the books are wrong: " + "; ".join(f"{one.about}: {one.text}" for one in found))


def _tell(
    report: Report, looks: Sequence[Look], warm: int, rests: Sequence[Look], kinds: Sequence[Mapping[str, object]]
) -> None:
    """Tables, plots and figures.

    Args:
        report: where to.
        looks: all, in order.
        warm: how many of them belong to the warm-up.
        rests: after the warm-up and in the end.
        kinds: runs by their kind.
    """
    after = looks[warm:]
    report.table("Runs with users", kinds)
    report.table(
        f"Memory in MB from run {after[0].runs:,} to {after[-1].runs:,}, after the warm-up",
        [_memory_row(name, after) for name in after[0].memory],
    )
    report.table("Held at rest, after the warm-up and in the end", [_held_row(name, rests) for name in rests[0].held])
    title = f"Two workers, beat and servers through {after[-1].runs:,} runs"
    report.lines(
        "memory", title, ("runs", "MB"),
        {name: [(look.runs, look.memory[name]) for look in looks if name in look.memory] for name in after[0].memory},
    )  # fmt: skip
    for what in ("connections", "descriptors"):
        report.lines(
            what, title, ("runs", what),
            {name: [(look.runs, look.held[name]) for look in looks] for name in after[0].held if what in name},
        )  # fmt: skip
    report.figures("looks", [asdict(look) for look in looks])
    report.figures("rests", [asdict(look) for look in rests])


def _memory_row(name: str, looks: Sequence[Look]) -> dict[str, object]:
    points = [(look.runs, look.memory[name]) for look in looks if name in look.memory]
    # Theil and Sen's line: a step that comes once, as when a backend plans anew after an ANALYZE, does not tilt it.
    slopes = [
        (mb - before_mb) / (done - before)
        for (before, before_mb), (done, mb) in combinations(points, 2)
        if done > before
    ]
    growth = 1_000 * statistics.median(slopes)
    tenth = max(1, len(points) // 10)
    return {
        "process": name,
        "first tenth": f"{statistics.median(megabytes for _, megabytes in points[:tenth]):.2f}",
        "last tenth": f"{statistics.median(megabytes for _, megabytes in points[-tenth:]):.2f}",
        "growth in 1,000 runs": f"{growth:+.2f}",
        "bar": f"≤ {BAR_MB:g}",
        "it": "grows" if growth > BAR_MB else "is flat",
    }


def _held_row(name: str, rests: Sequence[Look]) -> dict[str, object]:
    first, last = (rest.held[name] for rest in rests)
    return {"what": name, "at first": first, "at last": last, "it": "grows" if last > first else "is flat"}


@click.command()
@click.option(
    "--runs",
    "all_runs",
    default=2_000,
    show_default=True,
    type=click.IntRange(3 * WARM_UP_RUNS),
    help="With users, in all.",
)
@click.option("--users", default=500, show_default=True, type=click.IntRange(100), help="In the table.")
@click.option("--interval", default=2.0, show_default=True, type=click.FloatRange(0.1), help="Seconds between looks.")
@click.option("--flower", is_flag=True, help="Flower as well, and the task events that it needs.")
def soak(*, all_runs: int, users: int, interval: float, flower: bool) -> None:
    """What two workers, beat and the servers hold on to through runs: memory, connections, file descriptors.

    Beat rings each second, and one operator takes its runs back, so that their users are due again; another one asks
    for a dry run, a bulk run and its rollback in turn. The first tenth is the warm-up. In the end the books are
    verified.
    """
    with benchmark("soak") as (running, report), ExitStack() as stack:
        worlds = Worlds(running, users, name="soak", due=_DUE)
        stack.callback(worlds.drop)
        database = Database(worlds.template_url, "credits", name="soak", pool=2)
        stack.callback(database.close)
        with _service(running, worlds.template_url, flower=flower) as supervisor:
            observer = _Observer(running, database)
            operators = _Operators(worlds.template_url)
            stack.callback(operators.close)
            looks: list[Look] = []

            def look() -> None:
                if ended := supervisor.check():
                    raise SystemExit(f"a process of the soak has ended: {ended}")
                looks.append(observer.look())
                megabytes, held = sum(looks[-1].memory.values()), sum(looks[-1].held.values())
                err.print(
                    f"{looks[-1].runs}/{all_runs}: {megabytes:.1f} MB, {held} connections, descriptors and threads",
                    highlight=False,
                )

            operators.work(max(WARM_UP_RUNS, all_runs // 10), look, interval)
            rests = [observer.rest()]
            warm = len(looks)
            look()
            operators.work(all_runs, look, interval)
            look()
            rests.append(observer.rest())
        _verify(database)
        with database.statements() as connection:
            kinds = [{"runs": kind, "number": n, "users": int(m)} for kind, n, m in connection.execute(_KINDS)]
        _tell(report, looks, warm, rests, kinds)
