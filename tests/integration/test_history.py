"""`credits history`: a user's own history, newest first, and what it costs to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from refresh.errors import RefusedError
from refresh.history import HISTORY, Entry, user_history
from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

BIGGEST = 2**63 - 1


def told(world: World, user: str = "ada", *, limit: int = 100, **options: Any) -> list[Entry]:
    with world.database.statements() as connection:
        return user_history(connection, user, limit=limit, **options)[0]


def due_again(world: World) -> None:
    """The window ends: the whole grid lies a window further back."""
    world.restore(
        "UPDATE users SET next_refresh_at = next_refresh_at - interval '30 days' WHERE next_refresh_at > now()"
    )
    world.sql.execute(
        "UPDATE credit_refresh_histories SET window_start = window_start - interval '30 days',"
        " window_end = window_end - interval '30 days', created_at = created_at - interval '30 days'"
    )


def test_a_users_refreshes_are_told_newest_first(world: World, cli: Cli) -> None:
    ada = world.user()
    world.user("bob")
    first = world.refresh(reason="first")
    due_again(world)
    world.sql.execute("UPDATE users SET credit_balance = 10 WHERE id = %s", (ada,))
    second = world.refresh()
    facts = cli.facts("history", "ada")
    assert facts["userId"] == "ada"
    assert facts["next"] is None
    newest, oldest = facts["entries"]
    assert (newest["runId"], oldest["runId"]) == (str(second.run_id), str(first.run_id))
    rows = {row["run_id"]: row for row in world.history(ada)}
    row = rows[second.run_id]
    assert newest == {
        "id": row["id"], "createdAt": row["created_at"].isoformat(), "status": "refreshed", "source": "run",
        "runId": str(second.run_id), "windowStart": row["window_start"].isoformat(),
        "windowEnd": row["window_end"].isoformat(), "firstMissedAt": None, "windowsPassed": 0, "planCode": "free",
        "grantMode": "fill", "target": 1_000, "oldBalance": 10, "creditsAdded": 990, "newBalance": 1_000,
        "shortfall": 0, "reason": None, "error": None, "reversedByRunId": None,
    }  # fmt: skip
    assert oldest["reason"] == "first"
    text = cli.says("history", "ada")
    for word in ("refreshed", "free", "fill", "990", "1,000", f"run {str(second.run_id)[:8]}", "first"):
        assert word in text
    assert text.index(str(second.run_id)[:8]) < text.index(str(first.run_id)[:8])
    assert "990" in cli("history", "ada", COLUMNS="80").stdout


def test_what_dry_runs_planned_is_nobodys_history(world: World, cli: Cli) -> None:
    world.user()
    world.refresh(dry_run=True)
    world.scheduled(dry_run=True)
    world.work(world.claim())
    assert world.value("SELECT count(*) FROM credit_refresh_histories WHERE status = 'planned'") == 2
    assert told(world) == []
    assert cli.says("history", "ada") == "No refresh of ada is on record.\n"
    world.refresh()
    assert [entry.status for entry in told(world)] == ["refreshed"]


def test_every_path_and_every_outcome_is_there_once(world: World, cli: Cli) -> None:
    world.sql.execute("INSERT INTO users (external_id, plan_code) VALUES ('ada', 'free')")
    ada = world.value("SELECT id FROM users")
    due_again(world)
    world.sql.execute("UPDATE users SET credit_refresh_hold = true WHERE id = %s", (ada,))
    held = world.refresh()
    world.sql.execute("UPDATE users SET credit_refresh_hold = false, credit_balance = 0 WHERE id = %s", (ada,))
    world.sql.execute("SELECT refresh_credits_if_due('ada')")
    due_again(world)
    world.sql.execute("UPDATE users SET credit_balance = %s WHERE id = %s", (BIGGEST, ada))
    world.sql.execute("UPDATE plans SET grant_mode = 'add' WHERE code = 'free'")
    failed = world.refresh()
    # What an apply and a rollback leave; their commands are tested elsewhere.
    back = uuid4()
    grant = next(entry for entry in told(world) if entry.source == "function")
    world.sql.execute("UPDATE credit_refresh_histories SET reversed_by_run_id = %s WHERE id = %s", (back, grant.id))
    for status, added, shortfall, reason in (("reversed", -300, 700, None), ("skipped", 0, 0, "drifted")):
        world.sql.execute(
            "INSERT INTO credit_refresh_histories (run_id, user_id, status, window_start, old_balance, credits_added,"
            " new_balance, shortfall, reason) VALUES (%s, %s, %s, %s, 300, %s, 300 + %s, %s, %s)",
            (back, ada, status, grant.window_start, added, added, shortfall, reason),
        )
    entries = told(world)
    assert sorted((entry.status, entry.source) for entry in entries) == [
        ("failed", "run"), ("held", "run"), ("refreshed", "function"), ("refreshed", "insert"), ("reversed", "run"),
        ("skipped", "run"),
    ]  # fmt: skip
    assert len({entry.id for entry in entries}) == 6
    by_status = {entry.status: entry for entry in entries if entry.source == "run"}
    assert (by_status["held"].run_id, by_status["failed"].run_id) == (held.run_id, failed.run_id)
    assert by_status["failed"].error == "the balance would not fit 64 bits"
    assert by_status["failed"].old_balance == BIGGEST
    text = cli.says("history", "ada")
    for word in (
        f"taken back by run {str(back)[:8]}",
        "reversed",
        "700 not taken",
        "-300",
        "drifted",
        "function",
        "insert",
    ):
        assert word in text
    facts = cli.facts("history", "ada")["entries"]
    assert [entry["oldBalance"] for entry in facts if entry["status"] == "failed"] == [BIGGEST]
    assert [entry["reversedByRunId"] for entry in facts if entry["source"] == "function"] == [str(back)]
    assert "failed" in cli("history", "ada", COLUMNS="80").stdout


def many(world: World, user_id: int, count: int) -> None:
    """Windows of a user's, a day each, granted or failed, of some years."""
    world.sql.execute(
        "INSERT INTO credit_refresh_histories (run_id, user_id, status, window_start, window_end, old_balance,"
        " credits_added, new_balance, created_at) SELECT gen_random_uuid(), %s,"
        " CASE WHEN n %% 3 = 0 THEN 'failed' ELSE 'refreshed' END, at, at + interval '1 day', 0, 0, 0, at"
        " FROM generate_series(1, %s) AS n CROSS JOIN LATERAL (SELECT now() - n * interval '1 day' AS at) AS t",
        (user_id, count),
    )


def test_pages_meet_without_a_gap_or_a_repeat(world: World, cli: Cli) -> None:
    ada = world.user()
    many(world, ada, 50)
    everything = [entry.id for entry in told(world)]
    assert len(everything) == 50
    seen: list[int] = []
    before = None
    while True:
        page = told(world, limit=7, before=before)
        seen += [entry.id for entry in page]
        if len(page) < 7:
            break
        before = page[-1].id
    assert seen == everything
    facts = cli.facts("history", "ada", "--limit", "20")
    assert facts["next"] == everything[19]
    assert [entry["id"] for entry in facts["entries"]] == everything[:20]
    following = cli.facts("history", "ada", "--limit", "2", "--before", str(facts["next"]))
    assert [entry["id"] for entry in following["entries"]] == everything[20:22]
    assert f"--before {everything[19]}" in cli("history", "ada").stderr
    at = facts["entries"][9]["createdAt"]
    by_time = cli.facts("history", "ada", "--limit", "1", "--before", at)
    assert [entry["id"] for entry in by_time["entries"]] == [everything[10]]


def test_entries_of_one_instant_are_told_apart_by_their_ids(world: World) -> None:
    ada = world.user()
    many(world, ada, 12)
    world.sql.execute("UPDATE credit_refresh_histories SET created_at = now()")
    ids = [entry.id for entry in told(world)]
    assert ids == sorted(ids, reverse=True)
    assert [entry.id for entry in told(world, before=ids[4], limit=3)] == ids[5:8]


def test_bad_input(world: World, cli: Cli) -> None:
    world.user()
    bob = world.user("bob")
    many(world, bob, 1)
    refused(cli("history", "eve"), 2, "there is no user 'eve'")
    refused(cli("history", "ada", "--before", "soon"), 2, "not an instant")
    refused(cli("history", "ada", "--before", "2026-01-01T00:00:00"), 2, "names no zone")
    refused(cli("history", "ada", "--before", str(2**63)), 2, "is no entry's id")
    refused(cli("history", "ada", "--limit", "0"), 2, "is not in the range")
    with pytest.raises(RefusedError, match="ada has no entry"):
        told(world, before=told(world, "bob")[0].id)


def nodes(plan: Any) -> list[dict[str, Any]]:
    return [plan, *(found for child in plan.get("Plans", []) for found in nodes(child))]


def test_no_partition_is_scanned_whole(world: World) -> None:
    world.users(2_000)
    world.refresh(dry_run=True)
    world.refresh()
    # Two more months, with plans and failures among the grants.
    for months in (1, 2):
        world.sql.execute(
            "INSERT INTO credit_refresh_histories (run_id, user_id, status, dry_run, window_start, window_end,"
            " old_balance, credits_added, new_balance) SELECT gen_random_uuid(), u.id, s.status, s.status = 'planned',"
            " now() - make_interval(months => %s), now(), 0, 0, 0 FROM users AS u"
            " CROSS JOIN (VALUES ('refreshed'), ('planned'), ('failed'), ('skipped'), ('held')) AS s (status)",
            (months,),
        )
    world.sql.execute("ANALYZE credit_refresh_histories")
    values = {"user_id": 1_000, "before_id": None, "before_at": None, "limit": 21}
    for changed in ({}, {"before_id": 7}, {"before_at": world.value("SELECT now() AS at")}):
        row = world.sql.execute(f"EXPLAIN (FORMAT JSON) {HISTORY}", {**values, **changed}).fetchone()
        assert row is not None
        scans = [node for node in nodes(row["QUERY PLAN"][0]["Plan"]) if "Relation Name" in node]
        assert len({node["Relation Name"] for node in scans}) > 3
        whole = [node["Relation Name"] for node in scans if node["Node Type"] == "Seq Scan"]
        filled = "SELECT EXISTS (SELECT FROM {name}) AS there"
        assert [name for name in whole if world.value(filled.format(name=name))] == []
