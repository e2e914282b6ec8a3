"""Reading a CSV of users: rows with their lines and places, in bounded memory, whatever the bytes are."""

from __future__ import annotations

import csv
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refresh.errors import RefusedError
from refresh.import_columns import COLUMNS
from refresh.import_file import MAX_ROW_BYTES, Row, UserFile

HEADER = b"external_id,email\n"


def opened(content: bytes) -> UserFile:
    return UserFile(io.BytesIO(content), "users.csv")


def rows(content: bytes) -> list[Row]:
    return list(opened(content).rows())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "users.csv is empty"),
        (b"\n\n", "users.csv is empty"),
        (b"external_id,balance\n", "line 1: unknown column 'balance'"),
        (b"\nexternal_id,balance\n", "line 2: unknown column 'balance'"),
        (b"external_id,refresh_day\n", "unknown column 'refresh_day'"),
        (b"external_id,held_window\n", "unknown column 'held_window'"),
        (b"External_ID\n", "unknown column 'External_ID'"),
        (b"external_id;email\n", "unknown column 'external_id;email'; cells are separated by commas"),
        (b"external_id,\n", "column 2 has no name"),
        (b"external_id,email, email\n", "column email is there twice"),
        (b"email\na@example.com\n", "column external_id is missing"),
        (b"\x89PNG\r\n\x1a\n\x00", "is not a CSV file in UTF-8"),
        (b"PK\x03\x04\x00\x00", "is not a CSV file in UTF-8: the row holds a NUL byte"),
        (b'"external_id', "is not a CSV file in UTF-8: a quote is opened and never closed"),
        (b"external_id\ru1\ru2\r", "is not a CSV file in UTF-8: a carriage return stands inside the row"),
        (b"x" * (2 * MAX_ROW_BYTES), "is not a CSV file in UTF-8: the row is longer than"),
    ],
)
def test_what_is_no_csv_of_users_is_refused_in_one_line_that_names_the_columns(content: bytes, said: str) -> None:
    with pytest.raises(RefusedError) as caught:
        opened(content)
    text = str(caught.value)
    assert text.startswith("users.csv")
    assert said in text
    assert "\n" not in text
    assert text.endswith(f"allowed columns: {', '.join(COLUMNS)}")


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be"])
def test_utf_16_is_refused(codec: str) -> None:
    with pytest.raises(RefusedError, match="UTF-8"):
        opened("external_id,email\nu1,a\n".encode(codec))


def test_a_pipe_is_refused() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe, pytest.raises(RefusedError, match="save it as a file first"):
        UserFile(pipe, "users.csv")


def test_header_with_byte_order_mark_spaces_and_windows_line_ends() -> None:
    file = opened(b"\xef\xbb\xbf external_id ,email\r\nu1,a\r\n")
    assert [column.name for column in file.columns] == ["external_id", "email"]
    ((line, at, cells, problem),) = file.rows()
    assert (line, cells, problem) == (2, ["u1", "a"], None)
    assert file.cells_at(at) == cells
    assert file.read == file.size


def test_rows_have_the_line_in_which_they_start() -> None:
    found = rows(HEADER + b'u1,"a\nb\nc"\n\nu2,"say ""hi"""\nu3,x')
    assert [(row.line, row.cells, row.problem) for row in found] == [
        (2, ["u1", "a\nb\nc"], None),
        (6, ["u2", 'say "hi"'], None),
        (7, ["u3", "x"], None),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"u1", "the row has 1 cells, the header has 2"),
        (b"u1,a,b", "the row has 3 cells, the header has 2"),
        (b"u1,\xff", "the row is not UTF-8"),
        (b"u1,\0", "the row holds a NUL byte"),
        (b'u1,"a"b', "a quoted cell goes on after its closing quote"),
        (b"u1,a\rb", "a carriage return stands inside the row"),
        (
            b'u1,"a\nb",c',
            "the row has 3 cells, the header has 2 (lines 3 to 4 read as one row: is a quote never closed?)",
        ),
        (b"u1," + b"x" * 200_000, "a cell is longer than 131,072 characters"),
        (b"u1," + b"x" * (3 * MAX_ROW_BYTES), "the row is longer than 1,048,576 bytes"),
    ],
)
def test_a_bad_row_is_named_and_read_again_and_its_neighbours_are_good(line: bytes, problem: str) -> None:
    file = opened(HEADER + b"before,x\n" + line + b"\nafter,x\n")
    before, bad, after = file.rows()
    assert (before.cells, before.problem) == (["before", "x"], None)
    assert (after.cells, after.problem, after.line) == (["after", "x"], None, 4 + line.count(b"\n"))
    assert file.cells_at(after.at) == after.cells
    assert bad.problem is not None
    assert bad.problem.startswith(problem)
    assert bad.line == 3
    again = ",".join(file.cells_at(bad.at)).encode(errors="surrogateescape")
    assert again.replace(b'"', b"") == line.replace(b'"', b"")[:MAX_ROW_BYTES]


def test_a_quote_that_is_never_closed_costs_its_own_row_alone_and_takes_none_in_silence() -> None:
    file = opened(HEADER + b'u1,a\nu2,"open\nu3,c\nu4,d\n')
    good, bad = file.rows()
    assert good.cells == ["u1", "a"]
    assert bad.problem == "a quote is opened and never closed (the row goes on to line 5)"
    assert file.cells_at(bad.at) == ['u2,"open\nu3,c\nu4,d']


def test_endless_rows_are_cut_off() -> None:
    (bad, *_rest) = rows(HEADER + b"u1" + (b',"' + b"x" * 1_000 + b'\n"') * 2_000)
    assert bad.problem is not None
    assert bad.problem.startswith("the row is longer than 1,048,576 bytes")


@given(st.binary(max_size=200))
def test_any_bytes_give_rows_in_order(content: bytes) -> None:
    found = rows(HEADER + content)
    assert [row.at for row in found] == sorted({row.at for row in found})
    assert all(row.problem is not None or len(row.cells) == 2 for row in found)


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2)))
def test_what_csv_writes_is_read_back_whole_and_again_from_its_place(table: list[list[str]]) -> None:
    written = io.StringIO(newline="")
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows(table)
    # What UTF-8 cannot hold is a row's own problem.
    file = opened(HEADER + written.getvalue().encode(errors="surrogatepass"))
    for expected, row in zip(table, file.rows(), strict=True):
        if row.problem is None:
            assert row.cells == expected
    again = list(opened(HEADER + written.getvalue().encode(errors="surrogatepass")).rows())
    for expected, row in zip(table, again, strict=True):
        assert row.problem is not None or file.cells_at(row.at) == expected
