"""The parameters behind the question mark: what no route reads is refused."""

from __future__ import annotations

from fastapi import Request

from api.problems import InvalidRequestError


def check_parameters(request: Request) -> None:
    """Let no parameter pass that the document does not name.

    Left unread, `?dryRun=true` would be a refresh, since it belongs in the body, and `?limits=10` a page of fifty.

    Raises:
        InvalidRequestError: there is one.
    """
    if not request.query_params:
        return
    operation = request.app.openapi()["paths"][request.scope["route"].path_format][request.method.lower()]
    known = [parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"]
    for name in request.query_params:
        if name not in known:
            there_is = f"known are {', '.join(known)}" if known else "this address knows none"
            raise InvalidRequestError(f"query.{name[:64]}", f"is no parameter here; {there_is}")
