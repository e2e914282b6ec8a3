"""The auditor: reads the books at one instant, and says what in them cannot be right.

    snapshot (read only, one instant) → each check of verify_ledger.py and verify_runs.py → its findings as they come

The ledger of a large service has tens of millions of rows. Sorting and hashing is the server's, on its disk; what comes
over here are findings, through a cursor. It changes nothing and locks nobody; what it costs is a snapshot that stays
open for its length, and the reads: 10,000,000 rows of history and as many of audit took 230 seconds on two busy cores,
the longest check 99 of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from db import one
from refresh.schedule import slot_at
from refresh.verify_kinds import KINDS, Check
from refresh.verify_ledger import LEDGER_CHECKS
from refresh.verify_runs import RUN_CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg

CHECKS = (*LEDGER_CHECKS, *RUN_CHECKS)

GRACE = timedelta(minutes=10)
"""A scan takes its time to reach the last user: a million take some minutes."""
ROWS_AT_ONCE = 1_000
"""Findings fetched in one round trip."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the checks take for granted.

    Attributes:
        interval: the width of a slot.
        cron: a timetable in UTC that takes the interval's place.
        enabled: `CREDIT_REFRESH_ENABLED`: runs move, and scans come.
        dry_run: `CREDIT_REFRESH_DRY_RUN`: scheduled runs refresh nobody.
        top_ups: the host app sells or returns credits: a balance that rises is no finding.
    """

    interval: timedelta
    cron: str | None
    enabled: bool = True
    dry_run: bool = False
    top_ups: bool = False

    def overdue_before(self, now: datetime) -> datetime:
        """Whoever was due before this instant has been left out by two scans."""
        if self.cron is None:
            return now - 2 * self.interval - GRACE
        last = slot_at(now - GRACE, self.interval, self.cron)
        return slot_at(last - timedelta(microseconds=1), self.interval, self.cron)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that cannot be right.

    Attributes:
        name: which check found it; one of `KINDS`.
        user: the host app's id of the user; None where it is about no user.
        run_id: the run that it is about, or that wrote the row.
        text: what is wrong, with the facts.
        way_out: what an operator can do.
    """

    name: str
    user: str | None
    run_id: str | None
    text: str
    way_out: str

    @property
    def about(self) -> str:
        """The user or the run, for people."""
        return f"user {self.user}" if self.user is not None else f"run {self.run_id}"

    def facts(self) -> dict[str, object]:
        """What a log line or a JSON answer says of it."""
        return {
            "finding": self.name,
            "userId": self.user,
            "runId": self.run_id,
            "text": self.text,
            "wayOut": self.way_out,
        }


@dataclass(frozen=True, slots=True)
class Books:
    """What is read, and when. Counts are rows.

    Attributes:
        at: the instant that all checks see.
        since: from when on the books are whole; None: retention has dropped nothing.
        history: rows of the ledger, dry runs included.
        audit: rows of the audit log.
        users: users there are.
    """

    at: datetime
    since: datetime | None
    history: int
    audit: int
    users: int


# All checks see one instant. A check may take minutes, and fetch its findings at a reader's pace (`| less`). A sort or
# a hash takes this much memory on the server before it goes to disk. All findings are wanted, not the first ones soon.
_ISOLATE = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
_PATIENCE = """
SELECT
    set_config('statement_timeout', '6h', true), set_config('idle_in_transaction_session_timeout', '6h', true),
    set_config('work_mem', '64MB', true), set_config('cursor_tuple_fraction', '1', true)
"""
_BOOKS = """
SELECT
    now() AS at, (SELECT books_since FROM settings) AS since,
    (SELECT count(*) FROM credit_refresh_histories) AS history,
    (SELECT count(*) FROM credit_audit_logs) AS audit, (SELECT count(*) FROM users) AS users
"""
# The id that people know, looked up for the findings alone.
_NAMED = """
SELECT f.*, coalesce(
    (SELECT u.external_id FROM users AS u WHERE u.id = f.user_id), 'deleted, once number ' || f.user_id
) AS "user"
FROM ({check}) AS f
"""
_AUDIT = "INSERT INTO credit_audit_logs (actor, action, detail) VALUES (%(actor)s, 'verified', %(detail)s)"


def open_books(connection: psycopg.Connection[Any]) -> Books:
    """Make a transaction a reader of one instant, without time limits, and count what there is to read.

    Args:
        connection: in a transaction that has done nothing yet.
    """
    connection.execute(_ISOLATE)
    connection.execute(_PATIENCE)
    with connection.cursor(row_factory=class_row(Books)) as cursor:
        return one(cursor.execute(_BOOKS))


def find(connection: psycopg.Connection[Any], check: Check, terms: Terms, books: Books) -> Iterator[Finding]:
    """The findings of one check, as the server comes upon them.

    Args:
        connection: in the transaction of `open_books()`.
        check: one of `CHECKS`.
        terms: what the environment says.
        books: what `open_books()` returned.
    """
    parameters = {
        "enabled": terms.enabled,
        "dry_run": terms.dry_run,
        "top_ups": terms.top_ups,
        "overdue_before": terms.overdue_before(books.at),
    }
    with connection.cursor("verify", row_factory=dict_row) as cursor:
        cursor.itersize = ROWS_AT_ONCE
        cursor.execute(_NAMED.format(check=check.query), parameters)
        for row in cursor:
            yield _finding(row)


def _finding(row: dict[str, Any]) -> Finding:
    kind = KINDS[row["finding"]]
    run_id = None if row["run_id"] is None else str(row["run_id"])
    values = {**row, "run": run_id}
    return Finding(row["finding"], row["user"], run_id, kind.text.format_map(values), kind.way_out.format_map(values))


@dataclass(slots=True)
class Report:
    """What an audit came to. Seconds are for whoever measures them to set."""

    books: Books
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def findings(self) -> int:
        """All there were, shown or not."""
        return self.counts.total()

    @property
    def summary(self) -> str:
        """The audit in a sentence."""
        books = self.books
        read = f"{books.history:,} rows of history, {books.audit:,} of audit, {books.users:,} users checked"
        if books.since is not None:
            read += f", whole since {books.since:%Y-%m-%d}"
        if not self.counts:
            return f"{read}; nothing found."
        found = ", ".join(f"{count:,} {name}" for name, count in self.counts.items())
        return f"{read}; {self.findings:,} found: {found}."


def verify(
    connection: psycopg.Connection[Any],
    terms: Terms,
    *,
    limit: int,
    on_finding: Callable[[Finding], None],
    on_check: Callable[[Check], None] = lambda _check: None,
) -> Report:
    """Run all checks.

    Args:
        connection: in a transaction that has done nothing yet, and does nothing else.
        terms: what the environment says.
        limit: findings of one name that are told; the others are counted.
        on_finding: gets each of those, as it comes.
        on_check: is told which check begins.
    """
    report = Report(open_books(connection))
    for check in CHECKS:
        on_check(check)
        for finding in find(connection, check, terms, report.books):
            report.counts[finding.name] += 1
            if report.counts[finding.name] <= limit:
                on_finding(finding)
    return report


def record(connection: psycopg.Connection[Any], report: Report, *, actor: str) -> None:
    """Keep in the audit log that the books were read, and what that came to.

    Args:
        connection: in a transaction of its own: that of the audit reads only.
        report: what was found.
        actor: who had it done.
    """
    detail = {"findings": dict(report.counts), "seconds": round(report.seconds, 3)}
    connection.execute(_AUDIT, {"actor": actor, "detail": Jsonb(detail)})
