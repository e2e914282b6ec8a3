"""Runs: listed by cursor while others come in, shown, and followed by server-sent events across broken connections."""

from __future__ import annotations

import itertools
import json
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.acceptance.http_service import fresh_key, problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from refresh.runs import Opened
    from tests.acceptance.http_service import Deployment
    from tests.integration.world import World

RUNS = "/api/admin/runs"


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client()


def page(client: httpx.Client, **query: Any) -> dict[str, Any]:
    answer = client.get(RUNS, params=query)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    return said


# --- the list


def test_pages_are_stable_while_runs_come_in(client: httpx.Client, world: World) -> None:
    wanted = [str(world.scan().run_id) for _ in range(7)][::-1]
    first = page(client, limit=3)
    seen, before = [run["runId"] for run in first["runs"]], first["next"]
    while before is not None:
        world.scan()
        following = page(client, limit=3, before=before)
        seen += [run["runId"] for run in following["runs"]]
        before = following["next"]
    assert seen[:7] == wanted
    assert len(set(seen)) == len(seen)
    everything = world.rows("SELECT id FROM credit_refresh_runs ORDER BY created_at DESC, id DESC")
    assert seen == [str(row["id"]) for row in everything if str(row["id"]) in seen]
    problem(client.get(RUNS, params={"before": "00000000-0000-4000-8000-000000000000"}), 404, "not-found")


def test_the_list_is_filtered(client: httpx.Client, world: World) -> None:
    dry, live = world.scan(dry_run=True), world.scan()
    cron = world.scan(source="cron", requested_by="api:cron")
    assert page(client, dryRun="true", limit=1)["runs"][0]["runId"] == str(dry.run_id)
    assert [run["runId"] for run in page(client, source="cron")["runs"]] == [str(cron.run_id)]
    assert page(client, dryRun="false", source="cli", limit=1)["runs"][0]["runId"] == str(live.run_id)
    assert page(client, kind="rollback")["runs"] == []
    assert page(client, status="failed") == {"runs": [], "next": None}
    created = page(client, limit=1)["runs"][0]["createdAt"]
    assert [run["runId"] for run in page(client, since=created)["runs"]] == [str(cron.run_id)]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": "0"}, "query.limit"), ({"limit": "201"}, "query.limit"), ({"status": "done"}, "query.status"),
        ({"before": "x"}, "query.before"), ({"since": "yesterday"}, "query.since"), ({"since": "1"}, "query.since"),
        ({"dryRun": "perhaps"}, "query.dryRun"), ({"kind": "grant"}, "query.kind"),
    ],
)  # fmt: skip
def test_a_bad_filter_is_named(client: httpx.Client, query: dict[str, str], field: str) -> None:
    said = problem(client.get(RUNS, params=query), 422, "invalid-request")
    assert [error["field"] for error in said["errors"]] == [field]


def test_a_run_that_there_is_not(client: httpx.Client) -> None:
    for path in ("", "/events"):
        problem(client.get(f"{RUNS}/00000000-0000-4000-8000-000000000000{path}"), 404, "not-found")
        problem(client.get(f"{RUNS}/latest{path}"), 422, "invalid-request")


# --- server-sent events


class Events:
    """A client as a browser's EventSource is one: it connects again by itself, with the last id that it saw."""

    def __init__(self, client: httpx.Client, run_id: object) -> None:
        self._client = client
        self._url = f"{RUNS}/{run_id}/events"
        self.seen: list[dict[str, str]] = []
        self.connections = 0

    def read(self, at_most: int | None = None) -> None:
        """Until the stream ends, breaks, or so many events have come."""
        headers = {"Last-Event-ID": self.seen[-1]["id"]} if self.seen else {}
        self.connections += 1
        with self._client.stream("GET", self._url, headers=headers) as answer:
            if answer.status_code == 204:
                return
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-cache"
            for count, event in enumerate(_events(answer.iter_lines()), 1):
                self.seen.append(event)
                if count == at_most:
                    return

    def until_the_end(self) -> None:
        """Through any number of broken connections."""
        while not self.seen or self.seen[-1]["event"] != "end":
            try:
                self.read()
            except httpx.TransportError:
                continue

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(event["data"]) for event in self.seen]


def _events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    event: dict[str, str] = {}
    for line in lines:
        if not line:
            if event:
                yield event
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value


_numbers = itertools.count()


def _run_of(world: World, batches: int) -> tuple[Opened, list[int]]:
    for number in range(batches):
        world.user(f"followed-{next(_numbers)}-{number}")
    run = world.scan(batch_size=1)
    return run, world.claim(run)


def _seen(events: Events, states: int) -> bool:
    return len(events.seen) == states


def test_a_run_is_followed_to_its_end(client: httpx.Client, world: World) -> None:
    run, batches = _run_of(world, 3)
    events = Events(client, run.run_id)
    following = threading.Thread(target=events.until_the_end)
    following.start()
    for number, batch in enumerate(batches, 1):
        world.until(partial(_seen, events, number), "the state was told")
        world.work([batch])
    following.join(20)
    told = events.told()
    assert [event["event"] for event in events.seen] == ["progress"] * 3 + ["end"]
    assert [run["usersDone"] for run in told] == [0, 1, 2, 3]
    assert [run["status"] for run in told] == ["running"] * 3 + ["succeeded"]
    assert told[-1]["creditsGranted"] == 3 * 600
    assert told[-1] == client.get(RUNS).json()["runs"][0]  # to the letter: instants, too
    assert events.connections == 1
    assert {event["retry"] for event in events.seen} == {"1000"}
    # A browser comes back after the end: 204 is what makes it stay away.
    with client.stream(
        "GET", f"{RUNS}/{run.run_id}/events", headers={"Last-Event-ID": events.seen[-1]["id"]}
    ) as answer:
        assert (answer.status_code, answer.read()) == (204, b"")


def test_whoever_connects_again_misses_nothing_and_hears_nothing_twice(client: httpx.Client, world: World) -> None:
    run, batches = _run_of(world, 4)
    events = Events(client, run.run_id)
    events.read(at_most=1)
    world.work(batches[:1])
    events.read(at_most=1)
    world.work(batches[1:3])  # while nobody is connected
    events.read(at_most=1)
    world.work(batches[3:])
    events.until_the_end()
    assert [run["usersDone"] for run in events.told()] == [0, 1, 3, 4]
    assert len({event["id"] for event in events.seen}) == 4


def test_a_server_that_is_killed_in_between(deployment: Deployment, world: World) -> None:
    run, batches = _run_of(world, 3)
    api = deployment.launcher.api(deployment.env)
    events = Events(deployment.client(api=api), run.run_id)
    following = threading.Thread(target=events.until_the_end)
    following.start()
    world.until(lambda: len(events.seen) == 1, "the first state was told")
    api.kill()
    world.work(batches[:2])
    api.restart()
    world.until(lambda: len(events.seen) >= 2, "the stream went on")
    world.work(batches[2:])
    following.join(20)
    assert [run["usersDone"] for run in events.told()] == [0, 2, 3]
    assert events.connections > 1


def test_a_database_that_is_away_for_a_moment_breaks_no_stream(
    deployment: Deployment, client: httpx.Client, world: World
) -> None:
    run, batches = _run_of(world, 2)
    events = Events(client, run.run_id)
    following = threading.Thread(target=events.until_the_end)
    following.start()
    world.until(lambda: len(events.seen) == 1, "the first state was told")
    # The API's sessions are ended, and for a second it gets no others.
    name = deployment.database_name
    with deployment.cluster.admin() as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'credits-api'"
            " AND datname = %s", (name,),
        )  # fmt: skip
        world.until(lambda: "cannot be read; it is tried again" in deployment.api.all_logs(), "it noticed")
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    world.work(batches)
    following.join(20)
    assert (events.seen[-1]["event"], events.told()[-1]["usersDone"], events.connections) == ("end", 2, 1)


def test_many_follow_and_others_are_served(client: httpx.Client, deployment: Deployment, world: World) -> None:
    """A stream waits without a thread: ten threads serve any number of them, and requests besides."""
    run, batches = _run_of(world, 1)
    following = [Events(deployment.client(), run.run_id) for _ in range(40)]
    threads = [threading.Thread(target=events.until_the_end) for events in following]
    for thread in threads:
        thread.start()
    world.until(lambda: all(events.seen for events in following), "all are connected")
    assert client.get(f"{RUNS}/{run.run_id}").elapsed.total_seconds() < 5
    world.work(batches)
    for thread in threads:
        thread.join(20)
    assert {events.seen[-1]["event"] for events in following} == {"end"}


def test_a_server_that_is_told_to_stop_ends_its_streams(deployment: Deployment, world: World) -> None:
    run, _batches = _run_of(world, 1)
    api = deployment.launcher.api(deployment.env)
    events = Events(deployment.client(api=api), run.run_id)

    def follow() -> None:
        with pytest.raises(httpx.TransportError):
            events.read()

    following = threading.Thread(target=follow)
    following.start()
    world.until(lambda: len(events.seen) == 1, "the first state was told")
    deployment.launcher.processes[-1].stop(timeout=15)
    following.join(5)
    assert not following.is_alive()
    assert api.exit_code == -signal.SIGTERM  # as Uvicorn has it: after an end in good order
    cancelled = deployment.client().post(f"{RUNS}/{run.run_id}/cancel", headers=fresh_key())
    assert cancelled.json()["status"] == "cancelled"
