"""What an endpoint does must cost the other ones nothing: whatever it answers, however slowly, or its name."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from refresh import webhook_post
from refresh.webhook_outbox import CLAIM_MAX
from refresh.webhook_post import Sender
from tests.integration.hooks import deliver, endpoint, outbox, see, write
from tests.receiver import Handler, Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.world import World


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


@pytest.mark.parametrize(
    "header",
    ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Mon, 01 Jan 2030 00:00:00 +99999999999999999999", "9" * 5_000],
)
def test_whatever_time_one_asks_for_the_others_are_told(world: World, receiver: Receiver, header: str) -> None:
    with receiving() as odd:
        bad, _ = endpoint(world, "run.finished", url=odd.url())
        good, _ = endpoint(world, "run.finished", url=receiver.url())
        write(world, bad)
        write(world, good, 30)
        odd.script = [lambda handler: handler.answer(503, Retry_After=header)]
        done = deliver(world)
    assert (done.counts["delivered"], done.counts["failed"], len(receiver.requests)) == (30, 1, 30)
    assert (see(world, bad.id)["failures"], see(world, good.id)["failures"]) == (1, 0)


def test_what_nobody_foresaw_is_one_endpoints_failure(world: World, receiver: Receiver) -> None:
    bad, _ = endpoint(world, "run.finished", url="http://odd.example/hooks")
    good, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, bad)
    write(world, good, 30)

    def look_up(_host: str, _port: int) -> list[str]:
        raise RuntimeError("secret-of-nobody")

    done = deliver(world, Sender(allow_private=True, look_up=look_up))
    assert (done.counts["delivered"], done.counts["failed"], len(receiver.requests)) == (30, 1, 30)
    (error,) = {row["last_error"] for row in outbox(world) if row["endpoint_id"] == bad.id}
    assert error == "RuntimeError"


def test_a_name_that_nobody_answers_for_is_not_waited_for(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own look-up knows no time limit, and may take a minute."""
    monkeypatch.setattr(webhook_post, "ATTEMPT_SECONDS", 0.6)
    bad, _ = endpoint(world, "run.finished", url="http://slow.example/hooks")
    good, _ = endpoint(world, "run.finished", url=receiver.url())
    write(world, bad, 50)
    write(world, good, 50)
    answered = threading.Event()

    def look_up(_host: str, _port: int) -> list[str]:
        answered.wait(10)
        return ["127.0.0.1"]

    began = time.monotonic()
    done = deliver(world, Sender(allow_private=True, look_up=look_up))
    answered.set()
    assert time.monotonic() - began < 5
    assert done.counts["delivered"] == len(receiver.requests) == 50
    assert {row["last_error"] for row in outbox(world) if row["endpoint_id"] == bad.id} - {None} == {
        "no answer within 1 s"
    }


def thoughtful(handler: Handler) -> None:
    """A success, after a while."""
    time.sleep(1.5)
    handler.answer(204)


def test_one_that_takes_its_time_keeps_none_waiting(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers well, so it is not left alone: as long as its part of the round lasts, the others get more."""
    monkeypatch.setattr(webhook_post, "ROUND_SECONDS", 4.0)
    with receiving() as slow:
        slow.script = [thoughtful] * 100
        behind, _ = endpoint(world, "run.finished", url=slow.url())
        good, _ = endpoint(world, "run.finished", url=receiver.url())
        write(world, behind, 100)
        write(world, good, 3 * CLAIM_MAX)
        deliver(world)
        assert 0 < len(slow.requests) < 20
    assert len(receiver.requests) == 3 * CLAIM_MAX
    states = {row["status"] for row in outbox(world) if row["endpoint_id"] == good.id}
    assert states == {"delivered"}


def test_two_that_keep_up_do_not_keep_a_round_going(world: World, receiver: Receiver) -> None:
    """A worker over all queues has batches to do."""
    with receiving() as other:
        for url in (receiver.url(), other.url()):
            added, _ = endpoint(world, "run.finished", url=url)
            write(world, added, 10 * CLAIM_MAX)
        done = deliver(world)
        assert done.tried <= 4 * CLAIM_MAX
        assert min(len(receiver.requests), len(other.requests)) >= CLAIM_MAX
