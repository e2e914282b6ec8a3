"""Whom a run is for: evaluated once, at its opening. Batches decide again over each user, and never look for others.

The texts are CTEs that end in `selected (id, whole)`. Users of one `whole`, which is not NULL, go into one batch: all
of them are refreshed or none.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime  # noqa: TC003 - asdict() and the tests read the annotations
from typing import TYPE_CHECKING, Any

from db import one

if TYPE_CHECKING:
    from collections.abc import Mapping

    import psycopg


@dataclass(frozen=True, slots=True)
class Chosen:
    """Users for a run.

    Attributes:
        text: CTEs that end in `selected (id, whole)`.
        parameters: of the text.
        facts: what the run's row keeps of it.
    """

    text: str
    parameters: Mapping[str, Any]
    facts: Mapping[str, Any]


LISTED = "listed_users"
"""The temporary table of a file's users (`user_files.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The users whom somebody asks for; what is None does not matter. All of it together has to hold.

    Attributes:
        user: the one with this external id.
        plan: users of this plan.
        next_refresh_before: whose date lies before it.
        balance_below: who have fewer credits.
        active: who are active, or are not.
        listed: who are in the file that was loaded (`user_files.Listed.content()`); None without a file.
    """

    user: str | None = None
    plan: str | None = None
    next_refresh_before: datetime | None = None
    balance_below: int | None = None
    active: bool | None = None
    listed: dict[str, Any] | None = None

    def parameters(self) -> dict[str, Any]:
        """For a statement made with one of the texts here."""
        return {key: value for key, value in asdict(self).items() if key != "listed"}

    def facts(self, *, force: bool) -> dict[str, Any]:
        """What the run's row keeps of it."""
        return {
            "due": not force,
            **({"user": self.user} if self.user is not None else {}),
            **({"plan": self.plan} if self.plan is not None else {}),
            **({"nextRefreshBefore": self.next_refresh_before.isoformat()} if self.next_refresh_before else {}),
            **({"balanceBelow": self.balance_below} if self.balance_below is not None else {}),
            **({"active": self.active} if self.active is not None else {}),
            **({"users": self.listed} if self.listed is not None else {}),
        }


NOBODY = "SELECT NULL::bigint AS user_id WHERE false"
# Whom not to batch again: users whose unfinished batch will decide anyway. Dry runs take nobody and plan anybody; a
# regrid grants nothing.
TAKEN = """
SELECT unnest(b.user_ids) AS user_id
FROM credit_refresh_batches AS b JOIN credit_refresh_runs AS r ON r.id = b.run_id
WHERE b.status = 'pending' AND r.status = 'running' AND NOT r.dry_run AND r.work <> 'regrid'
"""
# Scheduled dry runs meet the same due users each time and plan each window once.
PLANNED = """
SELECT h.user_id
FROM credit_refresh_histories AS h JOIN users AS u ON u.id = h.user_id
WHERE h.status = 'planned' AND h.reason = 'scheduled' AND h.window_start >= u.next_refresh_at AND h.window_end > now()
"""

# Of a plan that is atomic, all users in one batch. Where no plan is, PostgreSQL has to know it when it plans: sorted by
# one number instead of a text and a number, a million users are cut in half the time.
_WHOLE = "CASE WHEN %(atomic)s THEN '' WHEN %(atomic_plans)s AND p.atomic THEN p.code END"
_ATOMIC_PLANS = "SELECT EXISTS (SELECT FROM plans WHERE atomic)"
_AWAKE = "u.wake_at <= coalesce(%(as_of)s::timestamptz, now())"
_HAS_DATES = "p.active AND p.cadence <> 'external'"
IS_DUE = f"{_AWAKE} AND {_HAS_DATES}"

DUE = f"""
taken AS MATERIALIZED ({{taken}}),
selected AS (
    SELECT u.id, {_WHOLE} AS whole
    -- The fence leaves the wake index as the one way in (`choose()`): the join below could use the key's order.
    FROM (SELECT u.id, u.plan_code FROM users AS u WHERE {_AWAKE} OFFSET 0) AS u
    JOIN plans AS p ON p.code = u.plan_code
    WHERE {_HAS_DATES} AND NOT EXISTS (SELECT FROM taken AS t WHERE t.user_id = u.id)
)
"""  # noqa: S608 - texts of this module alone

# Stale statistics, or none, make a scan of the whole table look cheap. And they make a bitmap scan look cheap, which
# crosses the dead entries of everybody refreshed since the last vacuum again each hour: they all lie where the scan
# begins. So the first user is looked for before, by a scan of the index that marks them dead for all that follow.
_BY_INDEX = """
SELECT
    set_config('enable_seqscan', 'off', true),
    (SELECT id FROM users WHERE wake_at <= coalesce(%(as_of)s::timestamptz, now()) ORDER BY wake_at LIMIT 1)
"""

# The parameters are known when PostgreSQL plans, so what was not asked for costs nothing.
MATCHING = """
(%(user)s::text IS NULL OR u.external_id = %(user)s::text)
AND (%(plan)s::text IS NULL OR u.plan_code = %(plan)s::text)
AND (%(next_refresh_before)s::timestamptz IS NULL OR u.next_refresh_at < %(next_refresh_before)s::timestamptz)
AND (%(balance_below)s::bigint IS NULL OR u.credit_balance < %(balance_below)s::bigint)
AND (%(active)s::boolean IS NULL OR u.active = %(active)s::boolean)
"""
MATCHING_LISTED = f"{MATCHING} AND u.id IN (SELECT user_id FROM pg_temp.{LISTED})"  # noqa: S608 - the same

ASKED = f"""
taken AS MATERIALIZED ({{taken}}),
selected AS (
    SELECT u.id, {_WHOLE} AS whole
    FROM users AS u
    LEFT JOIN plans AS p ON p.code = u.plan_code
    WHERE {{matching}} AND (%(force)s OR ({IS_DUE}))
        AND NOT EXISTS (SELECT FROM taken AS t WHERE t.user_id = u.id)
)
"""  # noqa: S608 - texts of this module alone


def choose(  # noqa: PLR0913 - what a request is made of
    connection: psycopg.Connection[Any],
    asked: Selection | None,
    *,
    as_of: datetime | None,
    force: bool,
    dry_run: bool,
    unplanned: bool,
) -> Chosen:
    """Whom a run that refreshes is for; to be cut in the same transaction.

    Args:
        connection: in a transaction that holds the door.
        asked: of whom; None: of all who are due.
        as_of: the instant at which they are; None: now.
        force: those too who are not due.
        dry_run: whoever is in another run's batches is planned all the same.
        unplanned: leave out whose window is planned already.
    """
    wanted = asked or Selection()
    taken = NOBODY if dry_run else TAKEN
    if asked is None and not force:
        connection.execute(_BY_INDEX, {"as_of": as_of})
        text = DUE.format(taken=PLANNED if unplanned else taken)
    else:
        text = ASKED.format(taken=taken, matching=MATCHING_LISTED if wanted.listed else MATCHING)
    (atomic_plans,) = one(connection.execute(_ATOMIC_PLANS))
    return Chosen(text, {**wanted.parameters(), "atomic_plans": atomic_plans}, wanted.facts(force=force))
