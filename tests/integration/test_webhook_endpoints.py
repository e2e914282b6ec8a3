"""Endpoints: added, changed and removed, by command and below it; who sees their secrets, and dead messages."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest

from refresh import webhook_deliveries as deliveries
from refresh import webhook_endpoints as endpoints
from refresh.errors import NotFoundError, RefusedError
from refresh.webhook_events import EVENTS, tell_ping
from refresh.webhook_outbox import anything_due, claim
from refresh.webhook_targets import read_target
from tests.integration.command import CREDITS, refused
from tests.integration.hooks import ALL, deliver, endpoint, now_is_later, outbox, see, write

if TYPE_CHECKING:
    from tests.integration.command import Cli
    from tests.integration.world import World

URL = "https://hooks.example/credits"
CHAT = "https://hooks.slack.example/services/T00/B00/c4nary"
SECRET = re.compile(r"whsec_[A-Za-z0-9+/]{43}=")


def change(world: World, added: endpoints.Endpoint, **changes: Any) -> endpoints.Endpoint:
    with world.database.transaction() as connection:
        return endpoints.change_endpoint(connection, added.id, changes, actor="kim")


def test_it_is_told_what_is_usual_for_its_format_unless_it_says_what(world: World) -> None:
    target = read_target(URL, allow_private=False)
    usual = {format_: endpoints.Wanted(target=target, format=format_).told for format_ in endpoints.FORMATS}
    assert usual == {
        "standard": ["run.finished", "user.held", "verify.finding"],
        "slack": ["notice.run_failed", "verify.finding"], "discord": ["notice.run_failed", "verify.finding"],
    }  # fmt: skip
    added, secret = endpoint(world, "user.refreshed", "run.finished", "user.refreshed")
    assert added.events == ["run.finished", "user.refreshed"]
    assert SECRET.fullmatch(secret)
    _, other = endpoint(world, "run.finished")
    assert other != secret


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"events": ("user.eaten",)}, "there is no event 'user.eaten': known are run.finished"),
        ({"events": ()}, "told of nothing"),
        ({"events": ("user.refreshed",), "format": "slack"}, "no chat takes"),
        ({"no_grants_days": 0}, "0 no-grants days"), ({"no_grants_days": 367}, "from 1 to 366"),
        ({"description": "x" * 201}, "longer than 200"),
    ],
)  # fmt: skip
def test_one_that_contradicts_itself_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        endpoints.Wanted(target=read_target(URL, allow_private=False), **options)


def test_the_database_knows_the_same_events(world: World) -> None:
    assert set(ALL) == set(EVENTS)
    added, _ = endpoint(world, *EVENTS)
    assert added.events == list(EVENTS)
    with pytest.raises(psycopg.errors.CheckViolation, match="events"):
        world.sql.execute("UPDATE webhook_endpoints SET events = events || 'ping'::text")


def test_there_are_no_more_than_twenty(world: World) -> None:
    for _ in range(endpoints.ENDPOINTS_MAX):
        endpoint(world, "run.finished")
    with pytest.raises(RefusedError, match="the most that there may be"):
        endpoint(world, "run.finished")


def test_each_change_is_in_the_audit_log_and_no_secret_is(world: World) -> None:
    added, secret = endpoint(world, "run.finished", url=f"{URL}/c4nary")
    changed = change(world, added, active=False, events=["user.held"], no_grants_days=4, description="x")
    assert (changed.active, changed.events, changed.no_grants_days, changed.description) == (
        False,
        ["user.held"],
        4,
        "x",
    )
    with world.database.transaction() as connection:
        endpoints.remove_endpoint(connection, added.id, actor="kim")
    log = world.rows("SELECT actor, action, detail FROM credit_audit_logs ORDER BY occurred_at, id")
    assert [(row["actor"], row["action"]) for row in log] == [
        ("test", "webhook_added"), ("kim", "webhook_changed"), ("kim", "webhook_removed"),
    ]  # fmt: skip
    assert log[1]["detail"] == {
        "endpointId": str(added.id), "host": "hooks.example", "format": "standard", "events": ["user.held"],
        "noGrantsDays": 4, "active": False,
    }  # fmt: skip
    assert secret not in str(log)
    assert "c4nary" not in str(log)


def test_a_change_must_leave_something_that_makes_sense(world: World) -> None:
    chat, _ = endpoint(world, "run.finished", format="slack")
    with pytest.raises(RefusedError, match="no chat takes"):
        change(world, chat, events=["user.refreshed"])
    with pytest.raises(RefusedError, match="told of nothing"):
        change(world, chat, events=[])
    assert change(world, chat, events=[], no_grants_days=3).events == []
    with world.database.transaction() as connection, pytest.raises(NotFoundError):
        endpoints.change_endpoint(connection, uuid4(), {}, actor="kim")


def test_one_that_is_switched_on_again_is_tried_at_once(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    world.sql.execute(
        "UPDATE webhook_endpoints SET active = false, inactive_reason = 'x', failures = 9, resume_at = now() + '1 hour'"
    )
    write(world, added)
    with world.database.statements() as connection:
        assert not anything_due(connection)
        assert claim(connection) == []
        change(world, added, active=True)
        assert anything_due(connection)
    seen = see(world, added.id)
    assert (seen["inactive_reason"], seen["failures"], seen["resume_at"]) == (None, 0, None)


# --- dead messages ---------------------------------------------------------------------------------------------------


def kill(world: World, added: endpoints.Endpoint, number: int) -> list[int]:
    write(world, added, number)
    world.sql.execute(
        "UPDATE webhook_deliveries SET status = 'dead', attempts = 10, next_attempt_at = NULL, finished_at = now()"
        " WHERE endpoint_id = %s",
        (added.id,),
    )
    return [row["id"] for row in outbox(world) if row["endpoint_id"] == added.id]


def test_a_dead_message_is_sent_again_under_its_id(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    (dead,) = kill(world, added, 1)
    before = outbox(world)[0]["message_id"]
    with world.database.transaction() as connection:
        again = deliveries.retry_delivery(connection, dead, actor="kim")
    assert (again.status, again.attempts, again.message_id) == ("pending", 0, before)
    with world.database.transaction() as connection:
        with pytest.raises(RefusedError, match="is pending: only a dead one"):
            deliveries.retry_delivery(connection, dead, actor="kim")
        with pytest.raises(NotFoundError):
            deliveries.retry_delivery(connection, 4_711, actor="kim")
    assert world.row("SELECT actor FROM credit_audit_logs WHERE action = 'webhooks_retried'") == {"actor": "kim"}


@pytest.mark.parametrize("gone", ["DELETE FROM webhook_endpoints", "UPDATE webhook_endpoints SET active = false"])
def test_one_whose_endpoint_is_gone_is_not(world: World, gone: str) -> None:
    added, _ = endpoint(world, "run.finished")
    (dead,) = kill(world, added, 1)
    world.sql.execute(gone.encode())
    with world.database.transaction() as connection, pytest.raises(RefusedError, match="no active endpoint"):
        deliveries.retry_delivery(connection, dead, actor="kim")


def test_a_test_message_needs_an_active_endpoint(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    with world.database.statements() as connection:
        assert deliveries.read_delivery(connection, tell_ping(connection, added.id)).type == "ping"
        change(world, added, active=False)
        with pytest.raises(RefusedError, match="is not active"):
            tell_ping(connection, added.id)
        with pytest.raises(NotFoundError):
            tell_ping(connection, uuid4())


# --- the commands ----------------------------------------------------------------------------------------------------


def test_by_command_an_endpoint_is_added_listed_tested_and_removed(world: World, cli: Cli) -> None:
    assert "There are no webhook endpoints" in cli.says("webhooks", "endpoints", "list")
    done = cli("webhooks", "endpoints", "add", URL, "--event", "run.finished", "--no-grants-days", "3")
    assert done.returncode == 0, done
    assert SECRET.fullmatch(done.stdout.strip())
    assert "run.finished, silence of 3 days" in done.stderr
    (listed,) = cli.facts("webhooks", "endpoints", "list")["endpoints"]
    assert (listed["url"], listed["events"], listed["noGrantsDays"], listed["active"]) == (
        URL,
        ["run.finished"],
        3,
        True,
    )
    assert done.stdout.strip() not in str(listed)
    assert URL in cli.says("webhooks", "endpoints", "list")
    assert listed["id"] in cli("webhooks", "endpoints", "list", COLUMNS="80").stdout
    facts = cli.facts("webhooks", "endpoints", "test", listed["id"])
    assert (facts["type"], facts["status"], facts["data"]) == ("ping", "pending", {"endpointId": listed["id"]})
    (one,) = cli.facts("webhooks", "deliveries", "list", "--status", "pending")["deliveries"]
    assert one["messageId"] == facts["messageId"]
    refused(cli("webhooks", "endpoints", "remove", listed["id"]), 2, "--yes")
    assert cli.facts("webhooks", "endpoints", "remove", listed["id"], "--yes")["id"] == listed["id"]
    refused(cli("webhooks", "endpoints", "remove", listed["id"], "--yes"), 2, "there is no webhook endpoint")
    assert world.value("SELECT count(*) FROM webhook_endpoints") == 0


def test_a_chats_address_is_read_from_standard_input_and_never_shown(world: World, cli: Cli) -> None:
    arguments = [str(CREDITS), "webhooks", "endpoints", "add", "-", "--format", "slack"]
    done = subprocess.run(
        arguments, input=f"{CHAT}\n", env=cli.environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    assert world.value("SELECT url FROM webhook_endpoints") == CHAT
    for said in (
        done.stderr,
        cli.says("webhooks", "endpoints", "list"),
        str(cli.facts("webhooks", "endpoints", "list")),
    ):
        assert "c4nary" not in said
    assert "https://hooks.slack.example/…" in cli.says("webhooks", "endpoints", "list")


@pytest.mark.parametrize(
    ("url", "variables", "says"),
    [
        ("https://127.0.0.1/", {}, "no public address"), ("http://hooks.example/", {}, "must begin with https://"),
        ("https://localhost/", {}, "localhost leads to"), ("https://user:c4nary@hooks.example/", {}, "no user"),
        ("https://169.254.169.254/", {"WEBHOOKS_ALLOW_PRIVATE": "true"}, "no public address"),
    ],
)  # fmt: skip
def test_where_a_webhook_may_not_go_is_said_in_a_line(cli: Cli, url: str, variables: dict[str, str], says: str) -> None:
    done = cli("webhooks", "endpoints", "add", url, **variables)
    refused(done, 2, says)
    assert "c4nary" not in done.stderr


def test_a_private_address_may_be_added_where_the_setting_says_so(cli: Cli) -> None:
    added = cli("webhooks", "endpoints", "add", "http://127.0.0.1:8080/", WEBHOOKS_ALLOW_PRIVATE="true")
    assert added.returncode == 0, added


def test_dead_messages_are_listed_by_pages_and_sent_again(world: World, cli: Cli) -> None:
    added, _ = endpoint(world, "run.finished")
    other, _ = endpoint(world, "run.finished")
    dead = kill(world, added, 5)
    kill(world, other, 2)
    page = cli.facts("webhooks", "deliveries", "list", "--status", "dead", "--endpoint", str(added.id), "--limit", "3")
    assert [one["id"] for one in page["deliveries"]] == sorted(dead, reverse=True)[:3]
    rest = cli.facts(
        "webhooks", "deliveries", "list", "--endpoint", str(added.id), "--before", str(page["next"]), "--limit", "3"
    )
    assert ([one["id"] for one in rest["deliveries"]], rest["next"]) == (sorted(dead, reverse=True)[3:], None)
    assert "10" in cli.says("webhooks", "deliveries", "list", "--status", "dead")
    assert cli.facts("webhooks", "deliveries", "retry", str(dead[0]), str(dead[1])) == {"retried": 2}
    refused(cli("webhooks", "deliveries", "retry", str(dead[2]), str(dead[0])), 2, "is pending")
    narrowed = ("webhooks", "deliveries", "retry", "--all-dead", "--endpoint", str(added.id))
    refused(cli(*narrowed), 2, "--yes")
    assert cli.facts(*narrowed, "--yes") == {"retried": 3}
    assert cli.facts("webhooks", "deliveries", "retry", "--all-dead", "--yes") == {"retried": 2}
    refused(cli("webhooks", "deliveries", "retry", "--all-dead", "--yes"), 2, "there is no dead message")
    assert cli("webhooks", "deliveries", "retry").returncode == 2


def test_nothing_of_an_endpoint_is_sent_once_it_is_removed(world: World) -> None:
    added, _ = endpoint(world, "run.finished")
    write(world, added, 3)
    world.sql.execute("DELETE FROM webhook_endpoints")
    now_is_later(world)
    assert deliver(world).tried == 0
    assert {UUID(str(row["endpoint_id"])) for row in outbox(world)} == {added.id}
