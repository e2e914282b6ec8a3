"""The columns that an import may have, and what a cell of each must look like.

Everything that PostgreSQL would refuse is refused here first, because PostgreSQL would end the whole import without
saying in which line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import psycopg

Value: TypeAlias = str | int | bool | None

KEY = "external_id"
BALANCE = "credit_balance"
NEXT = "next_refresh_at"

MAX_KEY_CHARACTERS = 500
"""An index row of PostgreSQL holds 2,704 bytes, and a character takes up to 4."""
_SHOWN_CHARACTERS = 60
_SHOWN_PLANS = 10

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
_MAX_DIGITS = 40
DAYS_OF_A_MONTH = 31
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class Known:
    """The plans and time zones that a cell may name."""

    plans: frozenset[str]
    timezones: frozenset[str]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `users`.

    Attributes:
        name: its name, in the table and in the file's header.
        sql_type: what the temporary table gives it.
        convert: turns a cell that is not empty into a value; raises ValueError with the end of a sentence about it.
        empty: what an empty cell means.
    """

    name: str
    sql_type: str
    convert: Callable[[str, Known], Value]
    empty: Value = None


def shown(cell: str) -> str:
    """A cell's text for a message: quoted, shortened, with nothing that a terminal would act on."""
    return repr(cell if len(cell) <= _SHOWN_CHARACTERS else cell[: _SHOWN_CHARACTERS - 1] + "…")


def fetch_known(connection: psycopg.Connection[Any], columns: Collection[str]) -> Known:
    """Fetch what the columns need: the names that the foreign keys will admit."""
    plans = connection.execute("SELECT code FROM plans") if "plan_code" in columns else ()
    timezones = connection.execute("SELECT name FROM timezones") if "timezone" in columns else ()
    return Known(frozenset(code for (code,) in plans), frozenset(name for (name,) in timezones))


def _text(cell: str, _known: Known) -> str:
    return cell


def _key(cell: str, _known: Known) -> str:
    if len(cell) > MAX_KEY_CHARACTERS:
        raise ValueError(f"is longer than {MAX_KEY_CHARACTERS} characters")
    return cell


def _integer(cell: str, _known: Known) -> int:
    # int() alone would also take 1_000 and the digits of every script.
    if _WHOLE_NUMBER.fullmatch(cell) is None:
        raise ValueError("is not a whole number (digits alone: no decimals, no thousands separators)")
    if len(cell) > _MAX_DIGITS or not -(2**63) <= (value := int(cell)) < 2**63:
        raise ValueError("does not fit 64 bits")
    return value


def _amount(cell: str, known: Known) -> int:
    value = _integer(cell, known)
    if value <= 0:
        raise ValueError("is not greater than 0 (leave it empty for the plan's amount)")
    return value


def _day(cell: str, known: Known) -> int:
    value = _integer(cell, known)
    if not 1 <= value <= DAYS_OF_A_MONTH:
        raise ValueError("is not a day from 1 to 31")
    return value


def _instant(cell: str, _known: Known) -> str:
    try:
        parsed = datetime.fromisoformat(cell)
    except ValueError:
        raise ValueError("is not an ISO 8601 instant such as 2026-11-21T00:00:00Z") from None
    if parsed.tzinfo is None:
        raise ValueError("has no offset: add Z or one such as +01:00, as in 2026-11-21T00:00:00Z")
    try:
        return parsed.astimezone(UTC).isoformat()  # PostgreSQL takes narrower offsets than Python does
    except OverflowError:
        raise ValueError("lies outside the years 1 to 9999") from None


def _boolean(cell: str, _known: Known) -> bool:
    value = _BOOLEANS.get(cell.lower())
    if value is None:
        raise ValueError("is none of true, false, 1, 0, yes, no")
    return value


def _plan(cell: str, known: Known) -> str:
    if cell not in known.plans:
        plans = sorted(known.plans)
        more = f" and {len(plans) - _SHOWN_PLANS:,} more" if len(plans) > _SHOWN_PLANS else ""
        raise ValueError(f"is not a plan; known are: {', '.join(plans[:_SHOWN_PLANS]) or 'none'}{more}")
    return cell


def _timezone(cell: str, known: Known) -> str:
    if cell not in known.timezones:
        raise ValueError("is not a time zone that PostgreSQL knows; give a name such as Europe/Berlin")
    return cell


COLUMNS = {
    column.name: column
    for column in (
        Column(KEY, "text", _key),
        Column("email", "text", _text),
        Column("plan_code", "text", _plan),
        Column(BALANCE, "bigint", _integer),
        Column("last_credit_refresh", "timestamptz", _instant),
        Column(NEXT, "timestamptz", _instant),
        Column("credit_refresh_hold", "boolean", _boolean, empty=False),
        Column("hold_reason", "text", _text),
        Column("hold_until", "timestamptz", _instant),
        Column("credit_refresh_day", "smallint", _day),
        Column("custom_credit_amount", "bigint", _amount),
        Column("timezone", "text", _timezone),
        Column("active", "boolean", _boolean, empty=True),
    )
}


def convert_row(columns: list[Column], cells: list[str], known: Known) -> tuple[list[Value], str | None]:
    """The values of one row, and everything that is wrong with it.

    Args:
        columns: as the file's header has them.
        cells: as many, surrounding whitespace included.
        known: what `fetch_known()` found.
    """
    values: list[Value] = []
    problems: list[str] = []
    for column, cell in zip(columns, cells, strict=True):
        text = cell.strip()
        if text:
            try:
                values.append(column.convert(text, known))
            except ValueError as error:
                problems.append(f"{column.name} {shown(text)} {error}")
                values.append(None)
        else:
            if column.name == KEY:
                problems.append(f"{KEY} is empty")
            values.append(column.empty)
    return values, "; ".join(problems) or None
