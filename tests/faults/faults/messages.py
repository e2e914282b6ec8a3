"""Messages that are not what a worker expects: of another release, of another program, or of nobody.

They are put into the broker's lists as bytes, as anybody with access to it can.
"""

from __future__ import annotations

import base64
import json
import pickle
import time
from typing import TYPE_CHECKING, Any, cast

from celeryconfig import QueueNames, TaskNames
from tests.faults.faults.kinds import fault

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

    from tests.faults.arena import Arena
    from tests.faults.faults.kinds import Hits

TAKEN = "messages that a worker took"
_TAKE_SECONDS = 60.0
_POLL_SECONDS = 0.05

_DONE = "SELECT id FROM credit_refresh_batches WHERE status = 'done' ORDER BY id DESC LIMIT 20"
_PENDING = "SELECT id FROM credit_refresh_batches WHERE status = 'pending' LIMIT 20"


@fault("unknown-batches", TAKEN)
def ring_for_nobody(arena: Arena, random: Random, hits: Hits) -> None:
    """Messages of batches that never were, or are done since long."""
    with arena.connect() as connection:
        done = [batch_id for (batch_id,) in connection.execute(_DONE)]
    lists = [[10**15], [0], [-1], [2**63 - 1], [2**63], [10**30], [], done, done * 50, [*done, 10**15]]
    _send(arena, random, hits, (_message(random, TaskNames.BATCH, [ids]) for ids in lists))


@fault("malformed-messages", TAKEN)
def ring_wrongly(arena: Arena, random: Random, hits: Hits) -> None:
    """Messages of ours with arguments that make no sense, of tasks that we do not have, and in pickle."""
    wrong: list[list[Any]] = [[], [None], ["x"], [1], [["x"]], [[None]], [[[1]]], [[1.5]], [{"a": 1}], [[1], [2]]]
    texts = [_message(random, TaskNames.BATCH, arguments) for arguments in wrong]
    texts += [_message(random, name, []) for name in ("tasks.nothing", "os.system", "celery.backend_cleanup", "")]
    texts.append(_message(random, TaskNames.BATCH, [], headers={"id": None, "task": None}))
    body = pickle.dumps(([[1]], {}, {}))
    texts.append(_message(random, TaskNames.BATCH, [], body=body, content_type="application/x-python-serialize"))
    texts.append(_message(random, TaskNames.BATCH, [], body=b"\xff\xfe not JSON"))
    texts.append(_message(random, TaskNames.BATCH, [], body=b'"a text"'))
    _send(arena, random, hits, texts)


@fault("alien-messages", TAKEN)
def ring_in_tongues(arena: Arena, random: Random, hits: Hits) -> None:
    """Bytes in the broker's lists that are no message at all."""
    whole = _message(random, TaskNames.BATCH, [[1]])
    envelope = json.loads(whole)
    del envelope["properties"]
    aliens = [
        b"",
        b"\x00\xff\xfe",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"text"',
        whole[: len(whole) // 2],
        b"x" * 10**6,
    ]
    _send(arena, random, hits, [*aliens, json.dumps(envelope).encode()])


@fault("older-release", TAKEN)
def ring_as_before(arena: Arena, random: Random, hits: Hits) -> None:
    """Messages as another release of ours, or of Celery, has left them: more arguments, and Celery's first protocol."""
    with arena.connect() as connection:
        ids = [batch_id for (batch_id,) in connection.execute(_PENDING)] or [1]
    texts = [
        _message(random, TaskNames.BATCH, [ids], {"force": True}),
        _message(random, TaskNames.BATCH, [ids, "2020-01-01T00:00:00Z"]),
        _message(random, TaskNames.BATCH, [], {"batch_ids": ids}),
        _message(random, TaskNames.BATCH, [], {"batch_id": ids[0]}),
        _message(random, TaskNames.SCAN, ["2020-01-01T00:00:00Z"]),
        _message(random, TaskNames.UPKEEP, [], {"interval": 60}),
    ]
    first = {"task": TaskNames.BATCH, "id": _id(random), "args": [ids], "kwargs": {}, "retries": 0}
    texts.append(_message(random, TaskNames.BATCH, [], body=json.dumps(first).encode(), headers={}))
    _send(arena, random, hits, texts)


def _send(arena: Arena, random: Random, hits: Hits, texts: Iterable[bytes]) -> None:
    """Put messages into queues, and wait until workers have taken them."""
    sent = [(random.choice(QueueNames.ALL), text) for text in texts]
    random.shuffle(sent)
    for queue, text in sent:
        arena.redis_admin.lpush(queue, text)
    deadline = time.monotonic() + _TAKE_SECONDS
    while sent and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = [(queue, text) for queue, text in sent if arena.redis_admin.lpos(queue, cast("str", text)) is not None]
        hits.count(TAKEN, len(sent) - len(left))
        sent = left


def _id(random: Random) -> str:
    return f"{random.getrandbits(128):032x}"


def _message(  # noqa: PLR0913 - what a message is made of
    random: Random,
    task: str,
    args: list[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    body: bytes | None = None,
    headers: dict[str, Any] | None = None,
    content_type: str = "application/json",
) -> bytes:
    """As kombu writes one for Redis."""
    content = json.dumps([args, kwargs or {}, {}]).encode() if body is None else body
    task_id = _id(random)
    properties = {
        "body_encoding": "base64",
        "correlation_id": task_id,
        "delivery_info": {"exchange": "", "routing_key": QueueNames.BATCHES},
        "delivery_mode": 2,
        "delivery_tag": _id(random),
        "priority": 0,
    }
    usual = {"lang": "py", "task": task, "id": task_id, "root_id": task_id, "parent_id": None, "retries": 0}
    envelope = {
        "body": base64.b64encode(content).decode(),
        "content-encoding": "utf-8",
        "content-type": content_type,
        "headers": usual if headers is None else headers,
        "properties": properties,
    }
    return json.dumps(envelope).encode()
