"""`credits demo`: the main job on sample users, by real servers, workers and beat."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from psycopg.rows import dict_row

import embedded
import settings
from cli.database import migrate
from cli.output import err, facts, out, progress, table
from cli.processes import Service
from cli.sample import write_sample
from db import Database, DatabaseError, one
from embedded.processes import Supervisor, unwind_on_signals
from refresh import totals
from refresh.import_file import UserFile
from refresh.imports import import_users

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    import psycopg

WORKERS = 2
INTERVAL_SECONDS = 8
"""Beat's interval and the width of a slot here; an hour elsewhere."""
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.02


@click.command()
@click.option("--users", default=10_000, show_default=True, type=click.IntRange(1, 10_000_000), help="Sample users.")
@click.option("--keep", is_flag=True, help="Leave the servers running afterwards, until Ctrl-C, to look around.")
def demo(*, users: int, keep: bool) -> None:
    """Import sample users, let beat fire a scan, have real workers refresh them, and show what happened.

    PostgreSQL and Redis are started for it in a folder of their own under .state, and stopped at the end. Nothing
    that you have is touched. Beat fires every 8 seconds here instead of every hour.
    """
    unwind_on_signals()
    loaded = settings.load()
    with embedded.servers("demo", loaded.credits_state_dir, fresh=True) as running:
        database = Database(running.database_url, loaded.database_schema)
        _say("Started PostgreSQL and Redis; creating the tables")
        migrate(database)
        sample = running.state / "users.csv"
        write_sample(sample, users, datetime.now(UTC))
        _import(database, sample)
        with Supervisor() as supervisor:
            service = Service(
                supervisor,
                running,
                logs=running.state,
                CREDIT_REFRESH_INTERVAL_SECONDS=str(INTERVAL_SECONDS),
                CREDIT_REFRESH_ENABLED="true",
                CREDIT_REFRESH_DRY_RUN="false",
                CREDIT_REFRESH_MAX_USERS_PER_SECOND="0",
            )
            _say(f"Starting beat and {WORKERS} workers; logs are in {running.state}")
            service.start_beat()
            for number in range(1, WORKERS + 1):
                service.start_worker(f"worker{number}")
            _show(database, supervisor)
            if keep:
                _say(f"DATABASE_URL='{running.database_url}' REDIS_URL='{running.redis_url}' until Ctrl-C")
                supervisor.wait()


def _import(database: Database, sample: Path) -> None:
    with sample.open("rb") as file, progress(in_bytes=True) as bar, database.transaction() as connection:
        rows = UserFile(file, str(sample))
        task = bar.add_task("Importing", total=rows.size)
        import_users(connection, rows, actor="demo", on_progress=lambda _stage, read: bar.update(task, completed=read))


def _show(database: Database, supervisor: Supervisor) -> None:
    with database.statements() as connection:
        first = _await_run(connection, supervisor, after=None)
        done = _follow(connection, supervisor, first)
        _summarise(done)
        _one_user(connection, first)
        _say(f"Waiting for the next slot ({INTERVAL_SECONDS} s wide here): whoever was refreshed is not due again")
        second = _follow(connection, supervisor, _await_run(connection, supervisor, after=first))
        out.print(
            f"Second scan: run {second.run_id}, slot {_clock(second)}, {second.status}, "
            f"{second.users_selected} users selected.",
            soft_wrap=True,
        )
        if (done.status, second.status, second.users_selected) != ("succeeded", "succeeded", 0):
            raise DatabaseError("The demo did not end as it should: see the logs named above.")


def _await_run(connection: psycopg.Connection[Any], supervisor: Supervisor, *, after: UUID | None) -> UUID:
    """The id of the run that beat's next scan opens."""
    query = """
        SELECT id FROM credit_refresh_runs
        WHERE source = 'beat' AND created_at > coalesce(
            (SELECT created_at FROM credit_refresh_runs WHERE id = %(after)s::uuid), '-infinity')
        ORDER BY created_at LIMIT 1
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (row := connection.execute(query, {"after": after}).fetchone()) is None:
        _check(supervisor, deadline)
        time.sleep(POLL_SECONDS)
    run_id: UUID = row[0]
    return run_id


def _follow(connection: psycopg.Connection[Any], supervisor: Supervisor, run_id: UUID) -> totals.Progress:
    deadline = time.monotonic() + PATIENCE_SECONDS
    with progress() as bar:
        task = bar.add_task("Refreshing", total=None, visible=False)
        while True:
            run = totals.read_progress(connection, run_id)
            bar.update(task, total=run.users_selected, completed=run.users_done, visible=run.users_selected > 0)
            if run.status != "running":
                return run
            _check(supervisor, deadline)
            time.sleep(POLL_SECONDS)


def _check(supervisor: Supervisor, deadline: float) -> None:
    ended = supervisor.check()
    if ended is not None:
        raise DatabaseError(f"{ended}: its log, in the folder named above, says why.")
    if time.monotonic() > deadline:
        raise DatabaseError(f"Nothing came of it in {PATIENCE_SECONDS:.0f} seconds: see the logs named above.")


def _summarise(run: totals.Progress) -> None:
    out.print(
        facts(
            "The run",
            {
                "run": run.run_id,
                "opened by": f"{run.source}, for the slot {_clock(run)}",
                "status": run.status,
                "users due": run.users_selected,
                "refreshed": run.users_refreshed,
                "held": run.users_held,
                "failed": run.users_failed,
                "credits granted": run.credits_granted,
                "seconds": f"{run.seconds:.2f}",
                "users per second": round(run.users_selected / run.seconds),
            },
        )
    )


def _one_user(connection: psycopg.Connection[Any], run_id: UUID) -> None:
    """The rows that a refresh leaves behind, for the user who got most."""
    (user_id, external_id) = one(
        connection.execute(
            """
            SELECT h.user_id, u.external_id FROM credit_refresh_histories AS h JOIN users AS u ON u.id = h.user_id
            WHERE h.run_id = %s AND h.status = 'refreshed' ORDER BY h.credits_added DESC, h.user_id LIMIT 1
            """,
            (run_id,),
        )
    )
    with connection.cursor(row_factory=dict_row) as cursor:
        history = cursor.execute(
            """
            SELECT status, plan_code AS plan, old_balance AS before, credits_added AS added,
                new_balance AS after,
                to_char(window_start, 'DD Mon HH24:MI') || ' to ' || to_char(window_end, 'DD Mon HH24:MI') AS window
            FROM credit_refresh_histories WHERE user_id = %s ORDER BY id
            """,
            (user_id,),
        ).fetchall()
        audit = cursor.execute(
            """
            SELECT actor, action, balance_before AS before, credits, balance_after AS after,
                to_char(occurred_at, 'DD Mon HH24:MI:SS') AS occurred_at
            FROM credit_audit_logs WHERE user_id = %s ORDER BY occurred_at, id
            """,
            (user_id,),
        ).fetchall()
    out.print(table(f"History of {external_id}", history))
    out.print(table(f"Audit log of {external_id}", audit))


def _clock(run: totals.Progress) -> str:
    return run.slot.strftime("%H:%M:%S") if run.slot else "none"


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, markup=False)
