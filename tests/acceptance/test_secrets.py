"""Secrets that the environment holds stand in no output, no log and no process's arguments, whatever goes wrong."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import make_url

import settings
from celeryconfig import TaskNames
from cli import main
from tests.acceptance.nodes import LocalRedis, celery
from tests.integration.command import CREDITS, names_of
from tests.integration.test_isolation import RAISES, TRIGGER
from tests.integration.test_text_fields_cli import Commands, in_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from db import Database
    from embedded import Servers
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import Launcher
    from tests.acceptance.service import Service

SECONDS = 60.0
CANARY = "c4nary"
"""The beginning of each planted secret."""
DATABASE, BROKER, FLOWER = f"{CANARY}Database", f"{CANARY}Broker", f"{CANARY}Flower"
OTHERS = {
    name: f"{CANARY}{name.title().replace('_', '')}".ljust(40, "x")
    for name in ("ADMIN_TOKEN", "CRON_SECRET", "JWT_SECRET", "STRIPE_WEBHOOK_SECRET")
}
RUN = "00000000-0000-0000-0000-00000000000a"
COMMANDS: list[list[str]] = [
    ["bulk-refresh", "--all", "--reason", "x", "--yes"], ["completion", "bash"], ["db", "check"],
    ["db", "grants", "--host", "x"], ["db", "triggers", "on"], ["db", "upgrade"], ["dead-letters"], ["doctor"],
    ["doctor", "--json"], ["forecast"], ["history", "x"], ["hold", "x", "--reason", "x"],
    ["keys", "create", "--name", "x", "--scope", "read"], ["keys", "list"], ["keys", "revoke", "x"], ["pause"],
    ["plans", "list"],
    ["plans", "preview", "free"], ["plans", "set", "free", "--amount", "5", "--yes"], ["refresh", "x", "--reason", "x"],
    ["release", "x"], ["resume"], ["retention", "--yes"], ["runs", "list"], ["runs", "show", RUN],
    ["runs", "apply", RUN, "--yes"], ["runs", "rollback", RUN, "--yes", "--reason", "x"],
    ["runs", "retry", RUN, "--yes"], ["runs", "cancel", RUN, "--yes"], ["runs", "watch", RUN], ["scan"], ["stats"],
    ["up"], ["users", "import", os.devnull], ["users", "show", "x"], ["users", "stagger", "--yes"], ["verify"],
    ["webhooks", "deliveries", "list"], ["webhooks", "deliveries", "retry", "1"],
    ["webhooks", "endpoints", "add", "https://1.1.1.1/hooks"], ["webhooks", "endpoints", "list"],
    ["webhooks", "endpoints", "remove", RUN, "--yes"], ["webhooks", "endpoints", "test", RUN],
    ["webhooks", "link", "cus_x", "x"], ["webhooks", "list"], ["webhooks", "replay", "--yes"],
    ["webhooks", "show", "evt_x"], ["why", "x"],
]  # fmt: skip
ALONE = {("demo",)}
"""It starts servers of its own, and is given none of the secrets that are looked for here."""
PROCESSES = [celery("worker"), celery("beat")]
FEW = [[str(CREDITS), "doctor"], *PROCESSES]
NOBODY = "127.0.0.1:1"


@pytest.fixture
def environment(database_url: str, servers: Servers, tmp_path: Path) -> dict[str, str]:
    """Servers that answer, at level DEBUG, with every secret that there is."""
    return settings.environment(
        DATABASE_URL=with_password(database_url, DATABASE),
        REDIS_URL=servers.redis_url,
        FLOWER_BASIC_AUTH=f"credits:{FLOWER}",
        CREDITS_STATE_DIR=str(tmp_path / "state"),
        LOG_LEVEL="DEBUG",
        **OTHERS,
    )


def with_password(url: str, password: str) -> str:
    return make_url(url).set(password=password).render_as_string(hide_password=False)


def outputs(commands: list[list[str]], environment: dict[str, str]) -> list[str]:
    """What each of them writes; all that are given here end by themselves."""

    def output(argv: list[str]) -> str:
        done = subprocess.run(
            argv, env=environment, cwd=settings.CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
        return f"{argv[-3:]} ({done.returncode})\n{done.stdout}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(output, commands))


def assert_silent(written: list[str]) -> None:
    assert [text for text in written if CANARY in text] == []


def said_by(commands: Commands, command: list[str]) -> str:
    """What a command writes, called in this process: most of its time is otherwise the start of Python."""
    said = commands(*command)
    return f"{command} ({said.code})\n{said.out}{said.err}"


def test_no_command_is_left_out() -> None:
    there = set(names_of(main))
    asked = {name for command in COMMANDS for name in there if tuple(command[: len(name)]) == name}
    assert there - asked == ALONE


def test_every_command_and_process_on_servers_that_do_not_answer(environment: dict[str, str]) -> None:
    urls = {
        "DATABASE_URL": f"postgresql://credits:{DATABASE}@{NOBODY}/credits",
        "REDIS_URL": f"redis://:{BROKER}@{NOBODY}/0",
    }
    with in_process():
        commands = Commands(environment | urls)
        written = [said_by(commands, command) for command in COMMANDS]
    written += outputs(PROCESSES, environment | urls)
    assert_silent(written)
    assert sum("cannot be reached" in text for text in written) > len(COMMANDS) * 3 // 4
    assert [text for text in written if "Traceback" in text] == []


# Nobody answers, or they are no URLs, or such as somebody types who does not know that a password has to be quoted.
URLS = {
    "DATABASE_URL": [
        f"mysql://credits:{DATABASE}@localhost/credits", DATABASE, f"postgresql://credits:{DATABASE}@localhost:x/y",
        f"postgresql://credits:{CANARY}/{DATABASE}@localhost:1/credits",
        f"postgresql://credits:{CANARY}@{DATABASE}@localhost:1/credits",
        f"postgresql://credits:{CANARY}#{DATABASE}?@localhost:1/credits",
        f"postgresql://credits:%zz{DATABASE}@localhost:1/credits",
        f"postgresql://localhost:1/credits?password={DATABASE}&nonsense={DATABASE}",
    ],
    "REDIS_URL": [
        f"redis://:{BROKER}@{NOBODY}/0", f"http://:{BROKER}@localhost", BROKER, f"redis://:{BROKER}@localhost:x/0",
        f"redis://:{CANARY}/{BROKER}@localhost:1/0", f"redis://:{CANARY}#{BROKER}@{NOBODY}/0",
        f"redis://:{BROKER}@{NOBODY}/x",
    ],
    "CELERY_BROKER_URL": [
        f"amqp://credits:{BROKER}@{NOBODY}/credits", f"redis://:{BROKER}@{NOBODY}/0", BROKER,
        f"amqp://credits:{BROKER}@localhost:x/credits", f"amqp://credits:{CANARY}/{BROKER}@localhost:1/y",
        f"amqp://a:{BROKER}@{NOBODY}/;redis://:{BROKER}@{NOBODY}", f"amqp://a:{BROKER}@{NOBODY}/;amqp://b:{BROKER}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", URLS)
def test_urls_that_nobody_can_use_are_not_repeated(environment: dict[str, str], name: str) -> None:
    with in_process():
        for url in URLS[name]:
            said = said_by(Commands(environment | {name: url}), ["doctor"])
            assert CANARY not in said
            assert name in said, (url, said)
    written = outputs([PROCESSES[0]], environment | {name: URLS[name][2]})
    assert_silent(written)
    assert "Traceback" not in written[0]


@pytest.fixture
def locked_redis(launcher: Launcher) -> LocalRedis:
    node = launcher.redis()
    node.lock(BROKER)
    return node


@contextmanager
def locked_role(database: Database) -> Iterator[str]:
    """A role whom the server asks for a password."""
    with database.statements() as connection:
        role = f"locked_in_{connection.info.dbname}"
        connection.execute(SQL("CREATE ROLE {} LOGIN SUPERUSER PASSWORD 'another'").format(Identifier(role)))
        ((file,),) = connection.execute("SELECT current_setting('hba_file')").fetchall()
        rules = Path(file).read_text()
        Path(file).write_text(f"local all {role} scram-sha-256\n{rules}")
        connection.execute("SELECT pg_reload_conf()")
        try:
            yield role
        finally:
            Path(file).write_text(rules)
            connection.execute("SELECT pg_reload_conf()")
            connection.execute(SQL("DROP ROLE {}").format(Identifier(role)))


def test_passwords_that_the_servers_refuse(
    environment: dict[str, str], database: Database, locked_redis: LocalRedis
) -> None:
    wrong = {"REDIS_URL": f"redis://:{BROKER}wrong@127.0.0.1:{locked_redis.port}/0"}
    written = outputs(FEW, environment | wrong)
    assert_silent(written)
    assert any("invalid username-password pair" in text for text in written), written
    with locked_role(database) as role:
        refused = make_url(environment["DATABASE_URL"]).set(username=role).render_as_string(hide_password=False)
        written = outputs(FEW, environment | {"DATABASE_URL": refused})
    assert_silent(written)
    assert any("password authentication failed" in text for text in written), written
    assert [text for text in written if "Traceback" in text] == []


def test_bad_values_of_other_settings(environment: dict[str, str]) -> None:
    assert_silent(outputs(FEW, environment | {"CREDIT_REFRESH_BATCH_SIZE": "many"}))


BAD_SECRETS = [
    ("ADMIN_TOKEN", f"{CANARY}Short"), ("ADMIN_TOKEN", f"{CANARY} with spaces in it"),
    ("CRON_SECRET", OTHERS["ADMIN_TOKEN"]), ("JWT_SECRET", f"{CANARY}Short"),
    ("JWT_SECRET", f"-----BEGIN PUBLIC KEY-----{CANARY}"), ("JWKS_URL", f"https://a:{CANARY}@auth.example.com/jwks"),
    ("JWKS_URL", f"http://auth.example.com/{CANARY}"), ("JWKS_URL", f"https://auth.example.com/?key={CANARY}"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_SECRETS)
def test_secrets_that_are_refused_are_not_repeated(environment: dict[str, str], name: str, value: str) -> None:
    with in_process():
        said = said_by(Commands(environment | {name: value}), ["doctor"])
    assert f"{name}: " in said
    assert CANARY not in said


class TestAWorkerAtWork:
    """With passwords that hold, at level DEBUG, through what makes it log errors."""

    @pytest.fixture
    def default_redis_broker(self, locked_redis: LocalRedis) -> LocalRedis:
        return locked_redis

    @pytest.fixture
    def default_worker_env(self, environment: dict[str, str], locked_redis: LocalRedis) -> dict[str, str]:
        return environment | {"REDIS_URL": locked_redis.url}

    def test_says_nothing_of_them(self, service: Service, ledger: Ledger, launcher: Launcher) -> None:
        service.start_beat()
        service.start_flower()
        ledger.add_due_users(100)
        ledger.execute("UPDATE users SET email = 'poison' WHERE external_id = 'user-7'")
        ledger.execute(RAISES)
        ledger.execute(TRIGGER)
        run_id = service.scan()
        service.until_finished(run_id)
        # Broken while it works: the sessions, a table, and the broker.
        ledger.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'credits-worker' AND datname = current_database()"
        )
        ledger.execute("ALTER TABLE settings RENAME TO hidden")
        service.send(TaskNames.SCAN)
        service.send(TaskNames.UPKEEP)
        service.send(TaskNames.VERIFY)
        service.until(lambda: service.worker.logs().count("Traceback") >= 3, "the tasks failed")
        service.broker.kill()
        service.until(lambda: "Connection refused" in service.worker.logs(), "the worker misses its broker")
        for process in launcher.processes:
            assert CANARY not in process.all_logs()
            if process.status == "running":
                assert CANARY not in " ".join(psutil.Process(process.process.pid).cmdline())


def test_credits_up(environment: dict[str, str], locked_redis: LocalRedis, tmp_path: Path) -> None:
    """The password of its own Flower is for the terminal that asked for it, and in nobody's arguments."""
    env = environment | {"REDIS_URL": locked_redis.url}
    log = tmp_path / "up.log"
    with log.open("w") as output:
        up = subprocess.Popen(
            [CREDITS, "up"], env=env, cwd=settings.CHECKOUT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        seen: set[str] = set()
        process = psutil.Process(up.pid)
        while up.poll() is None and not ("ready." in log.read_text() and "Connected to" in log.read_text()):
            for part in (process, *process.children(recursive=True)):
                try:
                    seen.update(part.cmdline())
                except psutil.NoSuchProcess:
                    continue
        (said,) = [line for line in log.read_text().splitlines() if line.startswith("Flower")]
        password = said.split("password ")[1].split()[0]
    finally:
        up.terminate()
        up.wait(SECONDS)
    assert any("flower" in argument for argument in seen)
    assert [argument for argument in seen if CANARY in argument or password in argument] == []
    assert CANARY not in log.read_text()
    assert log.read_text().count(password) == 1
