"""Endpoints of outgoing webhooks: added, changed and removed, each with a row of the audit log."""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID  # noqa: TC003 - the same

import httpx
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db import one
from refresh.errors import NotFoundError, RefusedError
from refresh.webhook_events import EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import psycopg

    from refresh.webhook_targets import Target

Format = Literal["standard", "slack", "discord"]
FORMATS: tuple[Format, ...] = ("standard", "slack", "discord")

DEFAULT_EVENTS: Mapping[str, tuple[str, ...]] = {
    "standard": ("run.finished", "user.held", "verify.finding"),
    "slack": ("notice.run_failed", "verify.finding"),
    "discord": ("notice.run_failed", "verify.finding"),
}
"""What an endpoint is told unless it says what it wants: of each user never."""
NO_GRANTS_DAYS_MAX = 366
DESCRIPTION_MAX = 200
ENDPOINTS_MAX = 20
"""Each is one more row for each event, written by the batch itself."""
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint as people see it: without its secret.

    Attributes:
        url: of a chat without its path, which is a secret.
        inactive_reason: why it was switched off; None: by somebody, or it is active.
        failures: attempts in a row that have failed because of it; with it when it is tried again.
    """

    id: UUID
    url: str
    format: Format
    events: list[str]
    no_grants_days: int | None
    description: str | None
    active: bool
    inactive_reason: str | None
    created_by: str
    created_at: datetime
    failures: int
    resume_at: datetime | None

    @property
    def shown_url(self) -> str:
        """The address, of a chat without what may be nobody's but the chat's."""
        if self.format == "standard":
            return self.url
        read = httpx.URL(self.url)
        return f"{read.scheme}://{read.netloc.decode('ascii')}/…"

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "id": str(self.id),
            "url": self.shown_url,
            "format": self.format,
            "events": self.events,
            "noGrantsDays": self.no_grants_days,
            "description": self.description,
            "active": self.active,
            "inactiveReason": self.inactive_reason,
            "createdBy": self.created_by,
            "createdAt": self.created_at.isoformat(),
            "failures": self.failures,
            "resumeAt": self.resume_at.isoformat() if self.resume_at else None,
        }


_COLUMNS = """
id, url, format, events, no_grants_days, description, active, inactive_reason, created_by, created_at, failures,
resume_at
"""
_LIST = f"SELECT {_COLUMNS} FROM webhook_endpoints ORDER BY created_at, id"  # noqa: S608 - a text of this module
_ONE = f"SELECT {_COLUMNS} FROM webhook_endpoints WHERE id = %(id)s"  # noqa: S608 - the same
_ONE_LOCKED = f"{_ONE} FOR NO KEY UPDATE"


def list_endpoints(connection: psycopg.Connection[Any]) -> list[Endpoint]:
    """All of them, the oldest first."""
    with connection.cursor(row_factory=class_row(Endpoint)) as cursor:
        return cursor.execute(_LIST).fetchall()


def read_endpoint(connection: psycopg.Connection[Any], endpoint_id: UUID, *, locked: bool = False) -> Endpoint:
    """One of them.

    Args:
        connection: with `locked`, in a transaction.
        endpoint_id: which.
        locked: whoever else changes it waits until the transaction's end.

    Raises:
        NotFoundError: there is none.
    """
    with connection.cursor(row_factory=class_row(Endpoint)) as cursor:
        found = cursor.execute(_ONE_LOCKED if locked else _ONE, {"id": endpoint_id}).fetchone()
    if found is None:
        raise NotFoundError(f"there is no webhook endpoint {endpoint_id}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an endpoint is to be.

    Attributes:
        target: where it is; `check_target()` made it.
        format: `standard` is signed JSON; the others are a chat's.
        events: what it is told; None: `DEFAULT_EVENTS`.
        no_grants_days: it is told when nobody was refreshed for so many days; None: it is not.
        description: for people.

    Raises:
        RefusedError: it contradicts itself.
    """

    target: Target
    format: Format = "standard"
    events: tuple[str, ...] | None = None
    no_grants_days: int | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        _check(self.format, self.told, self.no_grants_days, self.description)

    @property
    def told(self) -> list[str]:
        """The events, each once."""
        return _in_order(DEFAULT_EVENTS[self.format] if self.events is None else self.events)


def _in_order(events: Iterable[str]) -> list[str]:
    """Each once, in the order of `EVENTS`; what is unknown comes last."""
    wanted = dict.fromkeys(events)
    return [event for event in EVENTS if event in wanted] + [event for event in wanted if event not in EVENTS]


def _check(format_: str, events: list[str], no_grants_days: int | None, description: str | None) -> None:
    unknown = [event for event in events if event not in EVENTS]
    if unknown:
        raise RefusedError(f"there is no event {unknown[0]!r}: known are {', '.join(EVENTS)}")
    if not events and no_grants_days is None:
        raise RefusedError("an endpoint that is told of nothing: name an event, or no-grants days")
    if format_ != "standard" and "user.refreshed" in events:
        raise RefusedError("user.refreshed is a message for each user, which no chat takes: use the format 'standard'")
    if no_grants_days is not None and not 1 <= no_grants_days <= NO_GRANTS_DAYS_MAX:
        raise RefusedError(f"{no_grants_days} no-grants days: from 1 to {NO_GRANTS_DAYS_MAX}")
    if description is not None and len(description) > DESCRIPTION_MAX:
        raise RefusedError(f"the description is longer than {DESCRIPTION_MAX} characters")


# Counted and added by one at a time.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(current_schema() || '.webhook_endpoints', 0))"
_COUNT = "SELECT count(*) FROM webhook_endpoints"
_ADD = f"""
INSERT INTO webhook_endpoints (url, secret, format, events, no_grants_days, description, created_by)
VALUES (
    %(url)s, %(secret)s, %(format)s, %(events)s, %(no_grants_days)s, %(description)s, %(actor)s
)
RETURNING {_COLUMNS}
"""  # noqa: S608 - a text of this module alone
_CHANGE = f"""
UPDATE webhook_endpoints SET
    url = %(url)s, events = %(events)s, no_grants_days = %(no_grants_days)s, description = %(description)s,
    active = %(active)s, inactive_reason = CASE WHEN NOT %(active)s THEN inactive_reason END,
    -- Whoever changes it wants to know at once whether it works now.
    failures = 0, resume_at = NULL,
    silence_checked_at = CASE WHEN no_grants_days IS NOT DISTINCT FROM %(no_grants_days)s THEN silence_checked_at END
WHERE id = %(id)s
RETURNING {_COLUMNS}
"""  # noqa: S608 - the same
_REMOVE = "DELETE FROM webhook_endpoints WHERE id = %(id)s"
_AUDIT = "INSERT INTO credit_audit_logs (actor, action, detail) VALUES (%(actor)s, %(action)s, %(detail)s)"


def add_endpoint(connection: psycopg.Connection[Any], wanted: Wanted, *, actor: str) -> tuple[Endpoint, str | None]:
    """Add an endpoint. It is told of what happens from now on.

    Args:
        connection: in a transaction.
        wanted: what it is to be.
        actor: who asks.

    Returns:
        The endpoint, and the secret that its messages are signed with, which nobody is told again; a chat has none.

    Raises:
        RefusedError: there are as many as there may be.
    """
    connection.execute(_LOCK)
    (count,) = one(connection.execute(_COUNT))
    if count >= ENDPOINTS_MAX:
        raise RefusedError(f"there are {count} webhook endpoints already, the most that there may be: remove one")
    secret = None
    if wanted.format == "standard":
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
    values = {
        "url": str(wanted.target.url),
        "secret": secret,
        "format": wanted.format,
        "events": wanted.told,
        "no_grants_days": wanted.no_grants_days,
        "description": wanted.description,
        "actor": actor,
    }
    with connection.cursor(row_factory=class_row(Endpoint)) as cursor:
        added = one(cursor.execute(_ADD, values))
    _note(connection, "webhook_added", added, actor)
    return added, secret


def change_endpoint(
    connection: psycopg.Connection[Any],
    endpoint_id: UUID,
    changes: Mapping[str, Any],
    *,
    actor: str,
    target: Target | None = None,
) -> Endpoint:
    """Change an endpoint; switched on again, it gets what has waited for it, up to three days' worth.

    Args:
        connection: in a transaction.
        endpoint_id: which.
        changes: of `events`, `no_grants_days`, `description` and `active`, those that are to be others.
        actor: who asks.
        target: another address; `check_target()` made it.

    Raises:
        NotFoundError: there is none.
        RefusedError: it would contradict itself.
    """
    before = read_endpoint(connection, endpoint_id, locked=True)
    kept = {name: getattr(before, name) for name in ("url", "events", "no_grants_days", "description", "active")}
    values = kept | dict(changes) | ({"url": str(target.url)} if target else {})
    values["events"] = _in_order(values["events"])
    _check(before.format, values["events"], values["no_grants_days"], values["description"])
    with connection.cursor(row_factory=class_row(Endpoint)) as cursor:
        changed = one(cursor.execute(_CHANGE, {**values, "id": endpoint_id}))
    _note(connection, "webhook_changed", changed, actor)
    return changed


def remove_endpoint(connection: psycopg.Connection[Any], endpoint_id: UUID, *, actor: str) -> Endpoint:
    """Remove an endpoint. What was not sent is not sent any more, and deleted in the night.

    Args:
        connection: in a transaction.
        endpoint_id: which.
        actor: who asks.

    Raises:
        NotFoundError: there is none.
    """
    removed = read_endpoint(connection, endpoint_id, locked=True)
    connection.execute(_REMOVE, {"id": endpoint_id})
    _note(connection, "webhook_removed", removed, actor)
    return removed


def _note(connection: psycopg.Connection[Any], action: str, endpoint: Endpoint, actor: str) -> None:
    detail = {
        "endpointId": str(endpoint.id),
        "host": httpx.URL(endpoint.url).host,
        "format": endpoint.format,
        "events": endpoint.events,
        "noGrantsDays": endpoint.no_grants_days,
        "active": endpoint.active,
    }
    connection.execute(_AUDIT, {"actor": actor, "action": action, "detail": Jsonb(detail)})
