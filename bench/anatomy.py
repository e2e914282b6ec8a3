"""What each part of the batch costs: the statement without it, beside the statement as it is."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import click

from bench.bare import refresh_bare, refresh_leanest
from bench.measure import Way, measure
from bench.report import benchmark
from bench.worlds import Worlds
from refresh.batch import DECIDE, GRANT, GRANT_MANY

# The rule written out for the one case that the benchmark has: rolling, fill, not held.
_PLAIN_RULE = """
    SELECT
        l.id AS user_id, l.plan_code, l.credit_balance, l.last_credit_refresh, l.next_refresh_at,
        l.refresh_shortfall, p.grant_mode, 'due' AS verdict,
        date_bin(p.step, b.as_of, l.next_refresh_at) AS window_start,
        date_bin(p.step, b.as_of, l.next_refresh_at) + p.step AS window_end, NULL::timestamptz AS first_missed_at,
        0 AS windows_passed, p.amount AS target, greatest(p.amount - l.credit_balance, 0) AS credits_added,
        false AS newly_held
    FROM batch AS b
    CROSS JOIN locked AS l
    JOIN (SELECT *, make_interval(hours => 24 * interval_days) AS step FROM plans) AS p ON p.code = l.plan_code
"""

# Neither taken from nor closed in its row, and nobody counted: the same work on ids that Python names.
_NO_BOOKS = f"""
WITH batch AS MATERIALIZED (
    SELECT %(run_id)s::uuid AS run_id, %(user_ids)s::bigint[] AS user_ids, now() AS as_of, 'bench' AS requested_by,
        NULL AS reason, false AS force, false AS keep_window, NULL::bigint AS amount, NULL::jsonb AS detail
),
{GRANT_MANY[GRANT_MANY.index("locked AS MATERIALIZED") : GRANT_MANY.index(GRANT)]}
{GRANT.rstrip().rstrip(",")}
SELECT 1
"""

_INDEXES = {
    "credit_refresh_histories": (
        "uq_credit_refresh_histories_grant", "uq_credit_refresh_histories_held", "uq_credit_refresh_histories_planned",
        "ix_credit_refresh_histories_run_id_user_id", "ix_credit_refresh_histories_user_id",
    ),
    "credit_audit_logs": ("ix_credit_audit_logs_user_id",),
    "users": ("ix_users_wake_at",),
}  # fmt: skip
_KEYS = {
    "credit_refresh_histories": "pk_credit_refresh_histories",
    "credit_audit_logs": "pk_credit_audit_logs",
    "users": "uq_users_external_id",
}
_CHECKS = """
DO $$ DECLARE named record; BEGIN
    FOR named IN
        SELECT conrelid::regclass AS relation, conname AS name FROM pg_constraint
        WHERE contype = 'c' AND coninhcount = 0 AND conrelid = '{table}'::regclass
    LOOP EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', named.relation, named.name); END LOOP;
END $$
"""


def _without() -> dict[str, str]:
    """By what is left out, the SQL that takes it out."""
    changes = {f"trigger(s) of {name}": f"ALTER TABLE {name} DISABLE TRIGGER ALL" for name in (*_KEYS, *_BOOKS)}
    changes |= {f"checks of {name}": _CHECKS.format(table=name) for name in _KEYS}
    changes |= {f"key {key}": f"ALTER TABLE {name} DROP CONSTRAINT {key}" for name, key in _KEYS.items()}
    changes |= {f"index {index}": f"DROP INDEX {index}" for indexes in _INDEXES.values() for index in indexes}
    every = [change for name, change in changes.items() if name.startswith(("key", "index"))]
    return {**changes, "all of these keys and indexes": ";".join(every)}


_BOOKS = ("credit_refresh_batches",)


@click.command()
@click.option("--users", default=50_000, show_default=True, type=click.IntRange(1_000), help="Users, all of them due.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Of each way, interleaved.")
def anatomy(users: int, repetitions: int) -> None:
    """What the rule, the bookkeeping, each index and each trigger cost."""
    with benchmark("anatomy") as (running, report):
        worlds = Worlds(running, users)
        results = measure(
            [
                Way("the statement as it is", worlds, refresh_bare),
                Way(
                    "without the rule's functions",
                    worlds,
                    partial(refresh_bare, statement=GRANT_MANY.replace(DECIDE, _PLAIN_RULE)),
                ),
                Way(
                    "without bookkeeping of run and batch",
                    worlds,
                    partial(refresh_leanest, statement=_NO_BOOKS),
                    by_a_run=False,
                ),
                Way(
                    "without either",
                    worlds,
                    partial(refresh_leanest, statement=_NO_BOOKS.replace(DECIDE, _PLAIN_RULE)),
                    by_a_run=False,
                ),
                Way("the leanest statement", worlds, refresh_leanest, by_a_run=False),
                *(
                    Way(f"without {name}", worlds, partial(refresh_bare, change=change))
                    for name, change in _without().items()
                ),
            ],
            repetitions,
        )
        title = f"{users:,} due users, two connections; ratio to the statement as it is"
        report.table(title, [result.row() for result in results])
        report.bars(
            "anatomy", title, "users per second, the statement as it is = 1", {r.name: r.ratio for r in results}
        )
        report.figures("results", [asdict(result) for result in results])
