"""The plans of the product's own statements: its calls are recorded, undone, and their statements explained."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import psycopg

from refresh import closing
from tests.integration.test_history import nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Mode = Literal["force_custom_plan", "force_generic_plan"]
"""Planned for the values at hand, or once for all values: PostgreSQL takes either for a prepared statement."""


class _Recording(psycopg.Cursor[Any]):
    """Prepares every statement, and remembers it with its values."""

    asked: list[tuple[str, Any]]

    def execute(self, query: Any, params: Any = None, **_: Any) -> _Recording:
        self.asked.append((query, params or {}))
        return super().execute(query, params, prepare=True)


class _RecordingRaw(psycopg.RawCursor[Any]):
    """The same for statements that are numbered already (closing.py)."""

    asked: list[tuple[str, Any]]

    def execute(self, query: Any, params: Any = None, **_: Any) -> _RecordingRaw:
        self.asked.append((query, params))
        return super().execute(query, params, prepare=True)


@dataclass(frozen=True)
class Explained:
    """A statement and what PostgreSQL did for it."""

    text: str
    root: dict[str, Any]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return nodes(self.root)

    @property
    def blocks(self) -> int:
        """Blocks looked at, in memory or on disk."""
        return int(self.root["Shared Hit Blocks"] + self.root["Shared Read Blocks"])

    def blocks_of(self, table: str) -> int:
        """Those looked at to find rows of a table, through an index or not."""
        found = [node for node in self.nodes if node.get("Relation Name") == table and "Scan" in node["Node Type"]]
        return sum(int(node["Shared Hit Blocks"] + node["Shared Read Blocks"]) for node in found)

    def indexes(self, table: str) -> set[str]:
        """The indexes of a table that were gone through."""
        names = {node["Index Name"] for node in self.nodes if node["Actual Loops"] and "Index Name" in node}
        return {name for name in names if re.match(rf"(ix|pk|uq)_{table}(_|$)", name)}

    def read_whole(self) -> set[str]:
        """The tables that are read whole, or would be where the statement came to it."""
        return {node["Relation Name"] for node in self.nodes if node["Node Type"] == "Seq Scan"}


class Explainer:
    """Explains what calls of the product ask. Its plans are kept, as a worker keeps them.

    Args:
        caller: makes the calls.
        session: explains; none but our own statements are prepared there.
    """

    def __init__(self, caller: psycopg.Connection[Any], session: psycopg.Connection[Any]) -> None:
        self._caller = caller
        self._session = session
        self._names: dict[str, str] = {}

    def explain(self, call: Callable[[psycopg.Connection[Any]], object]) -> list[Explained]:
        """Each statement of a call, explained while the call is made once more; nothing remains of it."""
        asked = self._record(call)
        self._replay(asked)  # a session's first look at a table reads the catalogue, too
        return self._replay(asked)

    def _replay(self, asked: list[tuple[str, str, list[Any]]]) -> list[Explained]:
        found = []
        with self._session.transaction(force_rollback=True):
            for text, name, values in asked:
                places = f"({', '.join(['%s'] * len(values))})" if values else ""
                explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE {name} {places}"
                (row,) = psycopg.ClientCursor(self._session).execute(explain, values or None).fetchall()
                found.append(Explained(text, row[0][0]["Plan"]))
        return found

    def _record(self, call: Callable[[psycopg.Connection[Any]], object]) -> list[tuple[str, str, list[Any]]]:
        asked: list[tuple[str, Any]] = []
        self._caller.cursor_factory = type("Recorder", (_Recording,), {"asked": asked})
        raw = type("RawRecorder", (_RecordingRaw,), {"asked": asked})
        with patch.object(closing, "RawCursor", raw), self._caller.transaction(force_rollback=True):
            call(self._caller)
            prepared = "SELECT statement, parameter_types::text[] FROM pg_prepared_statements"
            types = dict(psycopg.Cursor(self._caller).execute(prepared).fetchall())
        recorded = []
        for query, values in asked:
            text, names = numbered(query) if isinstance(values, dict) else (query, range(len(values)))
            recorded.append((query, self._prepare(text, types[text]), [values[name] for name in names]))
        return recorded

    def _prepare(self, text: str, types: list[str]) -> str:
        if text not in self._names:
            self._names[text] = f"explained_{len(self._names)}"
            listed = f"({', '.join(types)})" if types else ""
            psycopg.ClientCursor(self._session).execute(f"PREPARE {self._names[text]} {listed} AS {text}")
        return self._names[text]


def numbered(query: str) -> tuple[str, list[str]]:
    """The query as psycopg sends it, and the names of its parameters in their order."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", query)))
    if not names:
        return query, []
    return re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", query).replace("%%", "%"), names


@contextmanager
def explaining(dsn: str, mode: Mode) -> Iterator[Explainer]:
    """A session set as the product's are (db.py)."""
    options = f"-c search_path=credits -c timezone=UTC -c jit=off -c plan_cache_mode={mode}"
    with (
        psycopg.connect(dsn, autocommit=True, options=options) as caller,
        psycopg.connect(dsn, autocommit=True, options=options, prepare_threshold=None) as session,
    ):
        yield Explainer(caller, session)
