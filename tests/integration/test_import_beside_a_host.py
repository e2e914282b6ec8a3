"""What an import does to users: beside a busy host, after grants, and where it has to wait."""

from __future__ import annotations

import io
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from refresh.errors import RefusedError
from refresh.import_file import UserFile
from refresh.imports import BadRowsError, Reject, Report, import_users
from tests.integration.imports import load, users

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.world import World


def test_an_empty_balance_leaves_a_known_users_as_it_is(world: World) -> None:
    world.user("ada")
    report = load(world, "external_id,credit_balance,active\nada,,no\n")
    assert report.changed == 1
    assert (users(world)["ada"]["credit_balance"], users(world)["ada"]["active"]) == (400, False)


def test_a_file_of_ids_alone_changes_nobody_and_a_header_alone_is_an_empty_import(world: World) -> None:
    world.user("ada")
    assert load(world, "external_id\nada\n") == Report(0, 0, 1, 0, 0, 0)
    assert load(world, "external_id\n") == Report(0, 0, 0, 0, 0, 0)


def test_bad_rows_raise_where_nobody_takes_them(world: World) -> None:
    with pytest.raises(BadRowsError, match="2 bad rows, the first in line 2") as caught:
        load(world, "external_id\nu1\nu2\n")
    assert caught.value.bad == 2
    rejects: list[Reject] = []
    report = load(world, "external_id\nu1\nu2\n", on_reject=rejects.append)
    assert (report.users, report.bad) == (0, 2)
    assert [reject.cells for reject in rejects] == [["u1"], ["u2"]]


def test_a_date_moves_to_the_end_of_the_window_that_was_granted(world: World) -> None:
    """Importing last month's file again must not earn a second grant."""
    ada = world.user("ada")
    world.user("bob", due_in="10 days")
    old = world.see(ada)["next_refresh_at"]
    world.refresh()
    granted_until = world.see(ada)["next_refresh_at"]
    assert granted_until > old
    early, late = old + timedelta(days=7), granted_until + timedelta(days=7)
    columns = "external_id,next_refresh_at\n"
    assert load(world, f"{columns}ada,{early.isoformat()}\nbob,{early.isoformat()}\n") == Report(0, 1, 1, 0, 1, 0)
    assert world.see(ada)["next_refresh_at"] == granted_until
    assert users(world)["bob"]["next_refresh_at"] == early
    assert load(world, f"{columns}ada,{late.isoformat()}\n") == Report(0, 1, 0, 0, 0, 0)
    assert world.see(ada)["next_refresh_at"] == late
    # Not even by way of a date that was cleared.
    assert load(world, f"{columns}ada,\n").unscheduled == 1
    assert load(world, f"{columns}ada,{early.isoformat()}\n").kept == 1
    assert world.see(ada)["next_refresh_at"] == granted_until
    # What was rolled back counts no more.
    world.sql.execute("UPDATE credit_refresh_histories SET reversed_by_run_id = gen_random_uuid()")
    assert load(world, f"{columns}ada,{early.isoformat()}\n").kept == 0
    assert world.see(ada)["next_refresh_at"] == early


def test_a_grant_that_comes_while_the_import_waits_is_seen(world: World) -> None:
    ada = world.user("ada")
    due = world.see(ada)["next_refresh_at"]
    until, early = due + timedelta(days=30), due + timedelta(days=7)
    with world.host() as granting:
        granting.execute(
            "INSERT INTO credit_refresh_histories (source, user_id, status, window_start, window_end, old_balance,"
            " credits_added, new_balance) VALUES ('function', %s, 'refreshed', %s, %s, 400, 600, 1000)",
            (ada, due, until),
        )
        granting.execute("UPDATE users SET credit_balance = 1000, next_refresh_at = %s WHERE id = %s", (until, ada))
        content = f"external_id,email,next_refresh_at\nada,x,{early.isoformat()}\n"
        with world.calls(lambda: load(world, content)) as importing:
            importing.start()
            world.until(lambda: world.waiting("test") == 1, "the import waits for the grant")
            granting.commit()
            (report,) = importing.results()
    assert report == Report(0, 1, 0, 0, 1, 0)
    assert (world.see(ada)["next_refresh_at"], world.see(ada)["credit_balance"]) == (until, 1_000)


def test_users_of_an_external_plan_need_no_date(world: World) -> None:
    world.sql.execute("INSERT INTO plans (code, name, amount, cadence) VALUES ('yearly', 'Yearly', 5, 'external')")
    content = "external_id,plan_code,credit_balance,active\nu1,yearly,0,1\nu2,free,0,1\nu3,free,0,0\nu4,,0,1\n"
    assert load(world, content).unscheduled == 2


def waits(on_wait: Callable[[], None]) -> dict[str, Any]:
    """Options of an import that does something each time it has to wait."""
    return {"on_progress": lambda stage, _read: on_wait() if stage == "Waiting for locks" else None}


def test_an_import_gives_its_locks_back_while_a_host_holds_a_user(world: World) -> None:
    """It waits without a lock, so no host waits for it meanwhile, and none becomes a deadlock's victim."""
    for name in ("ada", "bob"):
        world.user(name)
    world.sql.execute(
        "ALTER DATABASE {} SET deadlock_timeout = '200ms'".format(world.value("SELECT current_database()"))
    )
    world.database.close()
    with world.host() as host:
        host.execute("UPDATE users SET credit_balance = 7 WHERE external_id = 'bob'")
        waited = []

        def on_wait() -> None:
            waited.append(world.rows("SELECT FROM users WHERE external_id = 'ada' FOR UPDATE NOWAIT"))
            if len(waited) == 2:
                host.commit()

        report = load(world, "external_id,email\nada,a\nbob,b\n", **waits(on_wait))
    assert len(waited) == 2
    assert report == Report(0, 2, 0, 0, 0, 0)
    assert users(world)["bob"]["credit_balance"] == 7


def test_a_user_whom_the_host_inserts_meanwhile_is_changed_instead(world: World) -> None:
    with world.host() as host:

        def insert(stage: str, _read: int) -> None:
            if stage == "Writing":
                host.execute("INSERT INTO users (external_id, credit_balance) VALUES ('ada', 1)")

        content = "external_id,credit_balance\nada,2\nbob,3\n"
        with world.calls(lambda: load(world, content, on_progress=insert)) as importing:
            importing.start()
            world.until(lambda: world.waiting("test") == 1, "the import meets the host's user")
            host.commit()
            (report,) = importing.results()
    assert report == Report(1, 1, 0, 0, 0, 2)
    assert {name: row["credit_balance"] for name, row in users(world).items()} == {"ada": 2, "bob": 3}


def test_other_unique_keys_of_the_hosts_end_an_import_at_once(world: World) -> None:
    world.sql.execute("CREATE UNIQUE INDEX hosts_own ON users (email)")
    options = waits(lambda: pytest.fail("there is nothing to wait for"))
    with pytest.raises(psycopg.errors.UniqueViolation, match="hosts_own"):
        load(world, "external_id,credit_balance,email\nada,1,x\nbob,1,x\n", **options)


def test_locks_are_taken_in_id_order(world: World) -> None:
    """Neither in the table's order nor in the file's: here both run the other way."""
    world.sql.execute(
        "INSERT INTO users (id, external_id, credit_balance) VALUES (30, 'c', 1), (20, 'b', 1), (10, 'a', 1)"
    )
    with world.host() as host:
        host.execute("SELECT FROM users WHERE external_id = 'b' FOR UPDATE")
        with world.calls(lambda: load(world, "external_id,email\nc,x\nb,x\na,x\n")) as importing:
            importing.start()
            world.until(lambda: world.waiting("test") == 1, "the import waits for the host")
            free = world.rows("SELECT external_id FROM users FOR UPDATE SKIP LOCKED")
            host.commit()
            importing.results()
    assert [row["external_id"] for row in free] == ["c"]


def test_a_second_import_is_refused_while_one_runs(world: World) -> None:
    def second(stage: str, _read: int) -> None:
        if stage == "Writing":
            with pytest.raises(RefusedError, match="Another import is running"):
                load(world, "external_id\n")

    assert load(world, "external_id,credit_balance\nada,1\n", on_progress=second).new == 1


def test_an_import_may_take_longer_than_a_batch_and_its_connection_may_not(world: World) -> None:
    limits = []
    with world.database.transaction() as connection:
        file = UserFile(io.BytesIO(b"external_id\n"), "users.csv")

        def see(_stage: str, _read: int) -> None:
            limits.append(connection.execute("SHOW statement_timeout").fetchone())

        import_users(connection, file, actor="test", on_progress=see)
    with world.database.statements() as connection:
        limits.append(connection.execute("SHOW statement_timeout").fetchone())
    assert limits == [("6h",), ("6h",), ("30s",)]
