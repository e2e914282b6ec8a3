"""Files of user ids: what they may look like, what they become, and that their size costs no memory."""

from __future__ import annotations

import io
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from refresh.errors import RefusedError
from refresh.user_files import Listed, UserList, load_users, unknown_ids

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.world import World

MEGABYTE = 1_048_576


def load(world: World, content: str | bytes) -> tuple[Listed, list[int]]:
    data = content.encode() if isinstance(content, str) else content
    with world.database.statements() as connection:
        listed = load_users(connection, UserList(io.BytesIO(data), "users.txt"))
        assert list(unknown_ids(connection))[:10] == listed.sample
        rows = connection.execute("SELECT user_id FROM pg_temp.listed_users ORDER BY user_id").fetchall()
    return listed, [id_ for (id_,) in rows]


@pytest.mark.parametrize(
    "content",
    [
        "ada\nbob\n",
        "ada\r\nbob",
        "\n  bob \n\n ada\n",
        b"\xef\xbb\xbfada\nbob\n",
        "external_id\nada\nbob\n",
        b"\xef\xbb\xbfuserId,email\nada,a@example.com\n\nbob,\n",
        'email, user_id \n"one, two\nthree",ada\n,"bob"\n',
        "externalId\n\n   \nada\nbob\nada\n",
    ],
)
def test_ids_one_per_line_or_in_a_column(world: World, content: str | bytes) -> None:
    ids = [world.user("ada"), world.user("bob")]
    world.user("eve")
    listed, users = load(world, content)
    assert users == ids
    assert (listed.known, listed.unknown, listed.sample) == (2, 0, [])


def test_unknown_and_repeated_ids_are_counted_and_named(world: World) -> None:
    world.user("ada")
    world.user('"quoted", with; signs')
    listed, users = load(
        world, 'ada\nzoe\nada\n"quoted", with; signs\nyan\nzoe\n' + "".join(f"x{n}\n" for n in range(9))
    )
    assert len(users) == 2
    assert (listed.rows, listed.duplicates, listed.known, listed.unknown) == (15, 2, 2, 11)
    assert listed.sample == ["zoe", "yan", *(f"x{n}" for n in range(8))]
    assert listed.facts()["unknownSample"] == listed.sample


def test_the_digest_is_of_the_ids_and_of_nothing_else(world: World) -> None:
    world.user("ada")
    digest = load(world, "ada\nbob\ncy\n")[0].content()
    assert load(world, "email,userId\n,cy\nx,bob\n,ada\n,cy\n")[0].content() == digest
    world.user("bob")
    assert load(world, "ada\nbob\ncy\n")[0].content() == digest
    for other in ("ada\nbob\n", "ada\nbob\ncx\n", "ada\nbo\nbcy\n"):
        assert load(world, other)[0].content()["digest"] != digest["digest"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no ids"),
        (" \n\n", "has no ids"),
        ("external_id\n", "has no ids under its header"),
        (b"ada\nb\0b\n", "line 2: the row holds a NUL byte"),
        (b"ada\nb\xffb\n", "line 2: the row is not UTF-8"),
        (b"\xff\xfea\0\n\0", "is UTF-16"),
        ("ada\n\n" + "x" * 501 + "\n", "line 3: .* is longer than 500 characters"),
        ("ada\n" + "x" * 2 * MEGABYTE, "line 2: the row is longer than 1,048,576 bytes"),
        ("x" * 200_000, "line 1: .* is longer than 500 characters"),
        ("userId,email\nada\n", "line 2: the row has 1 cells, the header has 2"),
        ('userId,email\nada,"x\nbob,y\n', "line 2: a quote is opened and never closed"),
        ("userId,email\nada,x\n,y\n", "line 3: the id is empty"),
        (b"userId,email\nada,x\nb\xff,y\n", "line 3: the row is not UTF-8"),
        ("userId,user_id\nada,x\n", "more than one column of ids: userId, user_id"),
        ("userId;email\nada;x\n", "cells are separated by commas"),
        ("id,email\nada,x\n", "no column of it is called external_id, externalId, userId or user_id"),
        ("zoe\nyan\nzoe\n", "none of the 2 ids in users.txt is a user's, which begin with 'zoe', 'yan'"),
    ],
)
def test_what_is_no_list_of_users_is_refused_by_line(world: World, content: str | bytes, says: str) -> None:
    world.user("ada")
    with pytest.raises(RefusedError, match=says) as refused:
        load(world, content)
    assert "\n" not in str(refused.value)
    assert world.value("SELECT count(*) FROM users") == 1


def test_a_second_file_on_the_same_connection_takes_the_firsts_place(world: World) -> None:
    world.user("ada")
    bob = world.user("bob")
    with world.database.statements() as connection:
        for content in (b"ada\nx\n", b"bob\n"):
            listed = load_users(connection, UserList(io.BytesIO(content), "users.txt"))
        assert connection.execute("SELECT user_id FROM pg_temp.listed_users").fetchall() == [(bob,)]
        assert list(unknown_ids(connection)) == []
    assert listed.unknown == 0


def test_a_million_ids_take_no_memory_here(world: World, tmp_path: Path) -> None:
    world.users(200_000)
    path = tmp_path / "users.txt"
    with path.open("w") as file:
        file.writelines(f"user-{n}\n" for n in range(1_000_000))
    with world.database.statements() as connection, path.open("rb") as source:
        tracemalloc.start()
        listed = load_users(connection, UserList(source, "users.txt"))
        counted = sum(1 for _ in unknown_ids(connection))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (listed.known, listed.unknown, counted) == (200_000, 800_000, 800_000)
    assert peak < 5 * MEGABYTE
