"""Roles with few rights, as `credits db grants` makes them, in a test's own database."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from psycopg.sql import SQL, Identifier
from sqlalchemy import make_url

from refresh.grants import grants

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

    from refresh.grants import Kind


@contextmanager
def made(owner: psycopg.Connection[Any], kind: Kind) -> Iterator[str]:
    """A role that may log in and has the rights of its kind alone; the name is the database's own."""
    role = f"{kind}_of_{owner.info.dbname}"
    owner.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
    try:
        for part in grants("credits", [(kind, role)]):
            for statement in part.statements:
                owner.execute(statement.encode())
        yield role
    finally:
        owner.execute(SQL("DROP OWNED BY {}").format(Identifier(role)))
        owner.execute(SQL("DROP ROLE {}").format(Identifier(role)))


def url(database_url: str, role: str) -> str:
    """The same database for another role."""
    return make_url(database_url).set(username=role).render_as_string(hide_password=False)
