"""What a run would do, before anybody opens it: one statement over the users who match, by the rule itself.

It is an estimate: users spend and fall due while somebody reads it, and the batches decide for themselves. What a run
will do to the row is a dry run's business.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from refresh import selection
from refresh.errors import RefusedError

if TYPE_CHECKING:
    import psycopg

    from refresh.runs import Request
    from refresh.selection import Selection

OUTCOMES = (
    "not_due", "held", "inactive", "no_plan", "external", "unscheduled", "overflow", "already_granted", "unfinished"
)  # fmt: skip
"""Why a user who matches would not be refreshed: the rule's verdicts; their window has its grant already; an unfinished
run has them."""

_PLANS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Preview:
    """Whom a run would find, as things are.

    Attributes:
        users_matching: who match; where everybody does and nobody is forced, those alone whose date has come.
        users_refreshed: who would be refreshed.
        credits: the sum of what they would get; a reset may take some away.
        apart: the others, by why (`OUTCOMES`); none that is 0.
    """

    users_matching: int
    users_refreshed: int
    credits: int
    apart: dict[str, int]

    def facts(self) -> dict[str, object]:
        """What a JSON answer says of it."""
        return {
            "usersMatching": self.users_matching,
            "usersRefreshed": self.users_refreshed,
            "credits": self.credits,
            "notRefreshed": {_camel(outcome): self.apart.get(outcome, 0) for outcome in OUTCOMES},
        }


# OFFSET 0 keeps the planner from copying the rule's expressions into each place that names them.
_PREVIEW = """
WITH taken AS MATERIALIZED ({taken})
SELECT o.outcome, count(*), coalesce(sum(o.credits_added), 0)
FROM (
    SELECT
        CASE
            WHEN d.verdict <> 'due' THEN d.verdict
            WHEN d.id IN (SELECT user_id FROM taken) THEN 'unfinished'
            WHEN EXISTS (
                SELECT FROM credit_refresh_histories AS h
                WHERE h.user_id = d.id AND h.window_start = d.window_start AND h.status = 'refreshed'
                    AND h.reversed_by_run_id IS NULL
            ) THEN 'already_granted'
            ELSE 'refreshed'
        END AS outcome,
        d.credits_added
    FROM (
        SELECT u.id, r.verdict, r.window_start, r.credits_added
        FROM users AS u
        LEFT JOIN plans AS p ON p.code = u.plan_code
        CROSS JOIN LATERAL decide(
            coalesce(%(as_of)s::timestamptz, now()), u.active, u.credit_refresh_hold, u.hold_until, u.next_refresh_at,
            u.credit_balance, coalesce(%(amount)s::bigint, u.custom_credit_amount), u.credit_refresh_day, u.timezone,
            p.active, p.cadence, p.interval_days, p.day_of_month, p.time_of_day, p.timezone, p.grant_mode, p.amount,
            p.rollover_cap, u.refresh_shortfall, %(force)s, %(keep_window)s
        ) AS r
        WHERE {matching}
        OFFSET 0
    ) AS d
    OFFSET 0
) AS o
GROUP BY o.outcome
"""
_KNOWN_PLANS = "SELECT code FROM plans ORDER BY code"


def preview(connection: psycopg.Connection[Any], request: Request, asked: Selection) -> Preview:
    """Count whom a run would refresh, and whom not and why.

    Args:
        connection: in a transaction with a `statement_timeout` for all users; with a file's users, one that has their
            table.
        request: as `runs.admit()` returns it.
        asked: of whom.

    Raises:
        RefusedError: there is no such plan.
    """
    if asked.plan is not None:
        check_plan(connection, asked.plan)
    matching = selection.MATCHING_LISTED if asked.listed else selection.MATCHING
    if not request.force and not any(value is not None for value in asdict(asked).values()):
        matching += f" AND {selection.IS_DUE}"  # by the index: not all of ten million for the few who are due
    text = _PREVIEW.format(taken=selection.NOBODY if request.dry_run else selection.TAKEN, matching=matching)
    values = {
        **asked.parameters(),
        "as_of": request.as_of,
        "amount": request.amount,
        "force": request.force,
        "keep_window": request.keep_window,
    }
    counted = {outcome: (users, int(total)) for outcome, users, total in connection.execute(text, values)}
    refreshed, credits_ = counted.get("refreshed", (0, 0))
    return Preview(
        users_matching=sum(users for users, _ in counted.values()),
        users_refreshed=refreshed,
        credits=credits_,
        apart={outcome: counted[outcome][0] for outcome in OUTCOMES if outcome in counted},
    )


def check_plan(connection: psycopg.Connection[Any], plan: str) -> None:
    """Refuse the code of a plan that there is not.

    Raises:
        RefusedError: there is no such plan; the text names those that there are.
    """
    known = [code for (code,) in connection.execute(_KNOWN_PLANS)]
    if plan not in known:
        more = f" and {len(known) - _PLANS_SHOWN:,} more" if len(known) > _PLANS_SHOWN else ""
        raise RefusedError(f"there is no plan {plan!r}; known are: {', '.join(known[:_PLANS_SHOWN]) or 'none'}{more}")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))
