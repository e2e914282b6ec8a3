"""What is particular to one user: the hold, the day of the month, the amount and the time zone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime  # noqa: TC003 - psycopg's row factory builds the class at run time
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from db import one
from refresh import holds
from refresh.errors import NotFoundError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import psycopg

HOLD = frozenset({"credit_refresh_hold", "hold_reason", "hold_until"})
"""What makes the hold, and is set together."""


class ChangedError(RefusedError):
    """The settings are not those that the request was made for."""


@dataclass(frozen=True, slots=True)
class UserSettings:
    """One user's settings; None: as the plan says.

    Attributes:
        credit_refresh_day: 1 to 31; makes a rolling user monthly.
        custom_credit_amount: in the place of the plan's.
        timezone: an IANA name.
        next_refresh_at: follows from them, and from the plan; nobody's to set here.
    """

    external_id: str
    credit_refresh_hold: bool
    hold_reason: str | None
    hold_until: datetime | None
    credit_refresh_day: int | None
    custom_credit_amount: int | None
    timezone: str | None
    next_refresh_at: datetime | None

    @property
    def version(self) -> str:
        """A digest of what can be set: two reads with the same one have read the same."""
        content = {name: value for name, value in asdict(self).items() if name != "next_refresh_at"}
        return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


_READ = """
SELECT
    external_id, credit_refresh_hold, hold_reason, hold_until, credit_refresh_day, custom_credit_amount, timezone,
    next_refresh_at
FROM users WHERE external_id = %(external_id)s
"""
_SET = """
UPDATE users SET
    credit_refresh_day = %(credit_refresh_day)s::smallint, custom_credit_amount = %(custom_credit_amount)s::bigint,
    timezone = %(timezone)s, updated_at = now()
WHERE external_id = %(external_id)s
"""
_AUDIT = """
INSERT INTO credit_audit_logs (actor, action, user_id, correlation_id, detail)
SELECT %(actor)s, 'settings_changed', id, %(correlation_id)s, %(detail)s FROM users WHERE external_id = %(external_id)s
"""
# As the audit log names them.
_SHOWN = {
    "credit_refresh_day": "creditRefreshDay",
    "custom_credit_amount": "customCreditAmount",
    "timezone": "timezone",
}
_ZONE = "SELECT EXISTS (SELECT FROM timezones WHERE name = %s)"


def read_settings(connection: psycopg.Connection[Any], external_id: str) -> UserSettings:
    """A user's settings.

    Raises:
        NotFoundError: no such user.
    """
    return _read(connection, external_id, _READ)


def change_settings(  # noqa: PLR0913 - who, what, on which condition
    connection: psycopg.Connection[Any],
    external_id: str,
    changes: Mapping[str, Any],
    *,
    actor: str,
    version: str | None = None,
    correlation_id: str | None = None,
) -> UserSettings:
    """Change some of a user's settings; the others stay as they are. The audit log keeps who did.

    Args:
        connection: in a transaction.
        external_id: whose.
        changes: by `UserSettings`' names; without `credit_refresh_hold`, the hold stays.
        actor: for the audit log.
        version: change nothing unless this is still the settings' version.
        correlation_id: of the request.

    Raises:
        NotFoundError: no such user.
        ChangedError: another version.
        RefusedError: a hold without a reason or with an end that has passed, a reason or an end without a hold; a time
            zone that PostgreSQL does not know.
    """
    before = _read(connection, external_id, f"{_READ} FOR NO KEY UPDATE")
    if version is not None and version != before.version:
        raise ChangedError(f"the settings of {external_id} have changed since they were read")
    zone = changes.get("timezone")
    if zone is not None and not one(connection.execute(_ZONE, (zone,)))[0]:
        raise RefusedError(f"{zone!r} is no time zone that PostgreSQL knows: take an IANA name such as Europe/Berlin")
    own = {name: value for name, value in changes.items() if name not in HOLD and getattr(before, name) != value}
    if own:
        connection.execute(_SET, {**asdict(before), **own})
        detail = {_SHOWN[name]: [getattr(before, name), value] for name, value in own.items()}
        parameters = {"actor": actor, "external_id": external_id, "correlation_id": correlation_id}
        connection.execute(_AUDIT, {**parameters, "detail": Jsonb(detail)})
    _hold(connection, before, changes, actor)
    return read_settings(connection, external_id)


def _hold(connection: psycopg.Connection[Any], before: UserSettings, changes: Mapping[str, Any], actor: str) -> None:
    if not changes.get("credit_refresh_hold", before.credit_refresh_hold):
        if changes.get("hold_reason") is not None or changes.get("hold_until") is not None:
            raise RefusedError(f"{before.external_id} would not be held: a reason and an end are a hold's")
        if before.credit_refresh_hold:
            holds.release(connection, before.external_id, actor=actor)
        return
    if not HOLD & {*changes}:
        return
    reason = changes.get("hold_reason", before.hold_reason)
    until = changes.get("hold_until", before.hold_until)
    holds.hold(connection, before.external_id, reason=reason or "", until=until, actor=actor)


def _read(connection: psycopg.Connection[Any], external_id: str, statement: str) -> UserSettings:
    with connection.cursor(row_factory=class_row(UserSettings)) as cursor:
        found = cursor.execute(statement, {"external_id": external_id}).fetchone()
    if found is None:
        raise NotFoundError(f"there is no user {external_id!r}")
    return found
