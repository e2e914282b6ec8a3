"""Keys of the HTTP API: made, listed, revoked and checked.

A key reads `crs_<prefix>_<secret>`. The prefix names it, in lists, logs and the audit log; the secret is 256 random
bits. The table holds the SHA-256 of the whole key and no more: a slow hash makes up for passwords that can be guessed,
and 256 bits cannot, whatever the hash costs. What a scope opens is the business of whoever asks (api/callers.py).
"""

from __future__ import annotations

import hmac
import re
import secrets
import string
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db import one
from refresh.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    import psycopg

SCOPES: Final = ("read", "support", "admin")
NAME_MAX: Final = 100
KEYS_MAX: Final = 1_000
"""Keys that a list shows: nobody has as many."""

_MARK = "crs"
_PREFIX_LENGTH = 8
_SECRET_LENGTH = 43
"""Of 62 letters and digits: 256 bits. Without - and _, so that a double click takes the whole of it."""
_KEY = re.compile(rf"{_MARK}_([a-z0-9]{{{_PREFIX_LENGTH}}})_[A-Za-z0-9]{{{_SECRET_LENGTH}}}")
_NAMED = re.compile(rf"(?:{_MARK}_)?([a-z0-9]{{{_PREFIX_LENGTH}}})(?:_[A-Za-z0-9]*)?")


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key.

    Attributes:
        id: of its row.
        prefix: the 8 characters that name it.
        name: for people.
        scopes: what it may.
        created_at: when it was made.
        created_by: by whom.
        expires_at: it opens nothing from then on; None: it does not expire.
        last_used_at: when it last opened something, to the minute.
        revoked_at: when it was revoked.
        revoked_by: by whom.
        expired: whether `expires_at` has passed, by the database's clock.
    """

    id: UUID
    prefix: str
    name: str
    scopes: list[str]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None
    revoked_by: str | None
    expired: bool

    @property
    def shown(self) -> str:
        """How people see it: the beginning of the key."""
        return f"{_MARK}_{self.prefix}"

    @property
    def state(self) -> str:
        """Whether it opens anything: active, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expired else "active"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "id": str(self.id),
            "prefix": self.shown,
            "name": self.name,
            "scopes": self.scopes,
            "state": self.state,
            "createdAt": self.created_at.isoformat(),
            "createdBy": self.created_by,
            "expiresAt": self.expires_at and self.expires_at.isoformat(),
            "lastUsedAt": self.last_used_at and self.last_used_at.isoformat(),
            "revokedAt": self.revoked_at and self.revoked_at.isoformat(),
            "revokedBy": self.revoked_by,
        }


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made.

    Attributes:
        key: the text that opens; nobody can see it again, and no `repr` shows it.
        stored: what is known of it from now on.
    """

    key: str = field(repr=False)
    stored: Key


_COLUMNS = """
id, prefix, name, scopes, created_at, created_by, expires_at, last_used_at, revoked_at, revoked_by,
coalesce(expires_at <= now(), false) AS expired
"""
_PASSED = "SELECT %(at)s::timestamptz <= now()"
# A prefix that is taken already (41 bits) is refused by its unique key, and the command can be repeated.
_CREATE = f"""
INSERT INTO api_keys (prefix, secret_hash, name, scopes, created_by, expires_at)
VALUES (%(prefix)s, %(hash)s, %(name)s, %(scopes)s, %(actor)s, %(expires_at)s)
RETURNING {_COLUMNS}
"""  # noqa: S608 - constants
_LIST = f"""
SELECT {_COLUMNS} FROM api_keys
ORDER BY revoked_at IS NOT NULL, created_at DESC, id
LIMIT %(limit)s
"""  # noqa: S608 - constants
_FIND = f"""
SELECT {_COLUMNS} FROM api_keys
WHERE prefix = %(prefix)s OR id = %(id)s
FOR NO KEY UPDATE
"""  # noqa: S608 - constants
_REVOKE = f"""
UPDATE api_keys SET revoked_at = now(), revoked_by = %(actor)s WHERE id = %(id)s
RETURNING {_COLUMNS}
"""  # noqa: S608 - constants
_AUDIT = "INSERT INTO credit_audit_logs (actor, action, detail) VALUES (%(actor)s, %(action)s, %(detail)s)"
_CHECK = f"""
SELECT secret_hash, coalesce(last_used_at < now() - interval '1 minute', true) AS rested, {_COLUMNS}
FROM api_keys
WHERE prefix = %(prefix)s AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
"""  # noqa: S608 - constants
# Once a minute: else each request would write, and requests of one key would wait for each other. Whoever finds the row
# locked goes on; the other is writing the same.
_USED = """
UPDATE api_keys SET last_used_at = now()
WHERE id = (
    SELECT id FROM api_keys
    WHERE id = %(id)s AND coalesce(last_used_at < now() - interval '1 minute', true)
    FOR NO KEY UPDATE SKIP LOCKED
)
"""


def create_key(
    connection: psycopg.Connection[Any], *, name: str, scopes: Iterable[str], expires_at: datetime | None, actor: str
) -> NewKey:
    """Make a key; the audit log keeps who did.

    Args:
        connection: in a transaction.
        name: for people: who or what will use it.
        scopes: of `SCOPES`, one at least.
        expires_at: when it opens nothing any more; None: it does not expire.
        actor: who asks, for the audit log.

    Raises:
        RefusedError: no name, no scope, one that there is not, or an end that has passed.
    """
    name = name.strip()
    if not name or len(name) > NAME_MAX or not name.isprintable():
        raise RefusedError(f"a key needs a name of 1 to {NAME_MAX} printable characters: who or what will use it")
    asked = set(scopes)
    if not asked or not asked <= set(SCOPES):
        unknown = ", ".join(repr(scope) for scope in sorted(asked - set(SCOPES)))
        raise RefusedError(f"{unknown or 'no scope'}: a key needs one or more of {', '.join(SCOPES)}")
    if expires_at is not None and one(connection.execute(_PASSED, {"at": expires_at}))[0]:
        raise RefusedError(f"{expires_at.isoformat()} has passed: a key expires in the future")
    prefix = _random(string.ascii_lowercase + string.digits, _PREFIX_LENGTH)
    key = f"{_MARK}_{prefix}_{_random(string.ascii_letters + string.digits, _SECRET_LENGTH)}"
    values = {
        "prefix": prefix,
        "hash": _hash(key),
        "name": name,
        "scopes": [scope for scope in SCOPES if scope in asked],
        "expires_at": expires_at,
        "actor": actor,
    }
    with connection.cursor(row_factory=class_row(Key)) as cursor:
        stored = one(cursor.execute(_CREATE, values))
    _audit(connection, "key_created", stored, actor)
    return NewKey(key, stored)


def list_keys(connection: psycopg.Connection[Any]) -> list[Key]:
    """All keys, those that were revoked last, and of each kind the newest first."""
    with connection.cursor(row_factory=class_row(Key)) as cursor:
        return cursor.execute(_LIST, {"limit": KEYS_MAX}).fetchall()


def revoke_key(connection: psycopg.Connection[Any], text: str, *, actor: str) -> Key:
    """Revoke a key: from the end of the transaction on it opens nothing. The audit log keeps who did.

    Args:
        connection: in a transaction.
        text: its prefix, with `crs_` or without; its id; or the whole of a key that was found where it should not be.
        actor: who asks, for the audit log.

    Raises:
        RefusedError: there is no such key, or it was revoked already.
    """
    named = _NAMED.fullmatch(text.strip())
    prefix = named and named[1]
    with connection.cursor(row_factory=class_row(Key)) as cursor:
        key = cursor.execute(_FIND, {"prefix": prefix, "id": _uuid(text)}).fetchone()
        if key is None:
            # What was typed may be a key with a slip in it, so it is not repeated.
            said = f" {_MARK}_{prefix}" if prefix else " of that name"
            raise RefusedError(f"there is no key{said}: `credits keys list` shows the beginning of each")
        if key.revoked_at is not None:
            raise RefusedError(f"{key.shown} was revoked already, on {key.revoked_at.isoformat()} by {key.revoked_by}")
        revoked = one(cursor.execute(_REVOKE, {"id": key.id, "actor": actor}))
    _audit(connection, "key_revoked", revoked, actor)
    return revoked


def check_key(connection: psycopg.Connection[Any], key: str) -> Key | None:
    """Who comes with this key; None: nobody whom it still opens anything for.

    One statement; a second one notes the use, once a minute at most.

    Args:
        connection: in autocommit.
        key: as it came; anything else than a key costs no statement.
    """
    read = _KEY.fullmatch(key)
    if read is None:
        return None
    row = connection.execute(_CHECK, {"prefix": read[1]}).fetchone()
    if row is None:
        return None
    stored_hash, rested, *columns = row
    if not hmac.compare_digest(stored_hash, _hash(key)):
        return None
    found = Key(*columns)
    if rested:
        connection.execute(_USED, {"id": found.id})
    return found


def _random(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


def _hash(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text.strip())
    except ValueError:
        return None


def _audit(connection: psycopg.Connection[Any], action: str, key: Key, actor: str) -> None:
    detail = {name: value for name, value in key.facts().items() if name in {"id", "prefix", "name", "scopes"}}
    if key.expires_at is not None:
        detail["expiresAt"] = key.expires_at.isoformat()
    connection.execute(_AUDIT, {"actor": actor, "action": action, "detail": Jsonb(detail)})
