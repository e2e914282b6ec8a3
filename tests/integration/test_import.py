"""`credits users import`: the real command on a real database, and the import itself beside a busy host."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import psycopg
import pytest

import settings
from refresh.import_columns import COLUMNS
from refresh.import_file import UserFile
from refresh.imports import BadRowsError, Reject, Report, import_users
from refresh.runs import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.world import World

CREDITS = str(Path(sys.executable).with_name("credits"))
MEGABYTE = 1_048_576

FULL = """\
external_id,email,plan_code,credit_balance,last_credit_refresh,next_refresh_at,credit_refresh_hold,hold_reason,\
hold_until,custom_credit_amount,timezone,active
u1,ada@example.com,pro,-5,2026-10-21T00:00:00Z,2026-11-21T01:00:00+01:00,yes,"a, b",2027-01-01T00:00:00Z,500,\
Europe/Berlin,no
u2, ,,0,,,,,,,,
"""


@dataclass(frozen=True)
class Command:
    """The real command, in a folder of its own, on the test's database."""

    folder: Path
    database_url: str

    def file(self, content: str | bytes, name: str = "users.csv") -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [CREDITS, "users", "import", *arguments],
            cwd=self.folder,
            env=settings.environment(DATABASE_URL=self.database_url),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def json(self, *arguments: str) -> dict[str, Any]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def command(tmp_path: Path, database_url: str) -> Command:
    return Command(tmp_path, database_url)


def load(world: World, content: str, **options: Any) -> Report:
    with world.database.transaction() as connection:
        file = UserFile(io.BytesIO(content.encode()), "users.csv")
        return import_users(connection, file, **{"actor": "test", **options})


def users(world: World) -> dict[str, dict[str, Any]]:
    return {row["external_id"]: row for row in world.rows("SELECT * FROM users ORDER BY id")}


def test_new_users_get_what_the_file_says_and_the_defaults(world: World, command: Command) -> None:
    command.file(FULL)
    done = command.run("users.csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Imported 2 users from users.csv: 2 new, 0 changed, 0 bad.\n"
    assert done.stderr.startswith("Unscheduled: 1 of them without a next_refresh_at.")
    u1, u2 = users(world).values()
    assert {name: u1[name] for name in COLUMNS} == {
        "external_id": "u1",
        "email": "ada@example.com",
        "plan_code": "pro",
        "credit_balance": -5,
        "last_credit_refresh": datetime(2026, 10, 21, tzinfo=UTC),
        "next_refresh_at": datetime(2026, 11, 21, tzinfo=UTC),
        "credit_refresh_hold": True,
        "hold_reason": "a, b",
        "hold_until": datetime(2027, 1, 1, tzinfo=UTC),
        "custom_credit_amount": 500,
        "timezone": "Europe/Berlin",
        "active": False,
    }
    assert {name: u2[name] for name in COLUMNS} == {
        **dict.fromkeys(COLUMNS),
        "external_id": "u2",
        "credit_balance": 0,
        "credit_refresh_hold": False,
        "active": True,
    }


def test_an_import_writes_one_audit_row_and_no_history(world: World, command: Command) -> None:
    command.file(FULL)
    assert command.json("users.csv") == {
        "file": "users.csv",
        "users": 2,
        "new": 2,
        "changed": 0,
        "unchanged": 0,
        "bad": 0,
        "keptNextRefreshAt": 0,
        "unscheduled": 1,
        "rejects": None,
    }
    assert world.value("SELECT count(*) FROM credit_refresh_histories") == 0
    row = world.row("SELECT actor, action, user_id, credits, detail FROM credit_audit_logs")
    assert row.pop("actor").startswith("cli")
    assert row == {
        "action": "imported",
        "user_id": None,
        "credits": None,
        "detail": {
            "file": "users.csv",
            "columns": list(COLUMNS),
            "new": 2,
            "changed": 0,
            "unchanged": 0,
            "bad": 0,
            "kept": 0,
            "unscheduled": 1,
        },
    }


def test_of_known_users_only_the_files_columns_change(world: World, command: Command) -> None:
    load(world, FULL)
    before = users(world)
    command.file("email,external_id,custom_credit_amount\nnew@example.com,u1,\n,u2,\n", "some.csv")
    done = command.run("some.csv")
    assert done.stdout == "Imported 2 users from some.csv: 0 new, 1 changed, 1 unchanged, 0 bad.\n"
    after = users(world)
    assert after["u2"] == before["u2"]
    assert after["u1"].pop("updated_at") > before["u1"].pop("updated_at")
    assert after["u1"] == {**before["u1"], "email": "new@example.com", "custom_credit_amount": None}


def test_a_repeated_import_writes_no_user(world: World) -> None:
    load(world, FULL)
    before = world.rows("SELECT xmin::text, * FROM users ORDER BY id")
    assert load(world, FULL) == Report(0, 0, 2, 0, 0, 1)
    assert world.rows("SELECT xmin::text, * FROM users ORDER BY id") == before


def test_an_empty_balance_leaves_a_known_users_as_it_is(world: World) -> None:
    world.user("ada")
    report = load(world, "external_id,credit_balance,active\nada,,no\n")
    assert report.changed == 1
    assert (users(world)["ada"]["credit_balance"], users(world)["ada"]["active"]) == (400, False)


def test_a_file_of_ids_alone_changes_nobody_and_a_header_alone_is_an_empty_import(world: World) -> None:
    world.user("ada")
    assert load(world, "external_id\nada\n") == Report(0, 0, 1, 0, 0, 0)
    assert load(world, "external_id\n") == Report(0, 0, 0, 0, 0, 0)


def test_bad_rows_are_named_by_line_and_nothing_is_imported(world: World, command: Command) -> None:
    world.user("ada")
    command.file(
        "external_id,credit_balance,plan_code,timezone,next_refresh_at,hold_reason\n"
        'good,1,free,UTC,2026-11-21T00:00:00Z,"two\nlines"\n'
        "ada,,,,,\n"
        "new,,,,,\n"
        "bad,1.5,gold,Mars/Phobos,2026-11-21T00:00:00,\n"
        "good,2,,,,\n"
        "short,1\n"
        ",1,,,,\n"
        "good,3,,,,\n"
    )
    done = command.run("users.csv")
    assert done.returncode == 1
    assert done.stdout == ""
    *named, last = done.stderr.splitlines()
    assert [line.split(": ", 1)[0] for line in named] == [f"users.csv, line {n}" for n in (5, 6, 7, 8, 9, 10)]
    reasons = [line.split(": ", 1)[1] for line in named]
    assert reasons[0] == "credit_balance is needed for a new user"
    for part in (
        "credit_balance '1.5'",
        "plan_code 'gold' is not a plan; known are: free, pro",
        "'Mars/Phobos'",
        "offset",
    ):
        assert part in reasons[1]
    assert reasons[2] == reasons[5] == "external_id is in line 2 already"
    assert reasons[3] == "the row has 2 cells, the header has 6"
    assert reasons[4] == "external_id is empty"
    assert last.startswith("Nothing was imported, because 6 rows are bad.")
    assert list(users(world)) == ["ada"]
    assert world.value("SELECT count(*) FROM credit_audit_logs") == 0


def test_twenty_bad_rows_are_named_and_the_rest_counted(command: Command) -> None:
    command.file("external_id,credit_balance\n" + "".join(f"u{n},x\n" for n in range(1_000)))
    done = command.run("users.csv", "--json")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 22
    assert "… and 980 more bad rows." in done.stderr
    facts = json.loads(done.stdout)
    assert (facts["users"], facts["bad"], len(facts["badRows"])) == (0, 1_000, 20)
    assert facts["badRows"][19]["line"] == 21


def test_skip_bad_imports_the_good_rows_and_keeps_the_others_in_the_files_order(world: World, command: Command) -> None:
    command.file(
        b'external_id,credit_balance,email\nu1,1,\nu2,-5.5,=1+1\nu3,, +x \nu1,3,\xff\nu4,4,"a"b\nu5,5,e\nu5,6,e\n'
    )
    done = command.run("users.csv", "--skip-bad", "rejects.csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Imported 2 users from users.csv: 2 new, 0 changed, 5 bad (see rejects.csv).\n"
    assert {name: row["credit_balance"] for name, row in users(world).items()} == {"u1": 1, "u5": 5}
    with (command.folder / "rejects.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rejects = csv.reader(file)
    assert header == ["line", "reason", "external_id", "credit_balance", "email"]
    assert [(row[0], row[2:]) for row in rejects] == [
        ("3", ["u2", "-5.5", "'=1+1"]),
        ("4", ["u3", "", "' +x "]),
        ("5", ["u1", "3", "\udcff"]),
        ("6", ['u4,4,"a"b']),
        ("8", ["u5", "6", "e"]),
    ]
    assert rejects[1][1] == "credit_balance is needed for a new user"
    assert rejects[4][1] == "external_id is in line 7 already"
    assert command.names() == ["rejects.csv", "users.csv"]


def test_skip_bad_without_a_bad_row_writes_no_file(command: Command) -> None:
    command.file(FULL)
    assert command.json("users.csv", "--skip-bad", "rejects.csv")["rejects"] is None
    assert command.names() == ["users.csv"]


@pytest.mark.parametrize("rejects", ["users.csv", "missing/rejects.csv"])
def test_rejects_never_overwrite_a_file(command: Command, rejects: str) -> None:
    content = command.file(FULL).read_bytes()
    done = command.run("users.csv", "--skip-bad", rejects)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert rejects in done.stderr
    assert (command.folder / "users.csv").read_bytes() == content


def test_an_import_that_the_database_refuses_leaves_nothing(world: World, command: Command) -> None:
    world.sql.execute("ALTER TABLE users ADD CONSTRAINT hosts_own CHECK (credit_balance <> 666)")
    command.file("external_id,credit_balance\nu1,1\nu2,x\nu3,666\n")
    done = command.run("users.csv", "--skip-bad", "rejects.csv")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "hosts_own" in done.stderr
    assert command.names() == ["users.csv"]
    assert users(world) == {}


def test_what_is_no_csv_of_users_is_refused_in_one_line(command: Command) -> None:
    command.file("external_id,credits\nu1,5\n")
    done = command.run("users.csv")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "users.csv, line 1: unknown column 'credits'; allowed columns: external_id, email," in done.stderr


def test_a_file_that_is_not_there_is_refused_in_one_line(command: Command) -> None:
    for name in ("missing.csv", "."):
        done = command.run(name)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert f"{name} cannot be read" in done.stderr


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
    with pytest.raises(psycopg.errors.UniqueViolation, match="hosts_own"):
        load(world, "external_id,credit_balance,email\nada,1,x\nbob,1,x\n")


def test_locks_are_taken_in_id_order(world: World) -> None:
    """The file names the users backwards; while a host holds the one in the middle, the lower ids alone are locked."""
    for name in ("a", "b", "c"):
        world.user(name)
    with world.host() as host:
        host.execute("SELECT FROM users WHERE external_id = 'b' FOR UPDATE")
        with world.calls(lambda: load(world, "external_id,email\nc,x\nb,x\na,x\n")) as importing:
            importing.start()
            world.until(lambda: world.waiting("test") == 1, "the import waits for the host")
            free = world.rows("SELECT external_id FROM users ORDER BY id FOR UPDATE SKIP LOCKED")
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


def test_a_terminal_sees_a_bar_in_bytes(command: Command) -> None:
    path = command.file("external_id,credit_balance\n" + "".join(f"u{n},1\n" for n in range(20_000)))
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    environment = settings.environment(DATABASE_URL=command.database_url, TERM="xterm-256color")
    with (
        os.fdopen(terminal, "rb", buffering=0) as screen,
        subprocess.Popen([CREDITS, "users", "import", str(path)], env=environment, stdout=end, stderr=end) as process,
    ):
        os.close(end)
        shown = b""
        try:
            while part := screen.read(65_536):
                shown += part
        except OSError:  # the other end is closed
            pass
        assert process.wait(60) == 0
    size = f"{path.stat().st_size / 1_000:.1f}"
    assert f"{size}/{size} kB" in shown.decode()
    assert "Imported 20,000 users" in shown.decode()


def peak(command: Command, name: str) -> int:
    """The most memory that the command has while it imports a file."""
    environment = settings.environment(DATABASE_URL=command.database_url)
    most = 0
    with subprocess.Popen(
        [CREDITS, "users", "import", name], cwd=command.folder, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                most = max(most, seen.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.01)
        assert process.wait(120) == 0
    return most


def test_memory_does_not_grow_with_the_file(command: Command) -> None:
    for count in (1_000, 300_000):
        with (command.folder / f"{count}.csv").open("w") as file:
            file.write("external_id,email,plan_code,credit_balance,next_refresh_at\n")
            file.writelines(f"u{n},user{n}@example.com,free,{n},2099-01-01T00:00:00Z\n" for n in range(count))
    small, large = peak(command, "1000.csv"), peak(command, "300000.csv")
    assert large - small < 30 * MEGABYTE
