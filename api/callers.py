"""Who asks, and what they may: the admin token, API keys, users' own tokens, and the cron secret.

A secret that is not set opens nothing. Valid credentials that do not allow a request are answered by 403, all others by
401. Whoever may ask is told of parameters that nobody reads; nobody else is.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.parameters import check_parameters
from api.problems import Problem
from api.tokens import JwksUnavailableError, Tokens
from refresh.keys import check_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pydantic import SecretStr

    from api.limits import Limiter
    from db import Database
    from settings import Settings

Scope = Literal["read", "support", "admin"]
# Each scope holds those before it.
_SCOPES: tuple[Scope, ...] = ("read", "support", "admin")
KEY_BEGINS = "crs_"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever the credentials prove.

    Attributes:
        kind: what they showed.
        name: for the audit log, and what their rate is counted by.
        scopes: what they may do beside reading their own.
        user: whose token it is: the host app's own id.
    """

    kind: Literal["admin", "key", "user", "cron"]
    name: str
    scopes: frozenset[str] = frozenset()
    user: str | None = None

    def may(self, scope: Scope) -> bool:
        """Whether one of the scopes holds this one."""
        return any(held in self.scopes for held in _SCOPES[_SCOPES.index(scope) :])


_bearer = HTTPBearer(
    auto_error=False,
    description="The admin token, an API key, a user's own token (`/api/user`), or the cron secret (the cron route).",
)


def identify(request: Request, shown: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> Caller:
    """Who asks.

    Raises:
        Problem: nobody whom we know, or too often.
    """
    caller = _recognise(request, shown.credentials) if shown is not None else None
    if caller is None:
        raise Problem("unauthenticated", "send `Authorization: Bearer …` with credentials that are valid here")
    limiter: Limiter = request.app.state.limiter
    wait = limiter.hit(caller.name if caller.user is None else f"{caller.name}:{caller.user}")
    if wait is not None:
        seconds = max(1, ceil(wait))
        raise Problem("too-many-requests", f"go on in {seconds} s", headers={"Retry-After": str(seconds)})
    return caller


def _recognise(request: Request, token: str) -> Caller | None:
    config: Settings = request.app.state.config
    if _same(token, config.admin_token):
        return Caller("admin", "api:admin-token", frozenset({"admin"}))
    if _same(token, config.cron_secret):
        return Caller("cron", "api:cron")
    if token.startswith(KEY_BEGINS):
        database: Database = request.app.state.database
        with database.statements() as connection:
            key = check_key(connection, token)
        return Caller("key", f"api:key:{KEY_BEGINS}{key.prefix}", frozenset(key.scopes)) if key else None
    tokens: Tokens = request.app.state.tokens
    try:
        subject = tokens.subject(token)
    except JwksUnavailableError as error:
        raise Problem("unavailable", "the server of the users' token keys does not answer") from error
    return Caller("user", "api:user", user=subject) if subject is not None else None


def _same(token: str, secret: SecretStr | None) -> bool:
    """In constant time: hashes are of one length, whatever the token's."""
    if secret is None:
        return False
    given, wanted = (sha256(text.encode()).digest() for text in (token, secret.get_secret_value()))
    return hmac.compare_digest(given, wanted)


def _require(scope: Scope) -> Callable[[Request, Caller], Awaitable[Caller]]:
    async def allowed(request: Request, caller: Annotated[Caller, Depends(identify)]) -> Caller:
        if not caller.may(scope):
            raise Problem("forbidden", f"this needs the scope {scope!r}")
        check_parameters(request)
        return caller

    return allowed


async def _own(request: Request, caller: Annotated[Caller, Depends(identify)]) -> Caller:
    if caller.user is None:
        raise Problem("forbidden", "this is for users with their own tokens")
    check_parameters(request)
    return caller


async def _cron(request: Request, caller: Annotated[Caller, Depends(identify)]) -> Caller:
    if caller.kind != "cron":
        raise Problem("forbidden", "this is for whoever has the cron secret")
    check_parameters(request)
    return caller


Reader = Annotated[Caller, Depends(_require("read"))]
Support = Annotated[Caller, Depends(_require("support"))]
Admin = Annotated[Caller, Depends(_require("admin"))]
Owner = Annotated[Caller, Depends(_own)]
Cron = Annotated[Caller, Depends(_cron)]
