from __future__ import annotations
import psycopg

def test_probe(world):
    print(world.value("SELECT version()"), world.value("SHOW intervalstyle"))
    def tr(q, *a):
        try:
            print(q[:90], "->", world.rows(q, *a))
        except Exception as e:
            print(q[:90], "-> ERR", type(e).__name__, str(e).splitlines()[0])
    tr("INSERT INTO users (external_id, plan_code) VALUES ('a','free') RETURNING *")
    tr("INSERT INTO users (external_id, plan_code) VALUES ('b','free') RETURNING id, credit_balance")
    tr("SELECT * FROM users")
    tr("INSERT INTO users (external_id, plan_code) VALUES ('b','pro') ON CONFLICT (external_id) DO UPDATE SET plan_code = excluded.plan_code, credit_balance = coalesce(excluded.credit_balance, users.credit_balance) RETURNING credit_balance")
    world.sql.execute("SET intervalstyle = 'sql_standard'")
    tr("SELECT interval '1 month -1 day'::text, calendar_boundary('monthly', '2026-02-01', 31::smallint, '00:00', 'UTC')")
    world.sql.execute("RESET intervalstyle")
    world.user("low", credit_balance=-(2**63))
    tr("SELECT external_id, used, verdict FROM user_credits_now")
    tr("SELECT refresh_due(10)")
    tr("SELECT refresh_due(NULL)")
    tr("SELECT refresh_due(0)")
    tr("SELECT refresh_due(-1)")
    tr("SELECT proname, proacl FROM pg_proc WHERE pronamespace = 'credits'::regnamespace")
    assert 0
