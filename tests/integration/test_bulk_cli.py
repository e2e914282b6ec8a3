"""`credits bulk-refresh` as people run it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import redis

from refresh import delivery
from refresh.runs import ATOMIC_USERS_MAX
from tests.integration.command import CREDITS, refused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import embedded
    from tests.integration.command import Cli
    from tests.integration.world import World

BULK = ("bulk-refresh", "--yes", "--reason", "outage")
LINE = {
    "runId", "createdAt", "kind", "work", "source", "status", "dryRun", "usersSelected", "usersDone", "usersRefreshed",
    "usersHeld", "usersSkipped", "usersFailed", "creditsGranted", "seconds", "requestedBy", "reason",
    "maxUsersPerSecond",
}  # fmt: skip


def published(world: World) -> list[int]:
    rows = world.rows(
        "SELECT id FROM credit_refresh_batches WHERE status = 'pending' AND published_at IS NOT NULL ORDER BY id"
    )
    return [row["id"] for row in rows]


@contextmanager
def worker(world: World) -> Iterator[None]:
    """Does whatever is published, until the block ends."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            world.work(published(world))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def client(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url.replace("redis+socket://", "unix://").partition("?")[0])


def no_run(world: World) -> None:
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 0
    assert world.value("SELECT count(*) FROM credit_refresh_batches") == 0


def test_it_shows_publishes_and_tells_its_run(world: World, cli: Cli) -> None:
    world.users(150)
    world.user("held", credit_refresh_hold=True)
    world.user("later", due_in="3 days")
    done = cli(*BULK, "--where", "balance<1000")
    run = world.row("SELECT * FROM credit_refresh_runs")
    assert done.returncode == 0, done
    assert done.stdout == f"Run {run['id']}: 151 users, 2 batches published.\n"
    shown = [" ".join(line.split()) for line in done.stderr.splitlines()]
    assert shown[0] == "Bulk refresh: balance below 1,000"
    assert {"users who match 152", "would be refreshed 150", "credits 138,675", "held 1", "not due 1"} <= {*shown}
    assert (run["reason"], run["source"], run["slot"]) == ("outage", "cli", None)
    assert run["requested_by"].startswith("cli:")
    assert run["selection"] == {"due": True, "balanceBelow": 1000}
    assert len(published(world)) == 2


def test_json_says_all_of_it_and_nothing_else_is_printed(world: World, cli: Cli, tmp_path: Path) -> None:
    world.users(3)
    file = tmp_path / "users.csv"
    file.write_text("userId,email\nuser-1,\nuser-2,\nuser-2,\n")
    done = cli(*BULK, "--users", str(file), "--force", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts.keys() == LINE | {"existing", "preview", "users"}
    assert (facts["status"], facts["usersSelected"], facts["existing"]) == ("running", 2, False)
    assert facts["preview"] == {
        "usersMatching": 2,
        "usersRefreshed": 2,
        "credits": 1_997,
        "notRefreshed": dict.fromkeys(
            ("notDue", "held", "inactive", "noPlan", "external", "unscheduled", "overflow", "alreadyGranted",
             "unfinished"), 0,
        ),
    }  # fmt: skip
    assert facts["users"] == {
        "file": str(file), "rows": 3, "duplicates": 1, "known": 2, "unknown": 0, "unknownSample": []
    }  # fmt: skip


def test_waiting_ends_with_the_summary(world: World, cli: Cli) -> None:
    world.users(250)
    with worker(world):
        done = cli(*BULK, "--all", "--wait")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done
    assert "succeeded" in done.stdout
    assert "250 users, 250 refreshed, 0 held, 0 skipped, 0 failed" in done.stdout
    assert world.value("SELECT count(*) FROM users WHERE credit_balance = 1000") == 250


def test_failed_users_are_exit_code_3(world: World, cli: Cli) -> None:
    world.users(3)
    world.sql.execute("ALTER TABLE users ADD CONSTRAINT poison CHECK (external_id <> 'user-2' OR credit_balance < 500)")
    with worker(world):
        done = cli(*BULK, "--all", "--wait", "--json")
    assert done.returncode == 3, done
    facts = json.loads(done.stdout)
    assert (facts["status"], facts["usersRefreshed"], facts["usersFailed"]) == ("partial", 2, 1)


def test_a_dry_run_does_not_ask_and_changes_no_user(world: World, cli: Cli) -> None:
    world.users(3)
    with worker(world):
        facts = cli.facts("bulk-refresh", "--plan", "free", "--force", "--dry-run", "--wait", "--reason", "look")
    assert (facts["dryRun"], facts["usersRefreshed"], facts["creditsGranted"]) == (True, 3, 2_994)
    assert world.value("SELECT count(*) FROM credit_refresh_histories WHERE status = 'planned'") == 3
    assert world.value("SELECT count(*) FROM users WHERE last_credit_refresh IS NOT NULL") == 0


def test_without_a_terminal_or_yes_it_refuses(world: World, cli: Cli) -> None:
    world.users(3)
    done = cli("bulk-refresh", "--all", "--reason", "outage")
    refused(done, 2, "Refresh 3 users with 2,994 credits? Without a terminal to answer on, say so with --yes")
    no_run(world)


@pytest.mark.parametrize(("says", "code", "users"), [("n", 2, 0), ("y", 0, 3)])
def test_on_a_terminal_it_asks(world: World, cli: Cli, says: str, code: int, users: int) -> None:
    world.users(3)
    terminal, end = os.openpty()
    command = [str(CREDITS), "bulk-refresh", "--all", "--force", "--keep-window", "--reason", "outage"]
    with subprocess.Popen(
        command, stdin=end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=cli.environment
    ) as process:
        os.close(end)
        os.write(terminal, f"{says}\n".encode())
        _, err = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == code, err
    assert "Refresh 3 users with 2,994 credits, due or not? [y/N]" in err
    assert world.value("SELECT coalesce(sum(users_selected), 0) FROM credit_refresh_runs") == users


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--reason", "x"], "say whom: --all, --plan CODE, --users FILE, or one --where at least"),
        (["--all"], "Missing option '--reason'"),
        (["--all", "--reason", " "], "must not be blank"),
        (["--all", "--reason", "x", "--idempotency-key", ""], "must not be blank"),
        (["--all", "--plan", "free", "--reason", "x"], "exclude one another"),
        (["--all", "--where", "balance<5", "--reason", "x"], "--all means everybody"),
        (["--all", "--keep-window", "--reason", "x"], "--keep-window is for --force"),
        (["--all", "--unknown", "x", "--reason", "x"], "--unknown is for --users"),
        (["--plan", "free", "--where", "plan=pro", "--reason", "x"], "each condition may be given once"),
        (["--where", "balanc<5", "--reason", "x"], "plan=CODE, next-refresh<T, balance<N, active=yes, active=no"),
        (["--where", "balance=5", "--reason", "x"], "'balance=5' is no condition; allowed are"),
        (["--where", "balance<5.5", "--reason", "x"], "'5.5' is not a whole number of 64 bits"),
        (["--where", "balance<9223372036854775808", "--reason", "x"], "is not a whole number of 64 bits"),
        (["--where", "active=maybe", "--reason", "x"], "active is yes or no"),
        (["--where", "next-refresh<tomorrow", "--reason", "x"], "not an instant such as 2026-12-01T00:00:00Z"),
        (["--where", "next-refresh<2026-12-01T00:00:00", "--reason", "x"], "names no zone"),
        (["--plan", "gold", "--reason", "x"], "there is no plan 'gold'; known are: free, pro"),
        (["--where", "plan=gold", "--reason", "x"], "there is no plan 'gold'"),
        (["--users", "missing.txt", "--reason", "x"], "missing.txt cannot be read"),
        (["--all", "--as-of", "2999-01-01T00:00:00Z", "--reason", "x"], "only a dry run may look ahead"),
        (["--plan", "pro", "--reason", "x"], "nobody matches: no run was opened"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_in_one_line(world: World, cli: Cli, arguments: list[str], says: str) -> None:
    world.users(2)
    refused(cli("bulk-refresh", "--yes", "--json", *arguments), 2, says)
    no_run(world)


def test_nobody_to_refresh_is_refused_and_says_why(world: World, cli: Cli) -> None:
    world.user("later", due_in="3 days")
    world.user("held", credit_refresh_hold=True)
    done = cli(*BULK, "--plan", "free", "--json")
    says = "nobody would be refreshed of 2 users (1 not due, 1 held): no run was opened; --force refreshes"
    refused(done, 2, says)
    no_run(world)


def test_while_paused_or_disabled_nothing_is_opened(world: World, cli: Cli) -> None:
    world.users(2)
    refused(cli(*BULK, "--all", CREDIT_REFRESH_ENABLED="false"), 2, "CREDIT_REFRESH_ENABLED is false")
    cli.says("pause")
    refused(cli(*BULK, "--all"), 2, "nothing was opened: the service is paused (`credits resume` ends that)")
    no_run(world)


def test_too_many_for_all_or_nothing(world: World, cli: Cli) -> None:
    world.users(ATOMIC_USERS_MAX + 1)
    refused(cli(*BULK, "--all", "--atomic"), 2, f"{ATOMIC_USERS_MAX + 1:,} users are too many for all or nothing")
    no_run(world)
    facts = cli.facts(*BULK, "--where", "balance<500", "--atomic")
    assert facts["usersSelected"] < ATOMIC_USERS_MAX
    assert world.value("SELECT count(*) FROM credit_refresh_batches WHERE atomic") == 1


def test_one_key_is_one_run(world: World, cli: Cli) -> None:
    world.users(3)
    first = cli.facts(*BULK, "--all", "--idempotency-key", "k")
    world.sql.execute("UPDATE credit_refresh_batches SET published_at = NULL")
    again = cli.facts(*BULK, "--all", "--idempotency-key", "k")
    assert (again["runId"], again["existing"], again["preview"]) == (first["runId"], True, None)
    assert published(world) == []
    assert "is there already, opened with the key 'k'" in cli.says(*BULK, "--all", "--idempotency-key", "k")
    refused(cli(*BULK, "--plan", "free", "--idempotency-key", "k"), 2, f"belongs to run {first['runId']}")
    world.work(world.claim())
    with worker(world):
        assert cli.facts(*BULK, "--all", "--idempotency-key", "k", "--wait")["status"] == "succeeded"
    assert world.value("SELECT count(*) FROM credit_refresh_runs") == 1


def test_a_broker_that_does_not_answer_is_noticed_before_a_run_is_open(world: World, cli: Cli) -> None:
    world.users(3)
    refused(cli(*BULK, "--all", REDIS_URL="redis://127.0.0.1:1/0"), 1, "The broker cannot be reached")
    no_run(world)


def test_killed_between_opening_and_publishing_upkeep_goes_on(
    world: World, cli: Cli, servers: embedded.Servers
) -> None:
    world.users(150)
    broker = client(servers.redis_url)
    with (
        world.host() as host,
        subprocess.Popen(
            [CREDITS, *BULK, "--all", "--force"], env=cli.environment, stderr=subprocess.DEVNULL
        ) as doomed,
    ):
        host.execute("SELECT pg_advisory_xact_lock(hashtextextended('credits.open_run', 0))")
        world.until(lambda: world.waiting("credits") == 1, "it has seen the broker, and waits at the door")
        broker.client_pause(30_000, all=False)
        host.rollback()
        world.until(lambda: len(published(world)) == 2, "the run is open, and its batches count as published")
        doomed.kill()
        doomed.wait()
        broker.client_unpause()
    assert world.value("SELECT status FROM credit_refresh_runs") == "running"
    assert world.claim() == []
    world.sql.execute("UPDATE credit_refresh_batches SET published_at = published_at - interval '31 seconds'")
    with world.database.statements() as connection:
        assert delivery.record_losses(connection, scheduled=False) == 2
    world.work(world.claim())
    run = world.row("SELECT status, users_refreshed FROM credit_refresh_runs")
    assert (run["status"], run["users_refreshed"]) == ("succeeded", 150)


def test_a_broker_that_takes_nothing_costs_a_delay(world: World, cli: Cli, servers: embedded.Servers) -> None:
    world.users(150)
    broker = client(servers.redis_url)
    broker.config_set("maxmemory", 1)
    try:
        said = cli.says(*BULK, "--all")
    finally:
        broker.config_set("maxmemory", 0)
    assert "150 users, 2 batches published, 0 of them so far: upkeep publishes the others." in said
    assert len(world.claim()) == 2


# Files.


def test_unknown_ids_are_named_and_written(world: World, cli: Cli, tmp_path: Path) -> None:
    world.users(3)
    file, unknown = tmp_path / "users.txt", tmp_path / "unknown.txt"
    file.write_text("user-1\n=zoe\nuser-2\n" + "".join(f"x{n}\n" for n in range(20)) + "=zoe\n")
    done = cli(*BULK, "--users", str(file), "--unknown", str(unknown), "--json")
    assert done.returncode == 0, done
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"21 ids in {file} not a user's: '=zoe', 'x0', 'x1',")
    assert line.endswith(f"and 11 more (all of them: {unknown}).")
    assert unknown.read_text() == "=zoe\n" + "".join(f"x{n}\n" for n in range(20))
    users = json.loads(done.stdout)["users"]
    assert (users["rows"], users["known"], users["unknown"], len(users["unknownSample"])) == (24, 2, 21, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unknown.txt", "users.txt"]
    refused(cli(*BULK, "--users", str(file), "--unknown", str(unknown)), 2, "is there already")


def test_unknown_ids_for_a_spreadsheet_are_no_formulas(world: World, cli: Cli, tmp_path: Path) -> None:
    world.users(1)
    file, unknown = tmp_path / "users.txt", tmp_path / "unknown.csv"
    file.write_text("user-1\n=zoe\n-7\na,b\n")
    assert cli(*BULK, "--users", str(file), "--unknown", str(unknown)).returncode == 0
    assert unknown.read_text() == 'external_id\n\'=zoe\n-7\n"a,b"\n'


def test_ids_from_stdin(world: World, cli: Cli) -> None:
    world.users(3)
    done = subprocess.run(
        [CREDITS, *BULK, "--users", "-", "--json"],
        input="user-1\nuser-3\n", capture_output=True, text=True, check=False, timeout=60, env=cli.environment,
    )  # fmt: skip
    assert done.returncode == 0, done
    facts = json.loads(done.stdout)
    assert (facts["usersSelected"], facts["users"]["file"]) == (2, "stdin")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"ada\nb\0b\n", "users.txt, line 2: the row holds a NUL byte"),
        (b"ada\nb\xffb\n", "users.txt, line 2: the row is not UTF-8"),
        (b"", "users.txt has no ids"),
        (b"ada\n" + b"x" * 3_000_000, "users.txt, line 2: the row is longer than 1,048,576 bytes"),
    ],
    ids=["nul", "encoding", "empty", "endless"],
)
def test_a_bad_file_is_refused_by_its_line(world: World, cli: Cli, tmp_path: Path, content: bytes, says: str) -> None:
    world.user("ada")
    file = tmp_path / "users.txt"
    file.write_bytes(content)
    refused(cli(*BULK, "--users", str(file)), 2, says)
    no_run(world)


def test_a_million_bad_ids_are_one_line_and_no_run(world: World, cli: Cli, tmp_path: Path) -> None:
    world.user("ada")
    file, unknown = tmp_path / "users.txt", tmp_path / "unknown.txt"
    with file.open("w") as out:
        out.writelines(f"nobody-{n}\n" for n in range(1_000_000))
    done = cli(*BULK, "--users", str(file), "--unknown", str(unknown), "--force")
    refused(done, 2, f"none of the 1,000,000 ids in {file} is a user's, which begin with 'nobody-0', 'nobody-1'")
    assert len(done.stderr.splitlines()) == 1
    assert not unknown.exists()
    no_run(world)


_MEASURED = """
import resource, sys
from cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def _peak(cli: Cli, *arguments: str) -> tuple[dict[str, Any], int]:
    """The answer and the peak memory in kB of a command."""
    python = CREDITS.with_name("python")
    done = subprocess.run(
        [python, "-c", _MEASURED, *arguments],
        capture_output=True, text=True, check=False, timeout=120, env=cli.environment,
    )  # fmt: skip
    assert done.returncode == 0, done
    return json.loads(done.stdout), int(done.stderr.splitlines()[-1])


def test_a_file_of_a_million_ids_takes_no_more_memory_than_a_small_one(world: World, cli: Cli, tmp_path: Path) -> None:
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("user-1\n")
    with large.open("w") as out:
        out.writelines(f"user-{n}\n" for n in range(1_000_000))
    world.users(500_000)
    _, little = _peak(cli, *BULK, "--users", str(small), "--dry-run", "--json")
    facts, much = _peak(cli, *BULK, "--users", str(large), "--unknown", str(tmp_path / "unknown.txt"), "--json")
    assert (facts["usersSelected"], facts["users"]["unknown"]) == (500_000, 500_000)
    assert much - little < 20 * 1024
