"""Every text that people type or import: stored as it was given, or refused in one clear line; never a traceback."""

from __future__ import annotations

import csv
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cli import main
from tasks.app import app, use_broker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import embedded
    from tests.integration.world import World

EXAMPLES = max(25, settings.default.max_examples // 1_000) if settings.default else 25
RUN = "00000000-0000-0000-0000-00000000000a"
KEPT_BY_THE_SHELL = "\udcff\udc80"
"""What Python makes of bytes in an argument that are no UTF-8."""

hostile = st.sampled_from(
    [
        "'; DROP TABLE credits.users; --", '"', "''", "\\", "\\'", "%s", "%(reason)s", "%", "{}", "{schema}", ":x",
        "$$", "$1", "\0", "a\0b", "\n", "a\r\nb", "\t", "\x1b[31mred", "\u202eabc", "\u0000", KEPT_BY_THE_SHELL,
        "[bold]x[/bold]", "[/]", "=1+1", "-rf", "--", "@x", "{{7*7}}", "💳", "ß" * 500, "x" * 100_000, "NULL", "null",
        "true", "1e400", "9" * 50, "-1", " ", "\u00a0", "", "../../etc/passwd", "/dev/null", "a,b", 'a","b', "\ufeff",
        "pg_sleep(10)", "1); DELETE FROM settings; --", "E'\\x41'", "U&'\\0041'",
    ]
)  # fmt: skip
texts = st.one_of(hostile, st.text(max_size=40), st.text(st.characters(codec=None), max_size=12))


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Commands:
    """`credits`, called in this process: a NUL in an argument, which no shell lets through, comes this way alone."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._runner = CliRunner(env=environment)

    def __call__(self, *arguments: str) -> Said:
        result = self._runner.invoke(main, arguments, prog_name="credits")
        error = result.exception
        assert error is None or isinstance(error, SystemExit), (arguments, result.exc_info)
        said = Said(result.exit_code, result.stdout, result.stderr)
        assert "Traceback" not in said.out + said.err, said
        assert said.code in {0, 1, 2, 3}, said
        if said.code in {1, 2} and not said.out:
            # At the end, after what is shown or explained before.
            assert said.err.rstrip("\n").split("\n")[-1].startswith("Error: "), said
        return said


@contextmanager
def in_process() -> Iterator[None]:
    """A command sets handlers, and a broker, in its process, and this one is pytest's."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    broker = app.conf.broker_url
    try:
        yield
    finally:
        use_broker(broker)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def commands(database_url: str, servers: embedded.Servers) -> Iterator[Commands]:
    with in_process():
        yield Commands({"DATABASE_URL": database_url, "REDIS_URL": servers.redis_url, "COLUMNS": "200"})


def examples(count: int = EXAMPLES) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@examples()
@given(text=texts)
@example(text="'; DROP TABLE credits.users; --")
@example(text="a\0b")
@example(text=KEPT_BY_THE_SHELL)
def test_reasons_and_keys_are_stored_as_they_were_given(world: World, commands: Commands, text: str) -> None:
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance) VALUES ('ada', 'free', 0) ON CONFLICT DO NOTHING"
    )
    if commands("hold", "ada", f"--reason={text}").code == 0:
        assert world.value("SELECT hold_reason FROM users WHERE external_id = 'ada'") == text.strip()
    commands("release", "ada")
    done = commands("refresh", "ada", "--force", f"--reason={text}", f"--idempotency-key={text}")
    if done.code == 0:
        run = world.row(
            "SELECT reason, idempotency_key FROM credit_refresh_runs WHERE idempotency_key = %s", text.strip()
        )
        assert run == {"reason": text.strip(), "idempotency_key": text.strip()}
        assert commands("runs", "list").code == 0
        assert commands("history", "ada").code == 0


@examples()
@given(text=texts)
@example(text="a\0b")
@example(text=KEPT_BY_THE_SHELL)
def test_plans_are_named_as_they_were_given(world: World, commands: Commands, text: str) -> None:
    named = ("plans", "set", "--yes", "--cadence=rolling", "--amount=5", "--mode=fill")
    if commands(*named, f"--name={text}", "--", "named").code == 0:
        assert world.value("SELECT name FROM plans WHERE code = 'named'") in {text, text.strip()}
    if commands(*named, "--name=x", "--", text).code == 0:
        assert world.value("SELECT count(*) FROM plans WHERE code IN (%s, %s)", text, text.strip()) == 1
    assert commands("plans", "list").code == 0


ASKS: list[tuple[str, ...]] = [
    ("why", "--", "{}"), ("history", "--", "{}"), ("users", "show", "--", "{}"), ("hold", "--reason=x", "--", "{}"),
    ("release", "--", "{}"), ("refresh", "--reason=x", "--", "{}"), ("users", "stagger", "--yes", "--plan={}"),
    ("plans", "preview", "--", "{}"), ("plans", "set", "named", "--yes", "--name=x", "--timezone={}"),
    ("plans", "set", "named", "--yes", "--name=x", "--time={}"), ("forecast", "--set={}"),
    ("forecast", "--set={}.amount=1"), ("forecast", "--set=free.timezone={}"), ("runs", "show", "--", "{}"),
    ("runs", "list", "--since={}"), ("runs", "list", "--before={}"), ("runs", "cancel", "--reason=x", "--", "{}"),
    ("runs", "rollback", "--reason=x", "--yes", "--", "{}"), ("runs", "retry", "--yes", "--", "{}"),
    ("runs", "apply", "--yes", "--", "{}"), ("stats", "--since={}"), ("history", "ada", "--before={}"),
    ("scan", "--dry-run", "--as-of={}"), ("hold", "ada", "--reason=x", "--until={}"),
    ("bulk-refresh", "--dry-run", "--yes", "--reason=x", "--plan={}"),
    ("bulk-refresh", "--dry-run", "--yes", "--reason=x", "--where={}"),
    ("bulk-refresh", "--dry-run", "--yes", "--reason=x", "--where=plan={}"),
    ("db", "grants", "--host={}"), ("keys", "create", "--scope=read", "--name={}"), ("keys", "revoke", "--", "{}"),
    ("keys", "create", "--scope=read", "--name=x", "--expires={}"),
]  # fmt: skip


@pytest.mark.parametrize("command", ASKS, ids=" ".join)
def test_whoever_asks_with_any_text_gets_an_answer_or_one_line(
    world: World, commands: Commands, command: tuple[str, ...]
) -> None:
    world.user(due_in="1 day")

    @examples(12)
    @given(text=texts)
    @example(text="a\0b")
    @example(text=KEPT_BY_THE_SHELL)
    @example(text="'")
    @example(text="x" * 100_000)
    @example(text="0001-01-01T00:00:00+23:59")
    @example(text="9999-12-31T23:59:59-23:59")
    def asked(text: str) -> None:
        commands(*(word.replace("{}", text) for word in command))

    asked()
    assert world.value("SELECT count(*) FROM users") == 1


@examples(60)
@given(cells=st.lists(st.tuples(texts, texts, texts, texts, texts), min_size=1, max_size=4), data=st.data())
def test_what_an_import_brings_is_stored_as_it_was_given(
    world: World, commands: Commands, tmp_path: Path, cells: list[tuple[str, ...]], data: st.DataObject
) -> None:
    columns = ("external_id", "email", "hold_reason", "plan_code", "timezone")
    chosen = data.draw(st.sampled_from([columns[:3], columns[:2], columns]))
    file, rejects = tmp_path / "users.csv", tmp_path / "rejects.csv"
    rejects.unlink(missing_ok=True)
    with file.open("w", newline="", encoding="utf-8", errors="surrogatepass") as opened:
        writer = csv.writer(opened)
        writer.writerow((*chosen, "credit_balance"))
        writer.writerows((*row[: len(chosen)], "5") for row in cells)
    world.sql.execute("DELETE FROM users")
    done = commands("users", "import", f"--skip-bad={rejects}", str(file))
    stored = {row["external_id"]: row for row in world.rows("SELECT * FROM users")}
    if done.code == 0 and not rejects.exists():
        assert stored.keys() == {row[0].strip() for row in cells}
    for row in cells:
        if (user := stored.get(row[0].strip())) is not None:
            twins = [twin for twin in cells if twin[0].strip() == row[0].strip()]
            assert any((user[name] or "") == twin[at].strip() for twin in twins for at, name in [(1, "email")]), row
    if rejects.exists():
        with rejects.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
            for rejected in list(csv.reader(opened))[1:]:
                assert not any(cell.startswith(("=", "@", "\t", "\r")) for cell in rejected), rejected


@examples()
@given(lines=st.lists(texts, min_size=1, max_size=4))
def test_a_list_of_any_ids_is_read_or_refused(
    world: World, commands: Commands, tmp_path: Path, lines: list[str]
) -> None:
    world.sql.execute(
        "INSERT INTO users (external_id, plan_code, credit_balance) VALUES ('ada', 'free', 0) ON CONFLICT DO NOTHING"
    )
    file, unknown = tmp_path / "ids.txt", tmp_path / "unknown.txt"
    unknown.unlink(missing_ok=True)
    file.write_bytes("\n".join(["ada", *lines]).encode(errors="surrogatepass"))
    commands("bulk-refresh", "--dry-run", "--yes", "--reason=x", "--force", f"--users={file}", f"--unknown={unknown}")
