"""Errors as RFC 9457 problems: one place where exceptions become answers, and a page that explains each type."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import psycopg
import structlog
from asgi_correlation_id import correlation_id
from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from api.schema import to_wire
from db import DatabaseError
from refresh.runs import KeyReusedError, NotFoundError, NotOpened, RefusedError
from refresh.single import NotGrantedError
from refresh.user_settings import ChangedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5

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
    "too-many-requests": Kind(429, "Too many requests", "More than the rate allows; `Retry-After` says when to go on."),
    "unavailable": Kind(503, "Unavailable", "The database or another server does not answer. It is safe to ask again."),
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
                            "correlationId": "4f0c…",
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


COMMON = documented("unauthenticated", "forbidden", "invalid-request", "too-many-requests", "unavailable", "internal")


def install(app: FastAPI) -> None:
    """Turn every exception into a problem."""
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(RefusedError, _answer_refused)
    app.add_exception_handler(InvalidRequestError, _answer_contradiction)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    for unavailable in (DatabaseError, PoolTimeoutError, psycopg.OperationalError, psycopg.errors.LockNotAvailable):
        app.add_exception_handler(unavailable, _answer_unavailable)
    app.add_exception_handler(Exception, _answer_defect)


def _answer_problem(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)  # noqa: S101 - install() says so; the same below
    return _answer(error.slug, error.detail, headers=error.headers, more=error.more)


def _answer_refused(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, NotGrantedError):
        return _answer("not-granted", str(error), more={"outcome": error.outcome, "verdict": error.verdict.facts()})
    slugs = {NotFoundError: "not-found", KeyReusedError: "idempotency-key-reused", ChangedError: "precondition-failed"}
    return _answer(slugs.get(type(error), "refused"), str(error))


def _answer_contradiction(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InvalidRequestError)  # noqa: S101
    return _invalid([{"field": error.field, "message": error.message}])


def _answer_invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    return _invalid([{"field": _field(found["loc"]), "message": str(found["msg"])} for found in error.errors()])


def _invalid(errors: list[dict[str, str]]) -> JSONResponse:
    detail = "; ".join(f"{error['field']}: {error['message']}" for error in errors)
    return _answer("invalid-request", detail, more={"errors": errors})


def _field(where: tuple[int | str, ...]) -> str:
    """`body.reason` as `reason`; a query's or header's field with its place."""
    place, *names = map(str, where)
    return ".".join(names if place == "body" and names else [place, *names])


_BY_STATUS = {kind.status: slug for slug, kind in reversed(KINDS.items())}


def _answer_http(_request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: unknown addresses and methods, bodies that are no JSON."""
    assert isinstance(error, HTTPException)  # noqa: S101
    slug = {404: "not-found", 405: "method-not-allowed", 400: "invalid-request"}.get(error.status_code)
    slug = slug or _BY_STATUS.get(error.status_code, "internal")
    return _answer(slug, str(error.detail), headers=dict(error.headers or {}))


def _answer_unavailable(_request: Request, error: Exception) -> JSONResponse:
    log.warning("A request could not be answered", error=str(error).splitlines()[0] if str(error) else repr(error))
    detail = "the database does not answer, or has a row of the request locked"
    return _answer("unavailable", detail, headers={"Retry-After": str(RETRY_SECONDS)})


def _answer_defect(_request: Request, error: Exception) -> JSONResponse:
    log.error("A defect", exc_info=error)
    return _answer("internal", KINDS["internal"].meaning)


def _answer(
    slug: str, detail: str, *, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None
) -> JSONResponse:
    kind = KINDS[slug]
    content = {
        "type": f"/problems/{slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "correlationId": correlation_id.get(),
        **(more or {}),
    }
    authenticate = {"WWW-Authenticate": "Bearer"} if kind.status == HTTPStatus.UNAUTHORIZED else {}
    return JSONResponse(to_wire(content), kind.status, {**authenticate, **(headers or {})}, MEDIA_TYPE)


@router.get("/problems/{slug}", summary="What a type of problem means", responses=documented("not-found"))
def explain_problem(slug: str) -> dict[str, Any]:
    """The page behind a problem's `type`; open to everybody."""
    if slug not in KINDS:
        raise Problem("not-found", f"there is no problem {slug!r}; known are: {', '.join(KINDS)}")
    kind = KINDS[slug]
    return {"type": f"/problems/{slug}", "title": kind.title, "status": kind.status, "meaning": kind.meaning}
