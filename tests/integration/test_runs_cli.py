"""`credits runs list | show | watch`, and the queries behind them."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from refresh.errors import RefusedError
from refresh.run_detail import RunDetail, read_run
from refresh.run_list import RunLine, Wanted, find_run, list_runs
from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

BIGGEST = 2**63 - 1


def listed(world: World, *, limit: int = 20, **wanted: Any) -> list[RunLine]:
    with world.database.statements() as connection:
        return list_runs(connection, Wanted(**wanted), limit=limit)[0]


def shown(world: World, run_id: UUID, *, failures: int = 20) -> RunDetail:
    with world.database.statements() as connection:
        return read_run(connection, run_id, failures=failures)


def a_run(world: World, run_id: UUID | None = None, **columns: Any) -> UUID:
    """A run that nothing in this release opens yet, by SQL; it has ended unless told otherwise."""
    values: dict[str, Any] = {
        "id": run_id or uuid4(), "kind": "refresh", "work": "refresh", "source": "cli", "requested_by": "test",
        "status": "running", **columns,
    }  # fmt: skip
    ended = values.pop("status")
    values["status"] = "running"
    names = ", ".join(values)
    places = ", ".join(f"%({name})s" for name in values)
    world.sql.execute(f"INSERT INTO credit_refresh_runs ({names}) VALUES ({places})", values)  # noqa: S608
    if ended != "running":
        world.sql.execute(
            "UPDATE credit_refresh_runs SET status = %s, finished_at = now() WHERE id = %s", (ended, values["id"])
        )
    return UUID(str(values["id"]))


def a_batch(world: World, run_id: UUID, users: int, **outcome: Any) -> None:
    """A batch of a run, closed with this outcome where there is one."""
    row = world.row(
        "INSERT INTO credit_refresh_batches (run_id, seq, user_ids) VALUES (%s, 0, %s) RETURNING id",
        run_id, list(range(1, users + 1)),
    )  # fmt: skip
    if outcome:
        changes = ", ".join(f"{name} = %({name})s" for name in outcome)
        world.sql.execute(f"UPDATE credit_refresh_batches SET {changes} WHERE id = %(id)s", {**outcome, **row})  # noqa: S608


def a_history(world: World, run_id: UUID, status: str, user_id: int = 1, **columns: Any) -> None:
    values = {
        "run_id": run_id, "status": status, "user_id": user_id, "dry_run": status == "planned", "old_balance": 1_000,
        "credits_added": 0, "new_balance": 1_000, **columns,
    }  # fmt: skip
    values["new_balance"] = values["old_balance"] + values["credits_added"]
    names = ", ".join(values)
    places = ", ".join(f"%({name})s" for name in values)
    world.sql.execute(
        f"INSERT INTO credit_refresh_histories (window_start, {names}) VALUES (now(), {places})",  # noqa: S608
        values,
    )


def test_the_list_is_newest_first_and_says_what_became_of_each(world: World, cli: Cli) -> None:
    world.users(150)
    world.user("held", credit_refresh_hold=True)
    dry = world.refresh(dry_run=True, reason="what if")
    live = world.refresh()
    first, second = cli.facts("runs", "list")["runs"]
    assert (first["runId"], second["runId"]) == (str(live.run_id), str(dry.run_id))
    assert first | {"createdAt": "", "seconds": 0} == {
        "runId": str(live.run_id), "createdAt": "", "kind": "refresh", "work": "refresh", "source": "cli",
        "status": "succeeded", "dryRun": False, "usersSelected": 151, "usersDone": 151, "usersRefreshed": 150,
        "usersHeld": 1, "usersSkipped": 0, "usersFailed": 0, "creditsGranted": live.credits_granted, "seconds": 0,
        "requestedBy": "test", "reason": None, "maxUsersPerSecond": None,
    }  # fmt: skip
    assert (second["dryRun"], second["reason"], second["creditsGranted"]) == (True, "what if", live.credits_granted)
    wide = cli.says("runs", "list")
    assert wide.index(str(live.run_id)[:8]) < wide.index(str(dry.run_id)[:8])
    for word in ("refreshed", "requested by", "what if", "151", "dry"):
        assert word in wide
    narrow = cli("runs", "list", COLUMNS="80").stdout
    assert "requested by" not in narrow
    assert "refresh, dry" in narrow, narrow


def test_a_run_at_work_shows_what_its_closed_batches_did(world: World, cli: Cli) -> None:
    world.users(250)
    run = world.scan()
    first, *_ = world.claim(run)
    world.work([first])
    (line,) = listed(world)
    assert (line.status, line.users_selected, line.users_done, line.users_refreshed) == ("running", 250, 100, 100)
    assert line.credits_granted == world.value("SELECT sum(credits_added) FROM credit_refresh_histories")
    assert "100/250" in cli.says("runs", "list")


def test_an_empty_list(world: World, cli: Cli) -> None:
    assert cli.says("runs", "list") == "There are no runs yet.\n"
    world.refresh()
    assert cli.says("runs", "list", "--status", "failed") == "There are no such runs.\n"
    assert cli.facts("runs", "list", "--live", "--kind", "apply") == {"runs": [], "next": None}


def test_filters(world: World, cli: Cli) -> None:
    dry = world.refresh(dry_run=True).run_id
    live = world.refresh().run_id
    open_ = a_run(world, source="api")
    failed = a_run(world, status="failed")
    moved = a_run(world, kind="regrid", work="regrid", status="succeeded")
    old = a_run(world, status="partial")
    world.sql.execute("UPDATE credit_refresh_runs SET created_at = now() - interval '2 days' WHERE id = %s", (old,))
    since = world.value("SELECT now() - interval '1 day' AS at")
    for wanted, found in (
        ({"status": "running"}, {open_}),
        ({"status": "failed"}, {failed}),
        ({"kind": "regrid"}, {moved}),
        ({"source": "api"}, {open_}),
        ({"dry_run": True}, {dry}),
        ({"dry_run": False}, {live, open_, failed, moved, old}),
        ({"since": since}, {dry, live, open_, failed, moved}),
        ({"status": "succeeded", "source": "cli", "dry_run": False, "kind": "refresh"}, {live}),
    ):
        assert {line.run_id for line in listed(world, **wanted)} == found, wanted
    by_command = cli.facts("runs", "list", "--status", "partial", "--live", "--since", "2020-01-01T00:00:00Z")
    assert [run["runId"] for run in by_command["runs"]] == [str(old)]
    refused(cli("runs", "list", "--since", "yesterday"), 2, "not an instant")
    refused(cli("runs", "list", "--status", "done"), 2, "'done' is not one of")
    refused(cli("runs", "list", "--limit", "0"), 2, "is not in the range")


def test_pages_meet_without_a_gap_or_a_repeat(world: World, cli: Cli) -> None:
    # Created in one instant, they are told apart by their ids.
    everything = {str(a_run(world, status="succeeded")) for _ in range(7)}
    world.sql.execute("UPDATE credit_refresh_runs SET created_at = now()")
    seen: list[str] = []
    page = cli.facts("runs", "list", "--limit", "3")
    while page["next"]:
        seen += [run["runId"] for run in page["runs"]]
        page = cli.facts("runs", "list", "--limit", "3", "--before", page["next"])
    seen += [run["runId"] for run in page["runs"]]
    assert len(seen) == 7
    assert set(seen) == everything
    assert "--before" in cli("runs", "list", "--limit", "3").stderr
    refused(cli("runs", "list", "--before", "abcdef"), 2, "there is no run abcdef")


def test_a_run_is_named_by_the_beginning_of_its_id(world: World, cli: Cli) -> None:
    one = a_run(world, UUID("3f2a91c0-0000-4000-8000-000000000001"), status="succeeded")
    two = a_run(world, UUID("3f2a91c0-1000-4000-8000-000000000002"), status="succeeded")
    with world.database.statements() as connection:
        assert find_run(connection, str(one)) == one
        assert find_run(connection, str(two).upper().replace("-", "")) == two
        assert find_run(connection, "3f2a91c0-1") == two
        assert find_run(connection, "3f2a91c00") == one
        for text, says in (
            ("3f2a", f"several runs' ids: {one}, {two}$"),
            ("3f2", "its first 4 characters"),
            ("xyz1", "not the id of a run"),
            ("", "not the id of a run"),
            ("3f2b", "there is no run 3f2b"),
            (str(one) + "0", "not the id of a run"),
            ("%", "not the id of a run"),
        ):
            with pytest.raises(RefusedError, match=says):
                find_run(connection, text)
    for command in ("show", "watch"):
        refused(cli("runs", command, "3f2a"), 2, "several runs' ids")
        refused(cli("runs", command, str(uuid4())), 2, "there is no run")
        refused(cli("runs", command, "run"), 2, "not the id of a run")


def test_many_runs_of_the_same_beginning_are_not_all_named(world: World) -> None:
    for number in range(9):
        a_run(world, UUID(f"aaaaaaaa-0000-4000-8000-00000000000{number}"), status="succeeded")
    with world.database.statements() as connection, pytest.raises(RefusedError, match=r"000000000004, …$"):
        find_run(connection, "aaaa")


def test_show_tells_all_of_a_run(world: World, cli: Cli) -> None:
    world.users(3)
    world.user("huge", credit_balance=BIGGEST)
    world.sql.execute("UPDATE plans SET grant_mode = 'add' WHERE code = 'free'")
    run = world.refresh(reason="a [bracketed] reason")
    facts = cli.facts("runs", "show", str(run.run_id)[:8])
    assert (facts["status"], facts["usersRefreshed"], facts["usersFailed"]) == ("partial", 3, 1)
    assert facts["selection"] == {"due": True}
    assert (facts["force"], facts["keepWindow"], facts["atomic"], facts["amount"]) == (False, False, False, None)
    assert facts["batches"] == [
        {"status": "done", "batches": 1, "users": 4, "usersDeferred": 0, "attempts": 0, "credits": 3_000}
    ]
    assert facts["failedUsers"] == [
        {"userId": "huge", "id": world.value("SELECT id FROM users WHERE external_id = 'huge'"),
         "error": "the balance would not fit 64 bits"}
    ]  # fmt: skip
    assert (facts["oldestPending"], facts["failedBatches"], facts["children"]) == (None, [], [])
    assert (facts["apply"], facts["rollback"]) == (None, None)
    text = cli.says("runs", "show", str(run.run_id))
    for word in ("a [bracketed] reason", "test, by cli", "Failed users (1 of 1)", "huge", "64 bits", "3,000"):
        assert word in text
    assert cli.facts("runs", "show", str(run.run_id), "--failures", "0")["failedUsers"] == []


def test_show_tells_where_the_batches_stand(world: World, cli: Cli) -> None:
    world.users(300)
    run = world.scan()
    first, second, third = world.claim(run)
    world.work([first])
    world.sql.execute(
        "UPDATE credit_refresh_batches SET status = 'failed', attempts = 5, error = 'a host''s trigger',"
        " finished_at = now() WHERE id = %s",
        (second,),
    )
    world.sql.execute("UPDATE credit_refresh_batches SET attempts = 2, error = 'locked' WHERE id = %s", (third,))
    facts = cli.facts("runs", "show", str(run.run_id))
    assert [(group["status"], group["batches"], group["users"]) for group in facts["batches"]] == [
        ("done", 1, 100), ("failed", 1, 100), ("pending", 1, 100)
    ]  # fmt: skip
    assert (facts["oldestPending"]["batchId"], facts["oldestPending"]["attempts"]) == (third, 2)
    (failed,) = facts["failedBatches"]
    assert (failed["batchId"], failed["attempts"], failed["error"]) == (second, 5, "a host's trigger")
    assert (facts["usersDone"], facts["usersFailed"]) == (200, 100)
    text = cli.says("runs", "show", str(run.run_id))
    assert "Oldest pending batch" in text
    assert "a host's trigger" in text


def test_users_put_off_count_once(world: World) -> None:
    world.users(2)
    run = world.scan()
    (batch,) = world.claim(run)
    with world.host() as host:
        host.execute("UPDATE users SET email = 'x' WHERE external_id = 'user-1'")
        world.work([batch])
    (line,) = listed(world)
    assert (line.users_selected, line.users_done) == (2, 1)
    done = shown(world, run.run_id).batches[0]
    assert (done.status, done.users, done.users_deferred) == ("done", 2, 1)


def test_an_apply_stands_beside_its_dry_run(world: World, cli: Cli) -> None:
    ada, bob = world.user(), world.user("bob")
    dry = world.refresh(dry_run=True).run_id
    apply_ = a_run(world, kind="apply", work="apply", parent_run_id=dry, subject_run_id=dry, users_selected=2)
    a_batch(world, apply_, 2, status="done", users_refreshed=1, users_skipped=1, credits_granted=500)
    a_history(world, apply_, "skipped", bob, reason="drifted")
    facts = cli.facts("runs", "show", str(apply_))
    assert facts["apply"] == {
        "usersPlanned": 2, "creditsPlanned": 1_200, "usersApplied": 1, "creditsApplied": 500, "usersDrifted": 1
    }  # fmt: skip
    assert (facts["parentRunId"], facts["subjectRunId"]) == (str(dry), str(dry))
    text = cli.says("runs", "show", str(apply_))
    for word in ("Planned and applied", "drifted", "1,200", "500"):
        assert word in text
    assert f"Applied by run {apply_}" in cli.says("runs", "show", str(dry))
    retry = a_run(world, kind="retry", work="apply", parent_run_id=apply_, subject_run_id=dry)
    assert cli.facts("runs", "show", str(retry))["apply"]["creditsPlanned"] == 1_200
    assert [child.run_id for child in shown(world, dry).children] == [apply_, retry]
    assert [child.run_id for child in shown(world, apply_).children] == [retry]
    assert "retry of apply" in cli.says("runs", "list")
    assert ada != bob


def test_a_rollback_says_what_it_took_and_what_it_could_not(world: World, cli: Cli) -> None:
    for name in ("ada", "bob", "cleo"):
        world.user(name)
    grants = world.refresh().run_id
    back = a_run(
        world, kind="rollback", work="rollback", parent_run_id=grants, subject_run_id=grants, status="succeeded"
    )
    a_history(world, back, "reversed", 1, credits_added=-600)
    a_history(world, back, "reversed", 2, credits_added=-200, shortfall=400)
    a_history(world, back, "skipped", 3, reason="refreshed_since")
    facts = cli.facts("runs", "show", str(back))
    assert facts["rollback"] == {
        "usersReversed": 2, "creditsTakenBack": 800, "shortfall": 400, "usersRefreshedSince": 1
    }  # fmt: skip
    assert "left alone" in cli.says("runs", "show", str(back))
    dry = a_run(world, kind="rollback", work="rollback", parent_run_id=grants, subject_run_id=grants, dry_run=True)
    a_history(world, dry, "planned", 1, credits_added=-600)
    planned = cli.facts("runs", "show", str(dry))["rollback"]
    assert (planned["creditsTakenBack"], planned["usersRefreshedSince"]) == (600, None)
    text = cli.says("runs", "show", str(grants))
    assert f"Rolled back by run {back}" in text
    assert f"Dry rollback by run {dry}" in text


def test_sums_beyond_64_bits_are_exact(world: World, cli: Cli) -> None:
    subject = a_run(world, dry_run=True)
    for _ in range(3):
        a_batch(world, subject, 1, status="done", users_refreshed=1, credits_granted=BIGGEST)
    apply_ = a_run(world, kind="apply", work="apply", parent_run_id=subject, subject_run_id=subject)
    assert cli.facts("runs", "show", str(subject))["batches"][0]["credits"] == 3 * BIGGEST
    assert cli.facts("runs", "list", "--dry-run")["runs"][0]["creditsGranted"] == 3 * BIGGEST
    assert cli.facts("runs", "show", str(apply_))["apply"]["creditsPlanned"] == 3 * BIGGEST
    back = a_run(world, kind="rollback", work="rollback", parent_run_id=subject, subject_run_id=subject)
    for user_id in (1, 2):
        a_history(world, back, "reversed", user_id, old_balance=BIGGEST, credits_added=-BIGGEST, shortfall=BIGGEST)
    facts = cli.facts("runs", "show", str(back))["rollback"]
    assert (facts["creditsTakenBack"], facts["shortfall"]) == (2 * BIGGEST, 2 * BIGGEST)


def test_a_cancelled_run_names_who_cancelled_it(world: World, cli: Cli) -> None:
    run = a_run(world, users_selected=300, metadata=json.dumps({"cancelledBy": "cli:eve", "cancelReason": "too early"}))
    a_batch(world, run, 100, status="done", users_refreshed=100, credits_granted=7)
    a_batch(world, run, 200, status="cancelled")
    world.sql.execute("UPDATE credit_refresh_runs SET status = 'cancelled', finished_at = now() WHERE id = %s", (run,))
    facts = cli.facts("runs", "show", str(run))
    assert (facts["cancelledBy"], facts["cancelReason"]) == ("cli:eve", "too early")
    # A worker that had a batch when the run was cancelled still counts.
    assert (facts["usersDone"], facts["usersRefreshed"], facts["creditsGranted"]) == (100, 100, 7)
    assert "cli:eve" in cli.says("runs", "show", str(run))


def test_watch_of_a_finished_run_answers_at_once(world: World, cli: Cli) -> None:
    world.users(3)
    run = world.refresh()
    assert f"Run {run.run_id} succeeded" in cli.says("runs", "watch", str(run.run_id)[:8])
    facts = cli.facts("runs", "watch", str(run.run_id))
    assert facts == cli.facts("runs", "list")["runs"][0]


def test_watch_stays_to_the_end_and_tells_of_failed_users(world: World, cli: Cli) -> None:
    world.users(120)
    world.user("huge", credit_balance=BIGGEST)
    world.sql.execute("UPDATE plans SET grant_mode = 'add' WHERE code = 'free'")
    run = world.scan()
    timer = threading.Timer(timedelta(seconds=2.5).total_seconds(), lambda: world.work(world.claim(run)))
    timer.start()
    done = cli("runs", "watch", str(run.run_id))
    timer.join()
    assert done.returncode == 3, done
    assert f"Run {run.run_id} partial" in done.stdout
    assert "1 failed" in done.stdout
    again = cli("runs", "watch", str(run.run_id), "--json")
    assert (again.returncode, json.loads(again.stdout)["usersFailed"]) == (3, 1)


def test_the_list_of_many_runs_reads_only_its_page(world: World) -> None:
    world.sql.execute(
        "INSERT INTO credit_refresh_runs (source, requested_by, status, created_at, finished_at)"
        " SELECT 'cli', 'test', 'succeeded', now() - n * interval '1 hour', now() FROM generate_series(1, 20000) AS n"
    )
    world.sql.execute("ANALYZE credit_refresh_runs")
    before = list_page(world)
    plan = json.dumps(before)
    assert "ix_credit_refresh_runs_created_at" in plan
    assert "Seq Scan" not in plan


def list_page(world: World) -> Any:
    from refresh.run_list import _LIST  # noqa: PLC0415 - the statement itself is what is looked at

    wanted = ("status", "kind", "source", "dry_run", "of_one", "since", "before")
    values = {**dict.fromkeys(wanted), "limit": 20}
    (row,) = world.sql.execute(f"EXPLAIN (FORMAT JSON) {_LIST}", values).fetchall()
    return row["QUERY PLAN"]


def test_help_documents_the_answers(cli: Cli) -> None:
    overview = cli.says("runs", "--help")
    for command in ("list", "show", "watch"):
        assert command in overview
        assert "Examples" in cli.says("runs", command, "--help")
        assert "--json" in cli.says("runs", command, "--help")
