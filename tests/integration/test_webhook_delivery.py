"""Sending, to a real server: signed, at least once, and never where it may not go."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from refresh import webhook_outbox, webhook_post
from refresh.webhook_outbox import ATTEMPTS_MAX, LEASE_SECONDS, RETRY_SECONDS, claim
from refresh.webhook_post import Sender
from tests.integration.hooks import deliver, endpoint, now_is_later, outbox, see, write
from tests.receiver import Handler, Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.world import World


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that lets a server hang need not wait for ten seconds."""
    monkeypatch.setattr(webhook_post, "ATTEMPT_SECONDS", 0.6)
    monkeypatch.setattr(webhook_post, "DRAIN_SECONDS", 0.3)


def seconds_until(world: World, what: str) -> float:
    return float(world.value(f"SELECT extract(epoch FROM {what} - now())"))  # noqa: S608 - a text of these tests


NEXT = "(SELECT next_attempt_at FROM webhook_deliveries)"


def test_it_arrives_signed_with_what_it_tells(world: World, receiver: Receiver) -> None:
    world.user("ada", credit_balance=-(2**62))
    added, secret = endpoint(world, "user.refreshed", url=receiver.url("/hooks?a=b"))
    world.refresh()
    done = deliver(world)
    assert (done.counts["delivered"], done.tried) == (1, 1)
    (request,) = receiver.requests
    (row,) = outbox(world)
    assert request.path == "/hooks?a=b"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == str(row["message_id"])
    told = request.verified(secret)
    assert told["type"] == "user.refreshed"
    assert told["data"] == {
        **row["payload"], "oldBalance": str(-(2**62)), "creditsAdded": str(2**62 + 1_000),
    }  # fmt: skip
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(request.body + b" ", request.headers)
    assert (row["status"], row["attempts"], row["last_status"], row["last_error"]) == ("delivered", 1, 204, None)
    assert row["finished_at"] is not None
    assert deliver(world).tried == 0
    assert see(world, added.id)["failures"] == 0


def test_what_fails_is_sent_again_under_the_same_id(world: World, receiver: Receiver) -> None:
    added, secret = endpoint(world, "run.finished", url=receiver.url())
    write(world, added)
    receiver.script = [500, 503]
    for attempt, status in ((1, 500), (2, 503)):
        assert deliver(world).counts["failed"] == 1
        (row,) = outbox(world)
        assert (row["status"], row["attempts"], row["last_status"]) == ("pending", attempt, status)
        assert row["last_error"] == f"answered {status}"
        due = RETRY_SECONDS[attempt - 1]
        assert due - 2 < seconds_until(world, NEXT) < due * 1.2 + 2
        assert deliver(world).tried == 0
        now_is_later(world)
    assert deliver(world).counts["delivered"] == 1
    assert len(receiver.ids) == 3
    assert len(set(receiver.ids)) == 1
    for request in receiver.requests:
        request.verified(secret)
    assert see(world, added.id)["failures"] == 0


def test_after_the_last_attempt_it_is_dead(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added)
    receiver.script = [500] * ATTEMPTS_MAX
    for _ in range(ATTEMPTS_MAX + 2):
        deliver(world)
        now_is_later(world, "3 days")
    (row,) = outbox(world)
    assert (row["status"], row["attempts"], row["last_status"]) == ("dead", ATTEMPTS_MAX, 500)
    assert len(receiver.requests) == ATTEMPTS_MAX == 10


@pytest.mark.usefixtures("impatient")
def test_a_server_that_hangs_costs_the_others_nothing(world: World, receiver: Receiver) -> None:
    with receiving() as hanging:
        hanging.hold.clear()
        bad, _ = endpoint(world, "run.finished", url=hanging.url())
        good, _ = endpoint(world, "run.finished", url=receiver.url())
        write(world, bad, 50)
        write(world, good, 50)
        began = time.monotonic()
        done = deliver(world)
        assert time.monotonic() - began < 3
        assert done.counts["delivered"] == len(receiver.requests) == 50
        # As many as are on their way at a time, and the others were given back: nobody's attempt.
        assert done.counts["failed"] == webhook_post.PARALLEL == len(hanging.requests)
        assert done.counts["not tried"] == 50 - webhook_post.PARALLEL
        state = "SELECT attempts, count(*) FROM webhook_deliveries WHERE endpoint_id = %s GROUP BY 1 ORDER BY 1"
        assert [tuple(row.values()) for row in world.rows(state, bad.id)] == [(0, 46), (1, 4)]
        errors = {row["last_error"] for row in outbox(world) if row["endpoint_id"] == bad.id} - {None}
        assert errors == {"no answer within 1 s"}
        # It is left alone for a while, and then asked with one message.
        assert deliver(world).tried == 0
        assert see(world, bad.id)["failures"] == 1
        now_is_later(world, "1 minute")
        assert deliver(world).tried == 1
        hanging.hold.set()
        now_is_later(world, "1 day")
        assert deliver(world).counts["delivered"] == 1
        assert deliver(world).counts["delivered"] == 49
    assert see(world, bad.id)["failures"] == 0
    assert {row["status"] for row in outbox(world)} == {"delivered"}


def drip(handler: Handler) -> None:
    """Each byte in time, the answer never."""
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 100:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler: Handler) -> None:
    """A success, and then a body without an end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(2_000):
        handler.wfile.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
    handler.close_connection = True


def slow_body(handler: Handler) -> None:
    """A success, and then a body that does not come."""
    handler.send_response(200)
    handler.send_header("Content-Length", "10")
    handler.end_headers()
    handler.wfile.flush()
    time.sleep(2)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_drips_is_ended_by_the_whole_attempts_limit(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added)
    receiver.script = [drip]
    began = time.monotonic()
    assert deliver(world).counts["failed"] == 1
    assert time.monotonic() - began < 3
    (row,) = outbox(world)
    assert (row["last_status"], row["last_error"]) == (None, "no answer within 1 s")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("answer", [endless, slow_body])
def test_a_bodys_end_is_not_waited_for(world: World, receiver: Receiver, answer: Any) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added)
    receiver.script = [answer]
    began = time.monotonic()
    assert deliver(world).counts["delivered"] == 1
    assert time.monotonic() - began < 1.5


def test_connections_are_used_again(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added, 60)
    receiver.script = [lambda handler: handler.answer(200, b"x" * 10_000)] * 60
    assert deliver(world).counts["delivered"] == 60
    assert len(receiver.connections) <= webhook_post.PARALLEL


def test_a_redirect_is_not_followed(world: World, receiver: Receiver) -> None:
    with receiving() as elsewhere:
        added, _ = endpoint(world, "run.finished", url=receiver.url())
        write(world, added)
        receiver.script = [lambda handler: handler.answer(307, Location=elsewhere.url("/secret"))]
        assert deliver(world).counts["failed"] == 1
        assert elsewhere.requests == []
    (row,) = outbox(world)
    assert (row["last_status"], row["last_error"]) == (307, "answered 307: redirects are not followed")


def test_an_endpoint_that_says_that_it_is_gone_is_switched_off(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", "user.refreshed", url=receiver.url())
    write(world, added, 20)
    receiver.script = [410] * 20
    done = deliver(world)
    assert done.switched_off == [str(added.id)]
    seen = see(world, added.id)
    assert (seen["active"], seen["inactive_reason"]) == (False, "it answered 410 Gone")
    audit = world.row("SELECT actor, detail FROM credit_audit_logs WHERE action = 'webhook_switched_off'")
    assert audit["detail"] == {"endpointId": str(added.id), "reason": "it answered 410 Gone"}
    now_is_later(world)
    assert deliver(world).tried == 0
    dead = [row for row in outbox(world) if row["status"] == "dead"]
    assert 1 <= len(dead) == len(receiver.requests) <= webhook_post.PARALLEL
    world.users(3)
    world.refresh()
    assert {row["type"] for row in outbox(world)} == {"ping"}


@pytest.mark.parametrize(
    ("status", "header", "low", "high"),
    [
        (503, "900", 880, 901), (429, "900", 880, 901), (503, "1", 4, 8), (503, "tomorrow", 4, 8), (503, "-5", 4, 8),
        (503, "99999999", 21_000, 21_601),
    ],
)  # fmt: skip
def test_an_endpoint_is_given_the_time_that_it_asks_for(  # noqa: PLR0913, PLR0917 - the table's columns
    world: World, receiver: Receiver, status: int, header: str, low: int, high: int
) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added)
    receiver.script = [lambda handler: handler.answer(status, Retry_After=header)]
    deliver(world)
    assert low < seconds_until(world, NEXT) < high
    assert low < seconds_until(world, "(SELECT resume_at FROM webhook_endpoints)") < high


def test_a_message_that_is_not_understood_does_not_stop_the_others(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added, 20)
    receiver.script = [400, 422, 413]
    done = deliver(world)
    assert (done.counts["delivered"], done.counts["failed"]) == (17, 3)
    assert see(world, added.id)["failures"] == 0


def test_nothing_is_held_in_a_transaction_while_a_message_is_on_its_way(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added)
    receiver.hold.clear()
    busy = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'test' AND xact_start IS NOT NULL"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    with world.calls(lambda: deliver(world)) as sending:
        sending.start()
        world.until(lambda: len(receiver.requests) == 1, "the message is on its way")
        assert world.value(busy) == 0
        assert deliver(world).tried == 0  # somebody has it
        receiver.hold.set()
        (done,) = sending.results()
    assert done.counts["delivered"] == 1


def test_a_dead_senders_messages_are_sent_again_after_its_lease(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added, 3)
    with world.database.statements() as connection:
        taken = claim(connection)  # and it dies
    assert len(taken) == 3
    assert seconds_until(world, "(SELECT min(next_attempt_at) FROM webhook_deliveries)") > LEASE_SECONDS - 5
    assert deliver(world).tried == 0
    now_is_later(world, f"{LEASE_SECONDS + 1} seconds")
    assert deliver(world).counts["delivered"] == 3
    assert {UUID(id_) for id_ in receiver.ids} == {message.message_id for message in taken}
    assert {row["attempts"] for row in outbox(world)} == {2}
    # Should it live after all, it changes nothing but that the message is known to have arrived.
    with world.database.statements() as connection:
        webhook_outbox.record(connection, taken[0], webhook_outbox.Answer(None, "late"))
        webhook_outbox.release(connection, taken)
    assert {(row["status"], row["attempts"]) for row in outbox(world)} == {("delivered", 2)}


def test_many_senders_send_each_message_once(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, added, 400)

    def send() -> int:
        return sum(deliver(world).counts["delivered"] for _ in range(3))

    with world.calls(*[send] * 4) as calls:
        calls.start()
        calls.results()
    while deliver(world).tried:
        pass
    assert [row["last_error"] for row in outbox(world) if row["status"] != "delivered"] == []
    assert len(receiver.ids) == len(set(receiver.ids)) == 400


# --- where it may not go ---------------------------------------------------------------------------------------------


def test_a_private_address_is_refused_at_delivery_too(world: World, receiver: Receiver) -> None:
    """As when the setting was turned off since."""
    added, _ = endpoint(world, "run.finished", url=f"https://127.0.0.1:{receiver.port}/")
    write(world, added)
    assert deliver(world, Sender(allow_private=False)).counts["failed"] == 1
    (row,) = outbox(world)
    assert row["last_error"].startswith("127.0.0.1, which is no public address")
    world.sql.execute("UPDATE webhook_endpoints SET url = %s", (receiver.url(),))
    now_is_later(world)
    assert deliver(world, Sender(allow_private=False)).counts["failed"] == 1
    assert outbox(world)[0]["last_error"].startswith("the URL must begin with https://")
    assert receiver.requests == []


def test_a_name_that_leads_inside_by_now_is_refused_and_nobody_is_connected_to(
    world: World, receiver: Receiver
) -> None:
    """DNS rebinding: public when it was added, loopback when it is called."""
    added, _ = endpoint(world, "run.finished", url=f"https://hooks.example:{receiver.port}/")
    write(world, added, 3)
    asked: list[str] = []

    def leads_inside(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["93.184.216.34", "127.0.0.1"]

    assert deliver(world, Sender(allow_private=False, look_up=leads_inside)).counts["failed"] >= 1
    assert set(asked) == {"hooks.example"}
    assert "hooks.example leads to 127.0.0.1" in {
        row["last_error"].split(",")[0] for row in outbox(world) if row["last_error"]
    }
    assert receiver.connections == set()


def test_a_name_is_looked_up_by_us_alone(world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the very address that was checked: nobody asks for the name a second time."""
    added, _ = endpoint(world, "run.finished", url=receiver.url(host="hooks.example"))
    write(world, added)
    looked_up: list[Any] = []
    system = socket.getaddrinfo

    def watched(host: Any, *arguments: Any, **options: Any) -> Any:
        looked_up.append(host)
        return system(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    sender = Sender(allow_private=True, look_up=lambda _host, _port: ["127.0.0.1"])
    assert deliver(world, sender).counts["delivered"] == 1
    assert "hooks.example" not in looked_up
    assert receiver.requests[0].headers["host"] == f"hooks.example:{receiver.port}"


def test_where_one_address_does_not_answer_the_next_one_is_tried(world: World, receiver: Receiver) -> None:
    added, _ = endpoint(world, "run.finished", url=receiver.url(host="hooks.example"))
    write(world, added)
    sender = Sender(allow_private=True, look_up=lambda _host, _port: ["127.0.0.2", "::1", "127.0.0.1"])
    assert deliver(world, sender).counts["delivered"] == 1


@pytest.mark.parametrize("addresses", [[], ["127.0.0.1"]])
def test_an_address_that_nobody_answers_at_is_a_failure_like_any_other(world: World, addresses: list[str]) -> None:
    added, _ = endpoint(world, "run.finished", url="http://hooks.example:1/")
    write(world, added)
    sender = Sender(allow_private=True, look_up=lambda _host, _port: addresses)
    assert deliver(world, sender).counts["failed"] == 1
    assert outbox(world)[0]["last_error"].startswith("ConnectError")


def test_the_proxy_of_the_environment_is_not_used(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
        added, _ = endpoint(world, "run.finished", url=receiver.url())
        write(world, added)
        assert deliver(world).counts["delivered"] == 1
        assert proxy.requests == []
