"""`credits hold` and `credits release`: who, why, until when, and what the audit log keeps of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from refresh import holds
from refresh.errors import RefusedError
from tests.integration.command import refused

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

SOON = datetime(2099, 1, 1, tzinfo=UTC)


def hold(world: World, *, reason: str = "fraud check", until: datetime | None = None, actor: str = "cli:ops") -> Any:
    with world.database.transaction() as connection:
        return holds.hold(connection, "ada", reason=reason, until=until, actor=actor)


def release(world: World, actor: str = "cli:ops") -> bool:
    with world.database.transaction() as connection:
        return holds.release(connection, "ada", actor=actor)


def audited(world: World, user_id: int) -> list[tuple[str, str, Any]]:
    return [(row["action"], row["actor"], row["detail"]) for row in world.audit(user_id)]


def test_a_hold_is_set_changed_and_released_each_with_its_actor(world: World) -> None:
    ada = world.user()
    assert hold(world) == holds.Held(was_held=False, changed=True)
    assert hold(world, reason="chargeback", until=SOON, actor="cli:eve") == holds.Held(was_held=True, changed=True)
    user = world.see(ada)
    assert (user["credit_refresh_hold"], user["hold_reason"], user["hold_until"]) == (True, "chargeback", SOON)
    assert hold(world, reason="chargeback", actor="cli:eve").changed
    assert release(world, "cli:joe")
    user = world.see(ada)
    assert (user["credit_refresh_hold"], user["hold_reason"], user["hold_until"]) == (False, None, None)
    assert audited(world, ada) == [
        ("hold_set", "cli:ops", {"reason": "fraud check", "until": None}),
        ("hold_changed", "cli:eve", {"reason": "chargeback", "until": SOON.isoformat()}),
        ("hold_changed", "cli:eve", {"reason": "chargeback", "until": None}),
        ("hold_released", "cli:joe", {"reason": "chargeback", "until": None}),
    ]


def test_the_same_hold_again_changes_nothing(world: World) -> None:
    ada = world.user()
    hold(world)
    updated_at = world.see(ada)["updated_at"]
    assert hold(world, reason=" fraud check ") == holds.Held(was_held=True, changed=False)
    assert world.see(ada)["updated_at"] == updated_at
    assert len(audited(world, ada)) == 1


def test_a_hold_after_one_that_has_run_out_is_a_new_one(world: World) -> None:
    ada = world.user()
    hold(world, until=SOON)
    world.sql.execute("UPDATE users SET hold_until = now() - interval '1 second'")
    assert hold(world, actor="cli:eve") == holds.Held(was_held=False, changed=True)
    assert [action for action, _, _ in audited(world, ada)] == ["hold_set", "hold_changed", "hold_set"]


def test_releasing_who_is_not_held_changes_nothing(world: World) -> None:
    ada = world.user()
    assert not release(world)
    assert audited(world, ada) == []


def test_the_actor_is_the_transactions_alone(world: World) -> None:
    ada = world.user()
    with world.database.statements() as connection:
        with connection.transaction():
            holds.hold(connection, "ada", reason="fraud check", until=None, actor="cli:ops")
        connection.execute("UPDATE users SET credit_refresh_hold = false")
    assert [actor for _, actor, _ in audited(world, ada)] == ["cli:ops", world.value("SELECT session_user::text")]


def test_held_and_released_by_the_functions_the_user_is_refreshed_once(world: World) -> None:
    ada = world.user()
    hold(world, until=SOON)
    assert world.refresh().users_held == 1
    assert world.see(ada)["wake_at"] == SOON
    hold(world)
    assert world.see(ada)["wake_at"] is None
    release(world)
    assert world.refresh().users_refreshed == 1
    assert world.refresh().users_selected == 0


def test_the_batch_leaves_no_audit_row_of_holds_that_it_only_notes(world: World) -> None:
    ada = world.user()
    hold(world)
    world.refresh()
    assert [action for action, _, _ in audited(world, ada)] == ["hold_set", "held"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"reason": " "}, "a hold needs a reason"),
        ({"until": datetime(2020, 1, 1, tzinfo=UTC)}, "2020-01-01T00:00:00\\+00:00 has passed"),
    ],
)
def test_refused(world: World, arguments: dict[str, Any], says: str) -> None:
    ada = world.user()
    with pytest.raises(RefusedError, match=says):
        hold(world, **arguments)
    assert audited(world, ada) == []


def test_an_unknown_user(world: World) -> None:
    with pytest.raises(RefusedError, match="there is no user 'ada'"):
        hold(world)
    with pytest.raises(RefusedError, match="there is no user 'ada'"):
        release(world)


def test_a_user_whom_somebody_else_has_locked_is_not_waited_for_long(world: World) -> None:
    world.user()
    with world.host() as host:
        host.execute("SELECT FROM users FOR UPDATE")
        with (
            pytest.raises(psycopg.errors.LockNotAvailable),
            world.database.transaction(lock_timeout=timedelta(milliseconds=50)) as connection,
        ):
            holds.hold(connection, "ada", reason="fraud check", until=None, actor="cli:ops")


def test_the_commands(world: World, cli: Cli) -> None:
    ada = world.user()
    until = f"{datetime.now(UTC) + timedelta(days=30):%Y-%m-%dT%H:%M:00Z}"
    said = cli.says("hold", "ada", "--reason", "fraud check", "--until", until)
    assert said == f"ada is held until {until[:10]} {until[11:16]} UTC: fraud check.\n"
    facts = cli.facts("hold", "ada", "--reason", "fraud check")
    assert (facts["held"], facts["wasHeld"], facts["changed"], facts["verdict"]) == (True, True, True, "held")
    assert (facts["hold"]["reason"], facts["hold"]["until"]) == ("fraud check", None)
    assert facts["hold"]["by"].startswith("cli:")
    assert facts["next"]["creditsAdded"] == 600
    assert "held like that already, until released" in cli.says("hold", "ada", "--reason", "fraud check")
    said = cli.says("release", "ada")
    assert said.startswith("ada is released. ada is due since ")
    assert cli.facts("release", "ada")["changed"] is False
    assert [action for action, _, _ in audited(world, ada)] == ["hold_set", "hold_changed", "hold_released"]


def test_bad_arguments(world: World, cli: Cli) -> None:
    world.user()
    reason = ("--reason", "fraud check")
    refused(cli("hold", "ada"), 2, "Missing option '--reason'")
    refused(cli("hold", "ada", *reason, "--until", "2099-01-01T00:00:00"), 2, "names no zone")
    refused(cli("hold", "ada", *reason, "--until", "2020-01-01T00:00:00Z"), 2, "has passed")
    refused(cli("release", "bob"), 2, "there is no user 'bob'")
    assert world.value("SELECT count(*) FROM credit_audit_logs") == 0
