"""What must hold of the books whatever happened: plain SQL over all users, which asks no function of ours."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.integration.world import World

_OVERLAPS = """
SELECT a.user_id, a.window_start, a.window_end, b.window_start AS other_start, b.window_end AS other_end
FROM credit_refresh_histories AS a
JOIN credit_refresh_histories AS b ON b.user_id = a.user_id AND b.id > a.id
WHERE a.status = 'refreshed' AND b.status = 'refreshed'
    AND a.reversed_by_run_id IS NULL AND b.reversed_by_run_id IS NULL
    AND a.window_start < b.window_end AND b.window_start < a.window_end
"""
_HISTORY = """
SELECT user_id, run_id, status, old_balance, new_balance, credits_added, created_at
FROM credit_refresh_histories WHERE status IN ('refreshed', 'held', 'reversed', 'skipped')
"""
_AUDIT = """
SELECT user_id, run_id, action, balance_before, balance_after, credits, occurred_at
FROM credit_audit_logs WHERE action IN ('refreshed', 'held', 'reversed', 'skipped')
"""
_UNLIKE = f"""
(({_HISTORY}) EXCEPT ALL ({_AUDIT})) UNION ALL (({_AUDIT}) EXCEPT ALL ({_HISTORY}))
"""
_UNPAIRED = """
SELECT user_id, window_start, run_id, g.grants, r.reversals
FROM (
    SELECT user_id, window_start, reversed_by_run_id AS run_id, count(*) AS grants
    FROM credit_refresh_histories WHERE reversed_by_run_id IS NOT NULL GROUP BY 1, 2, 3
) AS g
FULL JOIN (
    SELECT user_id, window_start, run_id, count(*) AS reversals
    FROM credit_refresh_histories WHERE status = 'reversed' GROUP BY 1, 2, 3
) AS r USING (user_id, window_start, run_id)
WHERE (g.grants = 1 AND r.reversals = 1) IS NOT TRUE
"""
_NOT_OURS = """
SELECT u.id, u.credit_balance - coalesce(sum(h.credits_added), 0) AS rest
FROM users AS u
LEFT JOIN credit_refresh_histories AS h ON h.user_id = u.id AND h.status IN ('refreshed', 'reversed')
GROUP BY u.id, u.credit_balance
"""


def check_ledger(world: World, rest: Mapping[int, int] | None = None) -> None:
    """No time granted twice, an audit row for each entry, a grant for each reversal, and no credits from elsewhere.

    Args:
        world: whose books.
        rest: of each user, what the balance is without our grants and reversals: what they began with less what they
            spent.
    """
    assert world.rows(_UNPAIRED) == []
    assert world.rows(_OVERLAPS) == []
    assert world.rows(_UNLIKE) == []
    if rest is not None:
        assert {row["id"]: row["rest"] for row in world.rows(_NOT_OURS)} == rest


@contextmanager
def behind_the_triggers(world: World) -> Iterator[None]:
    """As after a restore of the users table alone: it is as it was, and the ledger is not."""
    world.sql.execute("SET session_replication_role = replica")
    try:
        yield
    finally:
        world.sql.execute("RESET session_replication_role")
