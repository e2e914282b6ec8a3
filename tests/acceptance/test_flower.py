"""Flower shows what the workers do, to those who have the password, and lets nobody do anything."""

from __future__ import annotations

import json
from base64 import b64encode
from http import HTTPStatus
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

from celeryconfig import TaskNames
from tests.acceptance.nodes import FLOWER_CREDENTIALS

if TYPE_CHECKING:
    from tests.acceptance.ledger import Ledger
    from tests.acceptance.nodes import LocalFlower
    from tests.acceptance.service import Service

USERS = 1_000


class Browser:
    """Asks Flower."""

    def __init__(self, flower: LocalFlower) -> None:
        self._port = flower.port

    def ask(self, path: str, *, method: str = "GET", credentials: str | None = FLOWER_CREDENTIALS) -> tuple[int, str]:
        headers = {"Authorization": f"Basic {b64encode(credentials.encode()).decode()}"} if credentials else {}
        connection = HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def see(self, path: str) -> dict[str, Any]:
        status, body = self.ask(path)
        assert status == HTTPStatus.OK, body
        found: dict[str, Any] = json.loads(body)
        return found


def test_flower_shows_a_run_to_those_who_may_look_and_takes_no_orders(service: Service, ledger: Ledger) -> None:
    flower = Browser(service.start_flower())
    name = service.worker.hostname()
    service.until(lambda: name in flower.see("/api/workers"), "Flower knows the worker")

    for path in ("/", "/api/workers", "/api/tasks"):
        assert flower.ask(path, credentials=None)[0] == HTTPStatus.UNAUTHORIZED
        assert flower.ask(path, credentials="credits:guessed")[0] == HTTPStatus.UNAUTHORIZED
    for order in (
        f"/api/worker/shutdown/{name}",
        f"/api/worker/queue/cancel-consumer/{name}?queue=batches",
        f"/api/task/async-apply/{TaskNames.SCAN}",
    ):
        assert flower.ask(order, method="POST")[0] == HTTPStatus.FORBIDDEN
    assert service.taken(TaskNames.SCAN, service.worker) == 0

    ledger.add_due_users(USERS)
    run_id = service.scan()
    service.until_finished(run_id)

    def succeeded(task: str) -> list[dict[str, Any]]:
        return list(flower.see(f"/api/tasks?taskname={task}&state=SUCCESS").values())

    service.until(lambda: len(succeeded(TaskNames.BATCH)) == 10, "Flower has seen the ten batches")
    batches = succeeded(TaskNames.BATCH)
    assert {task["worker"] for task in batches} == {name}
    assert sorted(task["args"] for task in batches) == sorted(f"([{id_}],)" for id_ in ledger.batches("done"))
    assert len(succeeded(TaskNames.SCAN)) == 1
