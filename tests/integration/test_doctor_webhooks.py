"""`credits doctor` about webhooks: which endpoint does not take what it is told, or that nobody sends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from refresh import doctor, webhook_outbox
from refresh.doctor import FAILURES_MANY, Finding
from tests import roles
from tests.integration.hooks import endpoint, write

if TYPE_CHECKING:
    from refresh.grants import Kind
    from tests.integration.command import Cli
    from tests.integration.world import World


def asked(world: World) -> Finding:
    with world.database.statements() as connection:
        return doctor.webhooks(connection)


def test_without_endpoints_nothing_is_wrong(world: World) -> None:
    assert asked(world) == Finding("ok", "0 endpoints take what there is to tell")


def test_what_is_just_written_is_not_late(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    write(world, added, 3)
    assert asked(world) == Finding("ok", "1 endpoint takes what there is to tell")


def test_what_nobody_sends_is_said_with_whom_to_start(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    write(world, added, 3)
    world.sql.execute("UPDATE webhook_deliveries SET next_attempt_at = now() - interval '11 minutes'")
    found = asked(world)
    assert (found.state, "messages wait since" in found.text) == ("wrong", True)
    assert "--queues=webhooks" in str(found.todo)
    # What waits for an endpoint that somebody has switched off is nobody's fault.
    world.sql.execute("UPDATE webhook_endpoints SET active = false")
    assert asked(world).state == "ok"


def test_an_endpoint_that_takes_nothing_is_named(world: World) -> None:
    endpoint(world, "run.finished", url="http://127.0.0.1:9/fine")
    added, _ = endpoint(world, "run.finished")
    write(world, added)
    world.sql.execute("UPDATE webhook_deliveries SET next_attempt_at = now() - interval '11 minutes'")
    with world.database.statements() as connection:
        for _ in range(FAILURES_MANY - 1):
            webhook_outbox.record_health(connection, added.id, healthy=False)
        assert asked(world).state == "ok"
        webhook_outbox.record_health(connection, added.id, healthy=False)
        found = asked(world)
        assert (found.state, str(added.id) in found.text, str(added.id) in str(found.todo)) == ("wrong", True, True)
        webhook_outbox.switch_off(connection, added.id)
    found = asked(world)
    assert (found.state, "gone" in found.text) == ("wrong", True)


def test_dead_messages_are_told_of_and_nothing_is_wrong(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    write(world, added, 2)
    world.sql.execute(
        "UPDATE webhook_deliveries SET status = 'dead', next_attempt_at = NULL, finished_at = now() WHERE id > 1"
    )
    found = asked(world)
    assert (found.state, found.text) == ("info", "1 message could not be delivered")


@pytest.mark.parametrize("kind", ["read", "worker"])
def test_whoever_may_look_may_ask(world: World, cli: Cli, database_url: str, kind: Kind) -> None:
    with roles.made(world.sql, kind) as role:
        done = cli("doctor", DATABASE_URL=roles.url(database_url, role))
    (line,) = [line for line in done.stdout.splitlines() if " webhooks " in line and "messages waiting" not in line]
    assert line.startswith("ok "), done
