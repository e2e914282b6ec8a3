"""What a cell of each column must look like."""

from __future__ import annotations

import pytest

from refresh.import_columns import COLUMNS, Known, Value, convert_row, shown

KNOWN = Known(frozenset({"free", "pro"}), frozenset({"UTC", "Europe/Berlin"}))


def convert(column: str, cell: str) -> tuple[Value, str | None]:
    (value,), reason = convert_row([COLUMNS[column]], [cell], KNOWN)
    return value, reason


@pytest.mark.parametrize(
    ("column", "cell", "value"),
    [
        ("external_id", " u1\t", "u1"),
        ("external_id", "a b", "a b"),
        ("external_id", "x" * 500, "x" * 500),
        ("email", "", None),
        ("hold_reason", "  ", None),
        ("plan_code", "pro", "pro"),
        ("plan_code", "", None),
        ("timezone", "Europe/Berlin", "Europe/Berlin"),
        ("credit_balance", "9223372036854775807", 2**63 - 1),
        ("credit_balance", "-9223372036854775808", -(2**63)),
        ("credit_balance", "+007", 7),
        ("credit_balance", "0" * 30 + "7", 7),
        ("credit_balance", "", None),
        ("credit_refresh_day", "31", 31),
        ("credit_refresh_day", "", None),
        ("custom_credit_amount", "1", 1),
        ("custom_credit_amount", "", None),
        ("credit_refresh_hold", "YES", True),
        ("credit_refresh_hold", "0", False),
        ("credit_refresh_hold", "", False),
        ("active", "no", False),
        ("active", "", True),
        ("next_refresh_at", "2026-11-21T00:00:00Z", "2026-11-21T00:00:00+00:00"),
        ("next_refresh_at", "2026-11-21 01:30+01:30", "2026-11-21T00:00:00+00:00"),
        ("next_refresh_at", "2026-11-21T20:00:00.25+20:00", "2026-11-21T00:00:00.250000+00:00"),
        ("hold_until", "", None),
    ],
)
def test_good_cells(column: str, cell: str, value: Value) -> None:
    assert convert(column, cell) == (value, None)


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("external_id", " ", "external_id is empty"),
        ("external_id", "x" * 501, "is longer than 500 characters"),
        ("plan_code", "gold", "plan_code 'gold' is not a plan; known are: free, pro"),
        ("timezone", "europe/berlin", "timezone 'europe/berlin' is not a time zone"),
        ("credit_balance", "9223372036854775808", "does not fit 64 bits"),
        ("credit_balance", "9" * 5_000, "does not fit 64 bits"),
        ("credit_balance", "1.5", "credit_balance '1.5' is not a whole number"),
        ("credit_balance", "1,000", "is not a whole number"),
        ("credit_balance", "1_000", "is not a whole number"),
        ("credit_balance", "1e3", "is not a whole number"),
        ("credit_balance", "\N{ARABIC-INDIC DIGIT ONE}", "is not a whole number"),
        ("credit_refresh_day", "0", "is not a day from 1 to 31"),
        ("credit_refresh_day", "32", "is not a day from 1 to 31"),
        ("custom_credit_amount", "0", "is not greater than 0"),
        ("custom_credit_amount", "-5", "is not greater than 0"),
        ("active", "maybe", "active 'maybe' is none of true, false, 1, 0, yes, no"),
        ("next_refresh_at", "2026-11-21T00:00:00", "has no offset: add Z"),
        ("next_refresh_at", "2026-11-21", "has no offset: add Z"),
        ("next_refresh_at", "2026-02-30T00:00:00Z", "is not an ISO 8601 instant"),
        ("next_refresh_at", "21.11.2026", "is not an ISO 8601 instant"),
        ("next_refresh_at", "infinity", "is not an ISO 8601 instant"),
        ("last_credit_refresh", "0001-01-01T00:00:00+14:00", "lies outside the years 1 to 9999"),
    ],
)
def test_bad_cells_are_named_with_column_and_value(column: str, cell: str, reason: str) -> None:
    value, found = convert(column, cell)
    assert value is None or value is COLUMNS[column].empty
    assert found is not None
    assert reason in found
    assert found.startswith(column)


def test_a_row_names_all_that_is_wrong_with_it() -> None:
    columns = [COLUMNS["external_id"], COLUMNS["credit_balance"], COLUMNS["active"]]
    values, reason = convert_row(columns, ["u1", "x", "y"], KNOWN)
    assert values == ["u1", None, None]
    assert reason is not None
    assert reason.index("credit_balance 'x'") < reason.index("; active 'y'")


def test_many_plans_are_named_in_part() -> None:
    known = Known(frozenset(f"plan-{number:02}" for number in range(30)), frozenset())
    _, reason = convert_row([COLUMNS["plan_code"]], ["gold"], known)
    assert reason is not None
    assert "plan-00" in reason
    assert reason.endswith("plan-09 and 20 more")


def test_shown_cells_are_short_and_harmless_to_a_terminal() -> None:
    assert shown("\x1b[2J\udcff") == r"'\x1b[2J\udcff'"
    assert len(shown("x" * 1_000)) == 62
