"""SQL comes with bound parameters: what a statement is made of stands in the code, what comes from outside is bound.

Read from the syntax tree: each text that is given to a database is a literal, a constant of a module, or put together
from these. A constant may be an f-string of constants. Names and values that SQL cannot bind go through psycopg's
`Identifier` and `Literal`, in a template that is a constant itself.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest

from settings import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = sorted(
    path
    for folder in (".", "api", "api/routes", "cli", "embedded", "models", "refresh", "tasks", "migrations")
    for path in (CHECKOUT / folder).glob("*.py")
)
TAKE_SQL = {"execute", "executemany", "copy", "exec_driver_sql", "stream", "text", "DDL"}
QUOTES = {"Identifier", "Literal", "Placeholder"}
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*")

# What this test cannot follow: texts that another function or class hands on, with the place where they are made. The
# scripts in migrations/versions/ take nothing in but the schema's name, which settings.py has checked.
ALLOWED = {
    "migrations/env.py: f'CREATE SCHEMA \"{schema}\"'": "the schema's name",
    "migrations/env.py: text(f'CREATE SCHEMA \"{schema}\"')": "the same",
    "refresh/closing.py: _numbered(statement)": "constants of batch.py, isolation.py, regrid.py, reversal.py, apply.py",
    "refresh/imports.py: statements.": "identifiers and types of the columns that import_columns.py lists",
    "refresh/plans.py: query": "_READ, _READ_LOCKED",
    "refresh/retention.py: statement": "_DELETE_PLANNED, _DELETE_BATCHES",
    "refresh/retention_drop.py: SQL('LOCK TABLE {} IN {} MODE').format(tables, SQL(mode))": "the mode is a literal",
    "refresh/retention_drop.py: _BOUND.format(**names)": "identifiers, and how the default partition is stored",
    "refresh/retention_drop.py: _CREATE.format(": "the same",
    "refresh/retention_drop.py: _FILL.format(new=Identifier(name), rows=": "the constants of retention_needs.py",
    "refresh/retry.py: count": "texts of the module, by what the run has done",
    "refresh/rollback.py: statement": "_SUBJECT, _SUBJECT_LOCKED",
    "refresh/run_detail.py: statement": "constants of the module",
    "refresh/runs.py: _CUT.format(selected=chosen.text)": "the constants of selection.py, apply.py, rollback.py, ...",
    "refresh/user_settings.py: statement": "constants of the module",
    "refresh/verify.py: _NAMED.format(check=check.query)": "the constants of verify_*.py",
    "refresh/windows.py: query": "constants of the module",
}


class Scope:
    """The names of one function, with what is assigned to them in it."""

    def __init__(self, function: ast.AST) -> None:
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function):
            for target, value in _assignments(node):
                self.assigned.setdefault(target, []).append(value)

    def fixed(self, node: ast.expr | None) -> bool:  # noqa: C901, PLR0911 - a line for each form
        """Whether a text is made of what stands in the code alone, or quoted."""
        match node:
            case ast.Constant(value=str()):
                return True
            case ast.Name(id=name) if name in self.assigned:
                return all(map(self.fixed, self.assigned[name]))
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return CONSTANT.fullmatch(name) is not None
            case ast.JoinedStr(values=parts):
                return all(self.fixed(part.value) for part in parts if isinstance(part, ast.FormattedValue))
            case ast.BinOp(left=left, op=ast.Add(), right=right) | ast.IfExp(body=left, orelse=right):
                return self.fixed(left) and self.fixed(right)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Dict(values=parts):
                return all(map(self.fixed, parts))
            case ast.Subscript(value=value) | ast.Starred(value=value):
                return self.fixed(value)
            case ast.GeneratorExp(elt=part):
                return self.fixed(part)
            case ast.Call(func=ast.Name(id=name)) if name in QUOTES:
                return True
            case ast.Call(func=ast.Name(id="SQL" | "text"), args=[text]):
                return self.fixed(text)
            case ast.Call(func=ast.Attribute(value=template, attr="format" | "join")):
                parts = [*node.args, *(word.value for word in node.keywords)]
                return self.fixed(template) and all(map(self.fixed, parts))
        return False


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value)
            | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
        ):
            yield name, value
        case ast.AugAssign(target=ast.Name(id=name), value=value):
            yield name, value
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            yield from (
                (name.id, value) for name, value in zip(names, values, strict=True) if isinstance(name, ast.Name)
            )
        case ast.For(target=ast.Name(id=name), iter=ast.Tuple(elts=values)):
            yield from ((name, value) for value in values)


def offenders(path: Path, source: str) -> Iterator[str]:
    """What a file gives to a database that is not fixed."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            scope = Scope(function)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and node.args and _name(node.func) in TAKE_SQL:
                    found = f"{path.relative_to(CHECKOUT)}: {ast.unparse(node.args[0])}"
                    if not scope.fixed(node.args[0]):
                        yield found


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_every_statement_is_made_of_what_stands_in_the_code() -> None:
    found = [offender for path in FILES for offender in offenders(path, path.read_text())]
    assert [offender for offender in found if not offender.startswith(tuple(ALLOWED))] == []
    assert [key for key in ALLOWED if not any(offender.startswith(key) for offender in found)] == []


@pytest.mark.parametrize(
    ("body", "sound"),
    [
        ("c.execute('SELECT %s', (x,))", True),
        ("c.execute(_QUERY, {'x': x})", True),
        ("c.execute(_QUERY + ' LIMIT 1')", True),
        ("c.execute(f'{_QUERY} {OTHER}')", True),
        ("q = _A if x else _B\n    c.execute(q)", True),
        ("c.execute(SQL('DROP TABLE {}').format(Identifier(x)))", True),
        ("c.execute(f'SELECT {x}')", False),
        ("c.execute('SELECT ' + x)", False),
        ("c.execute('SELECT %s' % x)", False),
        ("c.execute('SELECT {}'.format(x))", False),
        ("q = f'SELECT {x}'\n    c.execute(q)", False),
        ("q = _A\n    q = x\n    c.execute(q)", False),
        ("q = _A\n    q += x\n    c.execute(q)", False),
        ("c.execute(SQL(x))", False),
        ("c.execute(SQL('SELECT {}').format(SQL(x)))", False),
        ("c.execute(x)", False),
        ("c.execute(' '.join([_A, x]))", False),
    ],
)
def test_it_sees_what_is_put_together_from_outside(body: str, sound: bool) -> None:  # noqa: FBT001 - a parameter
    found = list(offenders(CHECKOUT / "example.py", f"def example(c, x):\n    {body}\n"))
    assert (found == []) is sound
