"""What one user's refresh costs each part of the service: the figures that docs/scaling.md computes with."""

from __future__ import annotations

import statistics
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest.mock import patch

import click
import psutil

from bench import service
from bench.report import benchmark
from bench.worlds import Worlds, verify
from db import Database, one
from refresh import delivery

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

    from embedded import Servers

_WRITTEN = """
SELECT pg_current_wal_insert_lsn() - '0/0',
    (SELECT sum(pg_relation_size(relid)) FROM pg_partition_tree('credit_refresh_histories')),
    (SELECT sum(pg_indexes_size(relid)) FROM pg_partition_tree('credit_refresh_histories')),
    (SELECT sum(pg_relation_size(relid)) FROM pg_partition_tree('credit_audit_logs')),
    (SELECT sum(pg_indexes_size(relid)) FROM pg_partition_tree('credit_audit_logs')),
    pg_total_relation_size('credit_refresh_batches')
"""
_WRITES = ("WAL", "history rows", "history indexes", "audit rows", "audit indexes", "batch rows")


@dataclass
class _Spent:
    """Of one repetition: CPU seconds by part, and bytes by what was written."""

    cpu: dict[str, float] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)


@click.command()
@click.option("--users", default=100_000, show_default=True, type=click.IntRange(1_000), help="Users, all of them due.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1))
def costs(users: int, repetitions: int) -> None:
    """What a refresh costs PostgreSQL, the workers and Redis: CPU, WAL and disk, per user.

    Needs servers of its own: it reads their processes' CPU time.
    """
    with benchmark("costs") as (running, report):
        if not running.processes:
            raise click.ClickException("this benchmark reads CPU times of its own servers: unset DATABASE_URL")
        worlds = Worlds(running, users)
        ways = {"several batches a message": delivery.MESSAGE_IDS_MAX, "one batch a message": 1}
        spent: dict[str, list[_Spent]] = {way: [] for way in ways}
        for _ in range(repetitions):
            for way, ids_a_message in ways.items():
                with worlds.copy() as url:
                    spent[way].append(_refresh(running, url, ids_a_message))
                    verify(url, users)
        cpu = [
            {"part": part, **{way: f"{_median(spent[way], 'cpu', part) / users * 1e6:.1f}" for way in ways}}
            for part in (*running.processes, "workers", "scan and publishing")
        ]
        report.table(f"CPU, microseconds per user, {users:,} due users", cpu)
        first = spent["several batches a message"]
        report.table(
            f"Written, bytes per user, {users:,} due users",
            [{"what": what, "bytes": f"{_median(first, 'written', what) / users:,.0f}"} for what in _WRITES],
        )
        report.figures("spent", {way: [vars(one_of) for one_of in spent[way]] for way in ways})


def _median(spent: list[_Spent], kind: str, name: str) -> float:
    return float(statistics.median(getattr(repetition, kind)[name] for repetition in spent))


def _refresh(running: Servers, url: str, ids_a_message: int) -> _Spent:
    spent = _Spent()
    with service.workers(running, url) as supervisor, Database(url, "credits").statements() as connection:
        groups = {name: psutil.Process(process.pid) for name, process in running.processes.items()}
        before = _written(connection)
        with _cpu(spent.cpu, groups), patch.object(delivery, "MESSAGE_IDS_MAX", ids_a_message):
            scanned = service.scan(url)
            service.run_seconds(url, scanned.run_id, supervisor)
        after = _written(connection)
    spent.written = {name: after[name] - before[name] for name in _WRITES}
    return spent


def _written(connection: psycopg.Connection[tuple[float, ...]]) -> dict[str, float]:
    row = one(connection.execute(_WRITTEN))
    return {name: float(value) for name, value in zip(_WRITES, row, strict=True)}


@contextmanager
def _cpu(seconds: dict[str, float], servers: dict[str, psutil.Process]) -> Iterator[None]:
    """Adds what each server, the workers and this process spend in the block. Workers are this process's children."""
    own = psutil.Process()
    apart = {process.pid for process in servers.values()}

    def read() -> dict[str, float]:
        workers = [child for child in own.children() if child.pid not in apart]
        return {
            **{name: _tree(process) for name, process in servers.items()},
            "workers": sum(_tree(worker) for worker in workers),
            "scan and publishing": sum(own.cpu_times()[:2]),
        }

    before = read()
    yield
    seconds.update({name: value - before[name] for name, value in read().items()})


def _tree(process: psutil.Process) -> float:
    """CPU seconds of a process and all below it, those that have ended included."""
    spent = float(sum(process.cpu_times()[:4]))
    for child in process.children():
        try:
            spent += _tree(child)
        except psutil.NoSuchProcess:
            continue  # in the parent's own times from now on
    return spent
