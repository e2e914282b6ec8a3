"""API keys: made, checked, listed and revoked; the key itself is shown once and stored nowhere."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from refresh import keys
from refresh.errors import RefusedError
from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

LATE = datetime(2099, 1, 1, tzinfo=UTC)
WHOLE = re.compile(r"crs_[a-z0-9]{8}_[A-Za-z0-9]{43}")


def make(world: World, name: str = "desk", **options: Any) -> keys.NewKey:
    asked = {"scopes": ["read"], "expires_at": None, "actor": "cli:ops", **options}
    with world.database.transaction() as connection:
        return keys.create_key(connection, name=name, **asked)


def check(world: World, key: str) -> keys.Key | None:
    with world.database.statements() as connection:
        return keys.check_key(connection, key)


def revoke(world: World, text: str, actor: str = "cli:eve") -> keys.Key:
    with world.database.transaction() as connection:
        return keys.revoke_key(connection, text, actor=actor)


def listed(world: World) -> list[keys.Key]:
    with world.database.statements() as connection:
        return keys.list_keys(connection)


def audited(world: World) -> list[tuple[str, str, Any]]:
    rows = world.rows("SELECT action, actor, detail FROM credit_audit_logs ORDER BY occurred_at, id")
    return [(row["action"], row["actor"], row["detail"]) for row in rows]


def everything(world: World) -> str:
    """All that the tables hold, as a dump would show it."""
    names = [
        row["name"]
        for row in world.rows(
            "SELECT relname AS name FROM pg_class WHERE relnamespace = 'credits'::regnamespace AND relkind = 'r'"
        )
    ]
    assert "api_keys" in names
    return "".join(
        str(row)
        for name in names
        for row in world.rows(f"SELECT to_jsonb(t) AS row FROM {name} AS t")  # noqa: S608 - of the catalogue
    )


def test_a_key_opens_and_says_whose_it_is(world: World) -> None:
    made = make(world, " support desk ", scopes=("support", "read", "read"), expires_at=LATE)
    assert WHOLE.fullmatch(made.key)
    assert made.key.startswith(f"{made.stored.shown}_")
    found = check(world, made.key)
    assert found == made.stored
    assert (found.name, found.scopes, found.created_by) == ("support desk", ["read", "support"], "cli:ops")
    assert (found.state, found.expires_at, found.last_used_at) == ("active", LATE, None)
    assert listed(world)[0].last_used_at is not None


def test_keys_are_all_different(world: World) -> None:
    made = [make(world).key for _ in range(50)]
    secrets = [key.rpartition("_")[2] for key in made]
    assert len({*made}) == len({*secrets}) == 50
    assert len({*"".join(secrets)}) == 62  # of the whole alphabet


def test_neither_the_database_nor_a_repr_holds_the_key(world: World) -> None:
    made = make(world, scopes=("admin",))
    check(world, made.key)
    revoke(world, made.key)
    secret = made.key.rpartition("_")[2]
    dump = everything(world)
    assert made.stored.prefix in dump
    assert secret not in dump
    assert secret not in repr(made) + str(listed(world))
    assert world.value("SELECT secret_hash FROM api_keys") == sha256(made.key.encode()).digest()
    hashed = sha256(made.key.encode()).hexdigest()
    assert hashed not in repr(made) + str(listed(world)) + str(audited(world))


def test_the_audit_log_keeps_who_made_and_revoked_it(world: World) -> None:
    made = make(world, expires_at=LATE)
    revoked = revoke(world, made.stored.shown)
    assert (revoked.state, revoked.revoked_by) == ("revoked", "cli:eve")
    detail = {"id": str(made.stored.id), "prefix": made.stored.shown, "name": "desk", "scopes": ["read"]}
    detail |= {"expiresAt": LATE.isoformat()}
    assert audited(world) == [("key_created", "cli:ops", detail), ("key_revoked", "cli:eve", detail)]


def test_what_is_no_key_or_nobodys_opens_nothing(world: World) -> None:
    made, other = make(world), make(world)
    prefix, secret = made.stored.prefix, made.key.rpartition("_")[2]
    wrong = [
        "", "crs_", "crs__", made.stored.shown, f"{made.stored.shown}_", secret, made.key.upper(), made.key[:-1],
        f"{made.key}x", f" {made.key}", f"{made.key}\n", made.key.replace("crs", "CRS"), f"{made.key}\0",
        f"crs_{other.stored.prefix}_{secret}", f"crs_{prefix}_{'A' * 43}", f"crs_aaaaaaaa_{secret}",
        f"crs_{prefix}_{secret[:-1]}ä", f"crs_{prefix}_{secret[:-1]}\udcff", "x" * 100_000, "' OR true --",
    ]  # fmt: skip
    assert [text for text in wrong if check(world, text) is not None] == []
    assert [key.last_used_at for key in listed(world)] == [None, None]


def test_a_revoked_key_opens_nothing_from_then_on(world: World) -> None:
    made, other = make(world), make(world)
    assert check(world, made.key) is not None
    revoke(world, made.stored.prefix)
    assert check(world, made.key) is None
    assert check(world, other.key) is not None


def test_an_expired_key_opens_nothing_by_the_databases_clock(world: World) -> None:
    made = make(world, expires_at=LATE)
    assert check(world, made.key) is not None
    world.sql.execute("UPDATE api_keys SET expires_at = now() + interval '1 hour'")
    assert check(world, made.key) is not None
    world.sql.execute("UPDATE api_keys SET expires_at = now()")
    assert check(world, made.key) is None
    assert listed(world)[0].state == "expired"
    revoke(world, made.stored.shown)
    assert listed(world)[0].state == "revoked"


@pytest.mark.parametrize("form", ["prefix", "shown", "id", "ID", "key", "spaces"])
def test_a_key_is_revoked_by_whatever_names_it(world: World, form: str) -> None:
    made = make(world)
    make(world)
    forms = {
        "prefix": made.stored.prefix, "shown": made.stored.shown, "id": str(made.stored.id),
        "ID": str(made.stored.id).upper(), "key": made.key, "spaces": f" {made.stored.shown}\n",
    }  # fmt: skip
    assert revoke(world, forms[form]).id == made.stored.id
    assert [key.state for key in listed(world)] == ["active", "revoked"]


def test_what_was_revoked_or_never_there_is_refused_without_repeating_a_key(world: World) -> None:
    made = make(world)
    revoke(world, made.stored.shown)
    with pytest.raises(RefusedError, match=f"^{made.stored.shown} was revoked already, on .* by cli:eve$"):
        revoke(world, made.key, "cli:joe")
    secret = "S" * 43
    for text in (f"crs_aaaaaaaa_{secret}", f"crs_aaaaaaa_{secret}", secret, "", "\0", "'", "0" * 32):
        with pytest.raises(RefusedError, match=r"^there is no key") as caught:
            revoke(world, text)
        assert secret not in str(caught.value)
    assert [action for action, _, _ in audited(world)] == ["key_created", "key_revoked"]


def test_two_who_revoke_at_once(world: World) -> None:
    made = make(world)
    with world.calls(lambda: revoke(world, made.key, "a"), lambda: revoke(world, made.key, "b")) as calls:
        calls.start()
        with pytest.raises(RefusedError, match="was revoked already"):
            calls.results()
    assert len(audited(world)) == 2


def test_the_last_use_is_noted_once_a_minute(world: World) -> None:
    made = make(world)
    check(world, made.key)
    first = world.value("SELECT last_used_at FROM api_keys")
    written = world.value("SELECT xmin::text FROM api_keys")
    for _ in range(20):
        check(world, made.key)
    assert world.value("SELECT xmin::text FROM api_keys") == written
    world.sql.execute("UPDATE api_keys SET last_used_at = last_used_at - interval '61 seconds'")
    check(world, made.key)
    assert world.value("SELECT last_used_at FROM api_keys") > first


def test_requests_of_one_key_do_not_wait_for_each_other(world: World) -> None:
    made = make(world)
    with world.host() as host:
        host.execute("SELECT FROM api_keys FOR UPDATE")
        with world.database.statements() as connection:
            connection.execute("SET statement_timeout = '1s'")
            assert keys.check_key(connection, made.key) is not None
            connection.execute("RESET statement_timeout")
    assert world.value("SELECT last_used_at FROM api_keys") is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": " "}, "a name of 1 to 100 printable characters"), ({"name": "x" * 101}, "a name of 1 to 100"),
        ({"name": "a\nb"}, "printable"), ({"name": "\udcff"}, "printable"),
        ({"scopes": []}, "no scope: a key needs one or more of read, support, admin"),
        ({"scopes": ["read", "root"]}, "'root': a key needs"),
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, "2020-01-01T00:00:00\\+00:00 has passed"),
    ],
)  # fmt: skip
def test_refused(world: World, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        make(world, **options)
    assert (listed(world), audited(world)) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        "scopes = '{}'", "scopes = '{root}'", "scopes = '{read,NULL}'", "scopes = NULL", "secret_hash = 'short'",
        "revoked_at = now()", "revoked_by = 'eve'", "prefix = 'bbbbbbbb'", "secret_hash = sha256('b')",
    ],
)  # fmt: skip
def test_the_table_takes_no_nonsense(world: World, change: str) -> None:
    world.sql.execute(
        "INSERT INTO api_keys (prefix, secret_hash, name, scopes, created_by)"
        " SELECT repeat(x, 8), sha256(x::bytea), 'x', '{read,admin}', 'x' FROM unnest('{a,b}'::text[]) AS x"
    )
    with pytest.raises(psycopg.errors.IntegrityError):
        world.sql.execute(f"UPDATE api_keys SET {change} WHERE prefix = 'aaaaaaaa'")  # noqa: S608


# --- the commands ----------------------------------------------------------------------------------------------------


def test_create_prints_the_key_alone_on_stdout(world: World, cli: Cli) -> None:
    done = cli("keys", "create", "--name", "desk", "--scope", "support", "--scope", "read")
    key = done.stdout.removesuffix("\n")
    assert WHOLE.fullmatch(key)
    shown = key.rpartition("_")[0]
    said = f"{shown} may read and support, until it is revoked. Keep it: it is not shown again.\n"
    assert (done.returncode, done.stderr) == (0, said)
    found = check(world, key)
    assert found is not None
    assert (found.name, found.scopes) == ("desk", ["read", "support"])
    assert found.created_by.startswith("cli:")


def test_in_json(world: World, cli: Cli) -> None:
    made = cli.facts("keys", "create", "--name", "desk", "--scope", "admin", "--expires", "2099-01-01T00:00:00+01:00")
    assert check(world, made["key"]) is not None
    (shown,) = cli.facts("keys", "list")["keys"]
    assert shown == {name: value for name, value in made.items() if name != "key"} | {
        "lastUsedAt": shown["lastUsedAt"], "state": "active", "expiresAt": "2098-12-31T23:00:00+00:00"
    }  # fmt: skip
    assert shown["lastUsedAt"] is not None
    assert made["prefix"] in made["key"]
    revoked = cli.facts("keys", "revoke", made["prefix"])
    assert (revoked["state"], revoked["id"]) == ("revoked", made["id"])
    assert check(world, made["key"]) is None


def test_list_and_revoke(cli: Cli) -> None:
    assert cli.says("keys", "list") == "There are no keys yet.\n"
    first = cli.facts("keys", "create", "--name", "first [bold]", "--scope", "read")
    second = cli.facts("keys", "create", "--name", "second", "--scope", "admin", "--expires", "2099-01-01T00:00:00Z")
    said = cli.says("keys", "revoke", first["key"])
    assert said == f"{first['prefix']} (first [bold]) is revoked: it opens nothing any more.\n"
    lines = [line for line in cli.says("keys", "list").splitlines() if "crs_" in line]
    assert [("second" in line, second["prefix"] in line, "2099-01-01 00:00" in line) for line in lines] == [
        (True, True, True), (False, False, False)
    ]  # fmt: skip
    assert ("first [bold]" in lines[1], "revoked" in lines[1]) == (True, True)
    # What `revoke` takes is in one piece, however narrow the terminal is.
    narrow = cli("keys", "list", COLUMNS="80").stdout
    assert [made["prefix"] in narrow for made in (first, second)] == [True, True]
    assert all(made["key"].rpartition("_")[2] not in json.dumps(cli.facts("keys", "list")) for made in (first, second))


def test_bad_arguments(world: World, cli: Cli) -> None:
    create = ("keys", "create", "--name", "x")
    done = cli(*create)  # Click lists the choices below it
    assert (done.returncode, "Missing option '--scope'" in done.stderr, done.stdout) == (2, True, "")
    refused(cli("keys", "create", "--scope", "read"), 2, "Missing option '--name'")
    refused(cli(*create, "--scope", "root"), 2, "'root' is not one of 'read', 'support', 'admin'")
    refused(cli(*create, "--scope", "read", "--expires", "2099-01-01T00:00:00"), 2, "names no zone")
    refused(cli(*create, "--scope", "read", "--expires", "2020-01-01T00:00:00Z"), 2, "has passed")
    refused(cli("keys", "create", "--name", " ", "--scope", "read"), 2, "a key needs a name")
    refused(cli("keys", "revoke", "crs_aaaaaaaa"), 2, "there is no key crs_aaaaaaaa")
    assert (listed(world), audited(world)) == ([], [])
