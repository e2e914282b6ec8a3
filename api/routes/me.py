"""A user's own credits, by their own token. Whose they are follows from the token alone: no route names a user."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api import answers
from api.callers import Owner
from api.context import Db
from api.problems import documented
from api.routes.users import PAGE, Before, Limit
from refresh.history import user_history
from refresh.verdict import Verdict, explain_user

router = APIRouter(prefix="/api/user/credits", tags=["user"])


@router.get(
    "/next-refresh",
    response_model=answers.NextRefresh,
    summary="When I am refreshed next, and by how much",
    responses=documented("not-found"),
)
def next_refresh(caller: Owner, database: Db) -> dict[str, Any]:
    """`creditsAdded` is what the refresh would add to the balance as it is now."""
    with database.statements() as connection:
        return _next(explain_user(connection, str(caller.user)))


def _next(verdict: Verdict) -> dict[str, Any]:
    """Why somebody is held, and by whom, is for support."""
    facts = verdict.facts()
    coming: Any = facts["next"] or {}
    return {
        "creditBalance": verdict.credit_balance,
        "planCode": verdict.plan_code,
        "onHold": verdict.held,
        "nextRefreshAt": facts["nextRefreshAt"] if verdict.active else None,
        "amount": coming.get("amount"),
        "creditsAdded": coming.get("creditsAdded"),
        "lastRefresh": facts["lastRefresh"],
    }


@router.get(
    "/refresh-history",
    response_model=answers.OwnHistoryPage,
    summary="What I was granted",
    responses=documented("not-found", "invalid-request"),
)
def own_refresh_history(caller: Owner, database: Db, before: Before = None, limit: Limit = PAGE) -> dict[str, Any]:
    """The newest first."""
    with database.statements() as connection:
        older_than = int(before) if before is not None else None
        entries, more = user_history(connection, str(caller.user), limit=limit, before=older_than)
    return {"entries": [entry.facts() for entry in entries], "next": str(entries[-1].id) if more else None}
