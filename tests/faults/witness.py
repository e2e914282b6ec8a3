"""The witness: triggers of the host's own that note what becomes of users and batches, past everything that we say.

    host.moves         each change of a user's row, old and new: what balances and dates really did, in the order in
                       which transactions had the row
    host.batch_marks   each batch that begins or ends, with its transaction and what that could see

They fire in a restore, too (ENABLE ALWAYS), and write in the transaction that they watch, so that the two commit
together or not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

_WITNESS = """
CREATE TABLE host.moves (
    id bigserial PRIMARY KEY, user_id bigint NOT NULL, moved_at timestamptz NOT NULL DEFAULT now(),
    old_balance bigint NOT NULL, new_balance bigint NOT NULL, old_next timestamptz, new_next timestamptz,
    old_held boolean NOT NULL, new_held boolean NOT NULL, old_until timestamptz, old_active boolean NOT NULL
);
CREATE FUNCTION host.note_move() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO host.moves (
        user_id, old_balance, new_balance, old_next, new_next, old_held, new_held, old_until, old_active
    ) VALUES (
        new.id, old.credit_balance, new.credit_balance, old.next_refresh_at, new.next_refresh_at,
        old.credit_refresh_hold, new.credit_refresh_hold, old.hold_until, old.active
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER witness AFTER UPDATE ON credits.users FOR EACH ROW EXECUTE FUNCTION host.note_move();
ALTER TABLE credits.users ENABLE ALWAYS TRIGGER witness;

CREATE TABLE host.batch_marks (
    batch_id bigint NOT NULL, run_id uuid NOT NULL, status text NOT NULL,
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(), seen pg_snapshot NOT NULL DEFAULT pg_current_snapshot()
);
CREATE INDEX ON host.batch_marks (batch_id);
CREATE FUNCTION host.note_batch() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO host.batch_marks (batch_id, run_id, status) VALUES (new.id, new.run_id, new.status);
    RETURN NULL;
END
$$;
CREATE TRIGGER witness_of_beginnings AFTER INSERT ON credits.credit_refresh_batches
    FOR EACH ROW EXECUTE FUNCTION host.note_batch();
CREATE TRIGGER witness_of_ends AFTER UPDATE ON credits.credit_refresh_batches
    FOR EACH ROW WHEN (new.status <> old.status) EXECUTE FUNCTION host.note_batch();
ALTER TABLE credits.credit_refresh_batches ENABLE ALWAYS TRIGGER witness_of_beginnings;
ALTER TABLE credits.credit_refresh_batches ENABLE ALWAYS TRIGGER witness_of_ends;
"""


def install(connection: psycopg.Connection[Any]) -> None:
    """Put the witness in its place: after `population.prepare()`, before there are users."""
    with connection.transaction():
        connection.execute(_WITNESS)
