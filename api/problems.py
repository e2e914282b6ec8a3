"""Errors as RFC 9457 problems: one place where exceptions become answers, and a page that explains each type."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg
import structlog
from asgi_correlation_id import correlation_id
from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.utils import is_body_allowed_for_status_code
from pydantic import Field
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from api.answers import Verdict
from api.schema import Answer, to_wire
from db import DatabaseError, one_line
from refresh.errors import KeyReusedError, NotFoundError, RefusedError
from refresh.runs import NotOpened
from refresh.single import NotGrantedError
from refresh.user_settings import ChangedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5
ERRORS_IN_DETAIL = 5
ERRORS_MAX = 100
"""Of a list of 100,000 ids, each may be wrong."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.api")
router = APIRouter(tags=["problems"])


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of problem; its URI is `/problems/` and its key in `KINDS`."""

    status: int
    title: str
    meaning: str


KINDS = {
    "unauthenticated": Kind(
        401, "Not authenticated", "No credentials, or none that are valid here: a Bearer token or a signature."
    ),
    "forbidden": Kind(403, "Not allowed", "The credentials are valid, and do not allow this."),
    "not-found": Kind(404, "Not found", "There is no such user, run, entry or address."),
    "method-not-allowed": Kind(405, "Method not allowed", "The address knows other methods; `Allow` names them."),
    "not-granted": Kind(
        409,
        "Not granted",
        "The rule gives the user nothing now. `outcome` says why, and `verdict` everything that it rests on; where "
        "time alone is in the way, `force` overrides it.",
    ),
    "refused": Kind(409, "Refused", "The request cannot be carried out as things are. Nothing was changed."),
    "paused": Kind(409, "Paused", "Nothing is granted on any path at present: paused, or disabled by its settings."),
    "in-progress": Kind(
        409, "Still in progress", "The first request with this Idempotency-Key is not done. Ask again a little later."
    ),
    "idempotency-key-missing": Kind(
        400, "Idempotency-Key missing", "This request has to carry an Idempotency-Key: any text that is its own."
    ),
    "idempotency-key-reused": Kind(
        422, "Idempotency-Key reused", "The key belongs to a request of other content: take a new key."
    ),
    "invalid-request": Kind(422, "Invalid request", "`errors` names each field, and what is wrong with it."),
    "precondition-failed": Kind(
        412, "Precondition failed", "The settings have changed since they were read: read them again."
    ),
    "too-large": Kind(413, "Too large", "The request's body is larger than this address takes."),
    "too-many-requests": Kind(429, "Too many requests", "More than the rate allows; `Retry-After` says when to go on."),
    "unavailable": Kind(
        503,
        "Unavailable",
        "The database or another server does not answer. Ask again; where credits move, with the same Idempotency-Key: "
        "the first request may have been carried out.",
    ),
    "internal": Kind(
        500, "Internal error", "A defect of the service; its log has the details under the correlation id."
    ),
}


class Problem(Exception):  # noqa: N818 - RFC 9457's word
    """An answer that ends a request.

    Args:
        slug: one of `KINDS`.
        detail: one line for people.
        headers: besides the content type.
        more: members besides the RFC's, in camelCase.
    """

    def __init__(
        self, slug: str, detail: str, *, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(detail)
        self.slug, self.detail = slug, detail
        self.headers, self.more = dict(headers or {}), dict(more or {})


class FieldError(Answer):
    """What is wrong with one field."""

    field: str = Field(description="In camelCase, with dots; of a query or a header with its place: `query.limit`.")
    message: str


class ProblemAnswer(Answer):
    """An error (RFC 9457)."""

    type: str = Field(description="A URI relative to this server; GET explains it.")
    title: str
    status: int
    detail: str = Field(description="For people: what was wrong with this very request.")
    instance: str = Field(description="What was asked for.")
    correlation_id: str | None = Field(description="Under which the service's log has it.")
    errors: list[FieldError] | None = Field(None, description="Of `invalid-request` alone.")
    outcome: str | None = Field(None, description="Of `not-granted` alone: a verdict, already_granted or unfinished.")
    verdict: dict[str, Any] | None = Field(None, description="Of `not-granted` alone: as GET …/refresh-verdict.")


class Meaning(Answer):
    """What a type of problem means."""

    type: str
    title: str
    status: int
    meaning: str


def not_opened(refused: NotOpened) -> Problem:
    """No run was opened, because of what the request has no part in."""
    return Problem("paused", refused.text)


class InvalidRequestError(Exception):
    """The request contradicts itself, where no single field's type could tell.

    Args:
        field: in camelCase.
        message: what is wrong with it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field, self.message = field, message


def _schema(slugs: list[str]) -> dict[str, Any]:
    return {
        "description": "; ".join(KINDS[slug].title for slug in slugs),
        "content": {
            MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": {
                    slug: {
                        "value": {
                            "type": f"/problems/{slug}",
                            "title": KINDS[slug].title,
                            "status": KINDS[slug].status,
                            "detail": KINDS[slug].meaning,
                            "instance": "/api/…",
                            "correlationId": "4f0c6ae7b1d94b0f8a5d3f6d2c1e9b70",
                        }
                    }
                    for slug in slugs
                },
            }
        },
    }


def documented(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` say of the problems that it answers with."""
    statuses: dict[int, list[str]] = {}
    for slug in slugs:
        statuses.setdefault(KINDS[slug].status, []).append(slug)
    return {status: _schema(same) for status, same in statuses.items()}


GUARDED = documented("unauthenticated", "forbidden", "invalid-request", "too-many-requests", "unavailable")
"""Of every route that asks who is there."""


def install(app: FastAPI) -> None:
    """Turn exceptions into problems; those that nobody has foreseen, access_log.py does."""
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(RefusedError, _answer_refused)
    app.add_exception_handler(InvalidRequestError, _answer_contradiction)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    for unavailable in (DatabaseError, PoolTimeoutError, psycopg.OperationalError, psycopg.errors.LockNotAvailable):
        app.add_exception_handler(unavailable, _answer_unavailable)


# Coroutines, so that an answer that takes no time waits for no thread.
async def _answer_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)  # noqa: S101 - install() says so; the same below
    return _answer(request, error.slug, error.detail, headers=error.headers, more=error.more)


async def _answer_refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, NotGrantedError):
        more = {"outcome": error.outcome, "verdict": Verdict.wire(error.verdict.facts())}
        return _answer(request, "not-granted", str(error), more=more)
    slugs: dict[type[Exception], str] = {
        NotFoundError: "not-found",
        KeyReusedError: "idempotency-key-reused",
        ChangedError: "precondition-failed",
    }
    return _answer(request, slugs.get(type(error), "refused"), str(error))


async def _answer_contradiction(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InvalidRequestError)  # noqa: S101
    return _invalid(request, [{"field": error.field, "message": error.message}])


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    return _invalid(request, [{"field": _field(found), "message": _message(found)} for found in error.errors()])


def _invalid(request: Request, errors: list[dict[str, str]]) -> JSONResponse:
    shown = [f"{error['field']}: {error['message']}" for error in errors[:ERRORS_IN_DETAIL]]
    more = [f"and {len(errors) - len(shown)} more"] if len(errors) > len(shown) else []
    return _answer(request, "invalid-request", "; ".join(shown + more), more={"errors": errors[:ERRORS_MAX]})


def _field(found: Mapping[str, Any]) -> str:
    """`body.reason` as `reason`; a query's or header's field with its place."""
    place, *names = map(str, found["loc"])
    if found["type"] == "json_invalid":
        return place
    return ".".join(names if place == "body" and names else [place, *names])


def _message(found: Mapping[str, Any]) -> str:
    """Without what pydantic puts before our own texts."""
    if found["type"] == "json_invalid":
        return f"is no JSON: {found['ctx']['error']} at character {found['loc'][1]}"
    return str(found["msg"]).removeprefix("Value error, ")


_BY_STATUS = {kind.status: slug for slug, kind in reversed(KINDS.items())}


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown addresses and methods, bodies that are no JSON or too large."""
    assert isinstance(error, HTTPException)  # noqa: S101
    if not is_body_allowed_for_status_code(error.status_code):
        return Response(status_code=error.status_code, headers=error.headers)
    slug = {400: "invalid-request", 404: "not-found"}.get(error.status_code)
    slug = slug or _BY_STATUS.get(error.status_code, "internal")
    detail = {
        "not-found": "there is nothing at this address",
        "method-not-allowed": f"this address knows no {request.method}",
        "invalid-request": "the body cannot be read",
        "too-large": "the body is too large",
    }.get(slug, str(error.detail))
    return _answer(request, slug, detail, headers=dict(error.headers or {}))


async def _answer_unavailable(request: Request, error: Exception) -> JSONResponse:
    log.warning("A request could not be answered", error=one_line(error))
    detail = "the database does not answer, or has a row of the request locked: ask again, with the same key"
    return _answer(request, "unavailable", detail, headers={"Retry-After": str(RETRY_SECONDS)})


def defect(request: Request, error: Exception) -> JSONResponse:
    """The answer to what nobody has foreseen: the log knows more."""
    log.error("A defect", exc_info=error)
    return _answer(request, "internal", KINDS["internal"].meaning)


def _answer(
    request: Request,
    slug: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> JSONResponse:
    kind = KINDS[slug]
    content = {
        "type": f"/problems/{slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "instance": quote(request.scope["path"]),
        "correlationId": correlation_id.get(),
        **(more or {}),
    }
    authenticate = {"WWW-Authenticate": "Bearer"} if kind.status == HTTPStatus.UNAUTHORIZED else {}
    return JSONResponse(to_wire(content), kind.status, {**authenticate, **(headers or {})}, MEDIA_TYPE)


@router.get(
    "/problems/{slug}",
    response_model=Meaning,
    summary="What a type of problem means",
    responses=documented("not-found"),
)
def explain_problem(slug: str) -> dict[str, Any]:
    """The page behind a problem's `type`; open to everybody."""
    if slug not in KINDS:
        raise Problem("not-found", f"there is no problem {slug!r}; known are: {', '.join(KINDS)}")
    kind = KINDS[slug]
    return {"type": f"/problems/{slug}", "title": kind.title, "status": kind.status, "meaning": kind.meaning}
