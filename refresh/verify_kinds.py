"""What an audit can find, by name: what it says of it, and what an operator can do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """What a finding's name means: a sentence with its facts, and the way out."""

    text: str
    way_out: str


@dataclass(frozen=True, slots=True)
class Check:
    """One pass over the books: a query whose rows are findings.

    Its columns are `finding` (a name of `KINDS`), `user_id` and `run_id` (or NULL), and the facts that the name's
    sentence tells.
    """

    title: str
    query: str


SINCE = "(SELECT coalesce(books_since, '-infinity') FROM settings)"
"""From when on the books are whole. Of the time before, retention has kept single rows: each is right by itself, and
what lay between them is gone."""

# Closes a field that holds an instant.
_AT = "%Y-%m-%d %H:%M:%S} UTC"

KINDS = {
    "history_without_audit": Kind(
        "a {status} row of {at:" + _AT + " ({old:,} to {new:,}) has no audit row",
        "Somebody has written or deleted rows by hand: `credits history {user}` shows what the ledger says",
    ),
    "audit_without_history": Kind(
        "an audit row of {at:" + _AT + " ({status}, {old:,} to {new:,}) has no history row",
        "A ledger row was deleted or changed: restore it from a backup; the audit row says what it held",
    ),
    "audit_disagrees": Kind(
        "the {status} row of {at:" + _AT + " says {old:,} to {new:,} ({credits:+,}), and its audit row {audit_old:,} "
        "to {audit_new:,} ({audit_credits:+,})",
        "One of the two was changed afterwards. The audit log is append-only: believe it first",
    ),
    "wrong_sum": Kind(
        "the {status} row of {at:" + _AT + " has {old:,} {credits:+,} = {new:,}",
        "Put the row right from its audit row, and put ck_credit_refresh_histories_balance back if it is gone",
    ),
    "wrong_target": Kind(
        "the grant of {at:" + _AT + " aims at no amount",
        "Put the row right from its audit row: nothing of ours writes such a target",
    ),
    "wrong_credits": Kind(
        "the {status} row of {at:" + _AT + " moved {credits:,} credits; {mode} to {target:,} makes {expected:,} of a "
        "balance of {old:,}",
        "Check the row against its audit row; a run of such rows is taken back by `credits runs rollback`",
    ),
    "granted_early": Kind(
        "the window from {window_start:" + _AT + " was granted at {at:" + _AT + ", when the user's date was {date}",
        "Take it back with `credits runs rollback --users FILE`, or correct the row if it was changed by hand",
    ),
    "windows_not_counted": Kind(
        "the grant of {at:" + _AT + " is for the window from {window_start:" + _AT + " while the user was due at "
        "{date}, and counts no missed window",
        "A window went by unsaid: `credits history {user}` shows the neighbours; correct windows_passed",
    ),
    "double_grant": Kind(
        "the window from {window_start:" + _AT + " was granted twice, at {earlier_at:" + _AT + " and at {at:" + _AT,
        "Put uq_credit_refresh_histories_grant back once one of the two is reversed (`credits runs rollback --users`)",
    ),
    "overlapping_grants": Kind(
        "the grant for the window from {window_start:" + _AT + " begins before {end:" + _AT + ", up to when the user "
        "had been granted already",
        "Reverse one of them: `credits runs rollback RUN --users FILE`; see who moved next_refresh_at back",
    ),
    "window_missing": Kind(
        "the ledger has no grant between {from_at:" + _AT + " and {to_at:" + _AT + ", and the next one says that the "
        "user was refreshed at {refreshed_at:" + _AT,
        "A grant's row was deleted: restore it from a backup, with its audit row",
    ),
    "balance_rose": Kind(
        "the balance was {left_balance:,} after {left_at:"
        + _AT
        + " and {balance:,} {found}: {rise:,} credits came from "
        "elsewhere",
        "Ask whoever writes credit_balance; if the app sells or returns credits, verify with --top-ups",
    ),
    "date_before_grant": Kind(
        "next_refresh_at is {date}, before {end:" + _AT + ", the end of what was granted already",
        "Move it: UPDATE users SET next_refresh_at = that end. Until then the next scan grants the time twice",
    ),
    "last_refresh_disagrees": Kind(
        "last_credit_refresh is {date}, and the last grant on record is of {at:" + _AT,
        "Either the ledger has lost a grant or the users table was restored alone: `credits history {user}`",
    ),
    "reversal_without_grant": Kind(
        "a reversal of the window from {window_start:" + _AT + " ({credits:+,} credits) has no grant that names "
        "its run",
        "Compare with the audit log: the grant's row was deleted, or its reversed_by_run_id changed",
    ),
    "grant_reversed_without_reversal": Kind(
        "the grant for the window from {window_start:" + _AT + " says that the run reversed it, which left no row",
        "Compare with the audit log: set reversed_by_run_id to NULL if nothing was taken back",
    ),
    "reversal_too_large": Kind(
        "the reversal of the window from {window_start:" + _AT + " took {taken:,} of a grant of {granted:,} credits",
        "Give back what was taken too much, and correct the row",
    ),
    "orphan_rows": Kind(
        "{history_rows:,} rows of history and {audit_rows:,} of audit name this run, which does not exist",
        "Runs are never deleted: restore the row of credit_refresh_runs from a backup",
    ),
    "run_totals_disagree": Kind(
        "of {selected:,} users the {status} run counts {run_counts}; its batches {batch_counts}",
        "`credits runs show {run}`; the batches are right unless batch_counts_disagree says otherwise",
    ),
    "batch_counts_disagree": Kind(
        "{batch} says {users:,} users refreshed with {credits:,} credits, and the ledger {rows:,} with {granted:,}",
        "`credits runs show {run}`; the ledger is right if it agrees with the audit log",
    ),
    "stuck_run": Kind(
        "{pending:,} of its batches are still to be done, and nothing has moved since {moved_at:" + _AT,
        "See that a worker and beat are running (`credits doctor`), or end it: `credits runs cancel {run}`",
    ),
    "overdue": Kind(
        "due since {due_at:" + _AT + ", and no scan has refreshed them",
        "`credits why {user}`; with many of them, see that beat and a worker are running (`credits doctor`)",
    ),
}
