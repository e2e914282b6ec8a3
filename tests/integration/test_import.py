"""`credits users import`: the real command on a real database, and the import itself beside a busy host."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import struct
import subprocess
import termios
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import settings
from refresh.import_columns import COLUMNS
from refresh.imports import Report
from tests.integration.command import CREDITS
from tests.integration.forked import credits  # noqa: A004
from tests.integration.imports import load, users

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.world import World

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
        environment = settings.environment(DATABASE_URL=self.database_url)
        return credits(["users", "import", *arguments], environment, folder=self.folder)

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
        "credit_refresh_day": None,
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
    query = "SELECT actor, action, user_id, credits, detail FROM credit_audit_logs WHERE action <> 'hold_set'"
    row = world.row(query)
    assert row.pop("actor").startswith("cli")
    assert row == {
        "action": "imported",
        "user_id": None,
        "credits": None,
        "detail": {
            "file": "users.csv",
            "columns": [name for name in COLUMNS if name != "credit_refresh_day"],
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
