"""What is no message of ours: refused in one line, kept as a dead letter, and no worker ends of it."""

from __future__ import annotations

import base64
import json
import uuid
import zlib
from typing import TYPE_CHECKING, Any

from celeryconfig import DEAD_LETTERS_MAX, QueueNames, TaskNames
from tests.integration.forked import credits  # noqa: A004

if TYPE_CHECKING:
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import Launcher
    from tests.acceptance.service import Service

USERS = 100
CANARY = "canary-7f3a"
"""In all of them: what somebody sends may be secret, and nothing of it belongs into a log."""
NOTHING: list[Any] = [[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]


def envelope(body: object, *, compressed: str | None = None, **headers: object) -> dict[str, Any]:
    """A message as kombu puts it into Redis; of tasks.upkeep, unless its headers say otherwise."""
    raw = json.dumps(body).encode()
    if compressed:
        raw, headers = zlib.compress(raw), {**headers, "compression": compressed}
    number = uuid.uuid4().hex
    return {
        "body": base64.b64encode(raw).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": TaskNames.UPKEEP, "id": number, "secret": CANARY, **headers},
        "properties": {
            "delivery_tag": number, "delivery_info": {"exchange": "", "routing_key": QueueNames.BATCHES},
            "body_encoding": "base64",
        },
    }  # fmt: skip


def batch(*arguments: object, **keywords: object) -> dict[str, Any]:
    return envelope([list(arguments), keywords, NOTHING[2]], task=TaskNames.BATCH)


ARGUMENTS = "has other arguments than the task takes"
MORE = "asks for more than its task"
SIGNATURE = {"task": TaskNames.SCAN, "args": [], "kwargs": {}, "options": {}}
CASES: list[tuple[object, str]] = [
    # other arguments
    (batch(), ARGUMENTS), (batch(CANARY), ARGUMENTS), (batch([CANARY]), ARGUMENTS), (batch({"id": 1}), ARGUMENTS),
    (batch([1], [2]), ARGUMENTS), (batch(None), ARGUMENTS), (batch([True]), ARGUMENTS), (batch([1.0]), ARGUMENTS),
    (batch([1], secret=CANARY), ARGUMENTS), (envelope([[CANARY], {}, {}]), ARGUMENTS),
    # other tasks, of which Celery itself brings some
    (envelope(NOTHING, task="tasks.no_such_task"), "names a task that is not ours"),
    (envelope(NOTHING, task="celery.backend_cleanup"), "names a task that is not ours"),
    (envelope(NOTHING, task="os.system"), "names a task that is not ours"),
    (envelope(NOTHING, task=[CANARY]), "names no task"),
    (envelope(NOTHING, task=None), "names no task"),
    (envelope({"task": TaskNames.UPKEEP, "id": "1", "args": [], "kwargs": {}}, task=None), "names no task"),
    # more than a task
    (envelope([[], {}, {"callbacks": [SIGNATURE]}]), MORE), (envelope([[], {}, {"errbacks": [SIGNATURE]}]), MORE),
    (envelope([[], {}, {"chain": [SIGNATURE]}]), MORE), (envelope([[], {}, {"chord": SIGNATURE}]), MORE),
    (envelope(NOTHING, eta="2199-01-01T00:00:00+00:00"), MORE), (envelope(NOTHING, eta=CANARY), MORE),
    (envelope(NOTHING, expires="2001-01-01T00:00:00+00:00"), MORE), (envelope(NOTHING, expires={"a": 1}), MORE),
    # no JSON, or not where it should be
    ({**envelope(NOTHING), "content-type": "application/x-python-serialize"}, "cannot be read (ContentDisallowed)"),
    ({**envelope(NOTHING), "content-type": "application/x-yaml"}, "cannot be read (ContentDisallowed)"),
    ({**envelope(NOTHING), "body": base64.b64encode(b"{" + CANARY.encode()).decode()}, "cannot be read"),
    ({**envelope(NOTHING), "body": "\x00!"}, "cannot be read"),
    ({**envelope(NOTHING), "headers": [CANARY]}, "cannot be read"),
    (envelope(NOTHING, compressed="application/x-gzip"), "cannot be read"),
    (envelope(NOTHING, compressed=CANARY), "cannot be read"),
    (envelope(5), "cannot be read"), (envelope({"args": 5}), "cannot be read"), (envelope([1, 2]), "cannot be read"),
    (envelope([[], {}, 5]), "cannot be read"), (envelope(CANARY), "cannot be read"),
    (envelope(NOTHING, id={"unhashable": CANARY}), "cannot be read"),
    # JSON, and no message
    ({}, "cannot be read (KeyError)"), ([CANARY], "cannot be read"), (None, "cannot be read"), (7, "cannot be read"),
    ({"properties": {}}, "cannot be read (KeyError)"),
    ({**envelope(NOTHING), "properties": {"delivery_tag": [CANARY]}}, "cannot be read (TypeError)"),
    # JSON to some, and not to kombu
    (envelope(NOTHING, x={"__type__": CANARY, "__value__": 1}), "cannot be read (ValueError)"),
    (b"\xef\xbb\xbf" + json.dumps(envelope(NOTHING)).encode(), "cannot be read (JSONDecodeError)"),
    (json.dumps(envelope(NOTHING)).encode("utf-16"), "cannot be read"),
    # no JSON at all
    (b"\xff\x00 no JSON " + CANARY.encode(), "cannot be read"), (b"", "cannot be read"),
    (b"[" * 100_000, "cannot be read (RecursionError)"), (b'{"body":', "cannot be read (JSONDecodeError)"),
]  # fmt: skip


def raw(message: object) -> bytes:
    return message if isinstance(message, bytes) else json.dumps(message).encode()


def ask(service: Service, *arguments: str) -> Any:
    """What a command says in JSON."""
    done = credits([*arguments, "--json"], service.env)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def test_what_is_no_message_of_ours_is_refused_and_kept(service: Service, ledger: Ledger, launcher: Launcher) -> None:
    ledger.add_due_users(USERS)
    for number, (message, _) in enumerate(CASES):
        service.redis.lpush(QueueNames.ALL[number % len(QueueNames.ALL)], raw(message))
    service.until(lambda: service.redis.llen(QueueNames.DEAD) == len(CASES), "each message is a dead letter")
    ledger.assert_nothing_granted()

    logs = service.worker.logs()
    assert logs.count("Refused a message") == len(CASES)
    assert "Traceback" not in logs
    assert CANARY not in logs
    letters = ask(service, "dead-letters")["letters"]
    for message, reason in CASES:
        # What reaches a task's door is kept without its envelope.
        held = [letter for letter in letters if _is_of(letter, message)]
        assert any(letter["reason"].startswith(reason) for letter in held), (message, reason, held)
    assert all(len(letter["body"]) <= 4_096 for letter in letters)

    (check,) = (check for check in ask(service, "doctor")["checks"] if check["name"] == "dead letters")
    assert check["state"] == "wrong"
    assert check["text"].startswith(f"{len(CASES)} messages refused")
    assert ask(service, "dead-letters", "--drop", "--yes")["dropped"] == len(CASES)
    assert ask(service, "dead-letters")["letters"] == []

    # The same process, which never stopped.
    run_id = service.scan()
    service.until_finished(run_id)
    ledger.assert_all_granted_once(run_id)
    assert [process.starts for process in launcher.processes if process.name.startswith("worker")] == [1]
    assert service.worker.container.status == "running"


def _is_of(letter: dict[str, Any], message: object) -> bool:
    if letter["headers"] is None:
        begins = raw(message)[:100].decode(errors="backslashreplace")
        return bool(letter["body"][: len(begins)] == begins)
    if not isinstance(message, dict) or "body" not in message:
        return False
    try:
        body = base64.b64decode(message["body"]).decode(errors="backslashreplace")
    except ValueError:
        return False
    return bool(letter["body"] == body[:4_096])


def test_batches_that_are_nobodys_are_none_of_its_business(service: Service, ledger: Ledger) -> None:
    """As those of a database that was restored, or of another release: messages like ours, about nothing."""
    ledger.add_due_users(USERS)
    unknown: list[list[int]] = [[10**15, 0, -1], [10**30], []]
    for batch_ids in unknown:
        service.send(TaskNames.BATCH, batch_ids)
    service.until(lambda: service.taken(TaskNames.BATCH, service.worker) == len(unknown), "the messages were taken")
    ledger.assert_nothing_granted()
    assert service.redis.llen(QueueNames.DEAD) == 0
    assert "Traceback" not in service.worker.logs()


def test_dead_letters_are_bounded_whatever_lies_among_them(service: Service) -> None:
    service.redis.lpush(QueueNames.DEAD, *[b"\xff not a letter %d" % number for number in range(DEAD_LETTERS_MAX)])
    for _ in range(3):
        service.redis.lpush(QueueNames.BULK, b"no JSON")
    service.until(lambda: service.worker.logs().count("Refused a message") == 3, "the messages are refused")
    letters = ask(service, "dead-letters")["letters"]
    assert len(letters) == DEAD_LETTERS_MAX
    assert [letter["reason"] for letter in letters[-3:]] == ["cannot be read (JSONDecodeError)"] * 3
    assert letters[0]["body"] == "\\xff not a letter 3"
    assert "somebody else" in letters[0]["reason"]
