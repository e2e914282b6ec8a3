"""Wrongs that the checker must see: each is executed past all triggers, in a town with a past."""

from __future__ import annotations

from typing import NamedTuple


class Wrong(NamedTuple):
    """Something that must not be.

    Attributes:
        rules: all that it breaks; the books say most things more than once.
        script: which does it.
    """

    rules: set[str]
    script: str


PREPARE = """
CREATE TEMP TABLE one AS
SELECT id, user_id, created_at, run_id FROM credit_refresh_histories
WHERE status = 'refreshed' AND reversed_by_run_id IS NULL AND source = 'run' AND credits_added > 0 ORDER BY id LIMIT 1;
CREATE TEMP TABLE empty_run AS SELECT id FROM credit_refresh_runs WHERE users_selected = 0 LIMIT 1;
CREATE TEMP TABLE rollback_run AS
SELECT id FROM credit_refresh_runs WHERE kind = 'rollback' ORDER BY created_at LIMIT 1;
"""
"""What the scripts speak of: somebody's grant, a run that found nobody, the first rollback."""

WRONGS = {
    "a credit out of nowhere": Wrong(
        {"balance", "movement"}, "UPDATE users SET credit_balance = credit_balance + 1 WHERE external_id = 'user-5'"
    ),
    "a credit out of nowhere, unseen": Wrong(
        {"balance"},
        """
        ALTER TABLE users DISABLE TRIGGER witness;
        UPDATE users SET credit_balance = credit_balance + 1 WHERE external_id = 'user-5'
        """,
    ),
    "a spend that is lost": Wrong(
        {"balance", "movement"}, "UPDATE host.spends SET amount = amount + 1 WHERE external_id = 'user-8'"
    ),
    "a date that moved": Wrong(
        {"window"},
        "UPDATE users SET next_refresh_at = next_refresh_at + interval '1 hour' WHERE external_id = 'user-5'",
    ),
    "a date that moved unseen": Wrong(
        {"movement"},
        """
        ALTER TABLE users DISABLE TRIGGER witness;
        UPDATE users SET next_refresh_at = next_refresh_at + interval '1 hour' WHERE external_id = 'user-5'
        """,
    ),
    "a grant that is not in the history": Wrong(
        {"balance", "movement", "window", "audit", "runs"},
        "DELETE FROM credit_refresh_histories WHERE id = (SELECT id FROM one)",
    ),
    "a grant that is not in the audit log": Wrong(
        {"audit"},
        """
        DELETE FROM credit_audit_logs
        WHERE id = (SELECT min(id) FROM credit_audit_logs WHERE action = 'refreshed')
        """,
    ),
    "an audit row too many": Wrong(
        {"audit"},
        """
        INSERT INTO credit_audit_logs (actor, action, user_id, balance_before, balance_after, credits)
        VALUES ('beat', 'refreshed', 1, 0, 1, 1)
        """,
    ),
    "an audit row that does not add up": Wrong(
        {"audit"},
        """
        INSERT INTO credit_audit_logs (actor, action, user_id, balance_before, balance_after, credits)
        VALUES ('beat', 'already_granted', 1, 0, 1, 0)
        """,
    ),
    "a second grant": Wrong(
        {"granted-twice", "movement", "audit", "runs"},
        """
        DROP INDEX uq_credit_refresh_histories_grant;
        INSERT INTO credit_refresh_histories (
            run_id, user_id, status, window_start, window_end, old_balance, credits_added, new_balance
        )
        SELECT run_id, user_id, status, window_start, window_end, 0, 0, 0
        FROM credit_refresh_histories WHERE id = (SELECT id FROM one)
        """,
    ),
    "a window of the wrong length": Wrong(
        {"window"},
        """
        UPDATE credit_refresh_histories SET window_end = window_end - interval '1 hour'
        WHERE source = 'insert' AND user_id = (SELECT id FROM users WHERE external_id = 'new')
        """,
    ),
    "a window too few": Wrong(
        {"window"}, "UPDATE credit_refresh_histories SET windows_passed = windows_passed - 1 WHERE windows_passed > 0"
    ),
    "a target that is not theirs": Wrong(
        {"amount"}, "UPDATE credit_refresh_histories SET target = target + 1 WHERE id = (SELECT id FROM one)"
    ),
    "credits by another arithmetic": Wrong(
        {"amount"}, "UPDATE plans SET rollover_cap = rollover_cap - 150 WHERE code = 'rolled'"
    ),
    "a grant before it is due": Wrong(
        {"not-due"}, "UPDATE credit_refresh_runs SET force = false WHERE force AND kind = 'apply'"
    ),
    "a grant under hold": Wrong(
        {"held"},
        """
        UPDATE host.moves SET old_held = true, old_until = NULL
        WHERE (user_id, moved_at) = (SELECT user_id, created_at FROM one)
        """,
    ),
    "a hold that nobody was under": Wrong({"held"}, "UPDATE host.moves SET old_held = false"),
    "a grant of somebody inactive": Wrong(
        {"inactive"},
        "UPDATE host.moves SET old_active = false WHERE (user_id, moved_at) = (SELECT user_id, created_at FROM one)",
    ),
    "a rollback of another run": Wrong(
        {"rollback"},
        """
        UPDATE credit_refresh_runs SET subject_run_id = (SELECT id FROM empty_run)
        WHERE id = (SELECT id FROM rollback_run)
        """,
    ),
    "a grant that is marked as taken back and was not": Wrong(
        {"rollback"},
        """
        UPDATE credit_refresh_histories SET reversed_by_run_id = (SELECT id FROM rollback_run)
        WHERE id = (SELECT id FROM one)
        """,
    ),
    "a debt that nobody allowed": Wrong(
        {"rollback", "negative"},
        "UPDATE credit_refresh_runs SET selection = selection - 'allowNegative' WHERE kind = 'rollback'",
    ),
    "a dry run that was none": Wrong(
        {"dry-run"},
        """
        INSERT INTO credit_audit_logs (actor, action, user_id, run_id, balance_before, balance_after, credits)
        SELECT 'cli:ops', 'planned', 1, id, 0, 0, 0 FROM credit_refresh_runs WHERE dry_run
        """,
    ),
    "a run that miscounts": Wrong(
        {"runs"},
        "UPDATE credit_refresh_runs SET users_refreshed = users_refreshed + 1 WHERE id = (SELECT id FROM empty_run)",
    ),
    "a batch that miscounts": Wrong(
        {"runs"},
        """
        UPDATE credit_refresh_batches SET users_refreshed = users_refreshed - 1, users_skipped = users_skipped + 1
        WHERE id = (SELECT min(id) FROM credit_refresh_batches WHERE users_refreshed > 0)
        """,
    ),
    "a run that ended early": Wrong(
        {"runs"},
        "INSERT INTO credit_refresh_batches (run_id, seq, user_ids) SELECT id, 0, '{}' FROM empty_run",
    ),
    "a run without an end": Wrong(
        {"unfinished"},
        "UPDATE credit_refresh_runs SET status = 'running', finished_at = NULL WHERE id = (SELECT id FROM empty_run)",
    ),
    "a batch that was given up": Wrong(
        {"given-up"},
        """
        INSERT INTO credit_refresh_batches (run_id, seq, user_ids, status) SELECT id, 0, '{}', 'failed' FROM empty_run;
        UPDATE credit_refresh_runs SET batches_total = 1 WHERE id = (SELECT id FROM empty_run)
        """,
    ),
    "a batch that waits for one of its users": Wrong(
        {"poison"},
        """
        INSERT INTO credit_refresh_batches (run_id, seq, user_ids, status, error)
        SELECT id, 0, '{1, 2}', 'cancelled', 'the host refuses user-2' FROM empty_run;
        UPDATE credit_refresh_runs SET status = 'cancelled', batches_total = 1, users_selected = 2
        WHERE id = (SELECT id FROM empty_run)
        """,
    ),
    "two runs for a slot": Wrong(
        {"slot"},
        """
        DROP INDEX uq_credit_refresh_runs_slot;
        UPDATE credit_refresh_runs SET slot = now() WHERE source = 'beat'
        """,
    ),
    "two runs for a key": Wrong(
        {"key"},
        """
        ALTER TABLE credit_refresh_runs DROP CONSTRAINT uq_credit_refresh_runs_idempotency_key;
        UPDATE credit_refresh_runs SET idempotency_key = 'k' WHERE kind = 'rollback'
        """,
    ),
    "an answer that names no run": Wrong(
        {"key"},
        """
        INSERT INTO host.asked (what, key, detail, arguments, exit_code, answer)
        VALUES ('bulk', 'k', '{}', '{}', 0, '{"runId": "a69bd4a8-2bb0-4a5c-a3ab-f5bb4d6bb5ab"}')
        """,
    ),
    "two batches at once": Wrong({"two-batches"}, "DELETE FROM host.batch_marks WHERE status = 'done'"),
    "somebody healthy who failed": Wrong({"poison"}, "UPDATE host.born SET kind = 'dated' WHERE kind = 'poison'"),
    "a user whom nobody brought": Wrong(
        {"stranger"}, "INSERT INTO users (external_id, credit_balance) VALUES ('x', 0)"
    ),
}
