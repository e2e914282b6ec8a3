"""docker-compose.yml, the Dockerfile and their neighbours, compared with the code: no Docker engine is needed."""

from __future__ import annotations

import json
import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from flower.inspector import Inspector  # type: ignore[import-untyped]
from packaging.requirements import Requirement

import celeryconfig
from settings import CHECKOUT
from tests.compose_contract import copied, interpolated, problems

if TYPE_CHECKING:
    from collections.abc import Callable

Compose = dict[str, Any]

COMPOSE_TEXT = (CHECKOUT / "docker-compose.yml").read_text()
DOCKERFILE = (CHECKOUT / "deploy" / "Dockerfile").read_text()


def services(compose: Compose) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.fixture
def compose() -> Compose:
    """The file's content, with no part shared between services, so that an error is planted in one alone."""
    loaded: Compose = json.loads(json.dumps(yaml.safe_load(COMPOSE_TEXT)))
    return loaded


def swap(service: str, old: str, new: str) -> Callable[[Compose], None]:
    """Replace a text wherever it stands in a service; an empty word of a command is dropped."""

    def plant(compose: Compose) -> None:
        before = json.dumps(services(compose)[service])
        assert old in before
        changed = json.loads(before.replace(old, new))
        if isinstance(changed.get("command"), list):
            changed["command"] = [word for word in changed["command"] if word]
        services(compose)[service] = changed

    return plant


def put(service: str, **values: object) -> Callable[[Compose], None]:
    """Set keys of a service; None takes one away."""

    def plant(compose: Compose) -> None:
        merged = {**services(compose)[service], **values}
        services(compose)[service] = {key: value for key, value in merged.items() if value is not None}

    return plant


def remove(*path: str) -> Callable[[Compose], None]:
    def plant(compose: Compose) -> None:
        found: Any = compose
        for key in path[:-1]:
            found = found[key]
        del found[path[-1]]

    return plant


def test_compose_and_the_dockerfile_agree_with_the_code(compose: Compose) -> None:
    assert problems(compose, DOCKERFILE) == []


PLANTED: list[tuple[Callable[[Compose], None], str]] = [
    (swap("worker", "control,batches,bulk", "control,bulk"), "no worker drains the queue 'batches'"),
    (swap("worker", "control,batches", "control,batches,urgent"), "the queue 'urgent' is not in celeryconfig"),
    (remove("services", "webhooks"), "no worker drains the queue 'webhooks'"),
    (put("webhooks", networks=["database", "broker"]), "on no network that leads outside"),
    (put("worker", networks=["database", "broker", "outside"]), "on a network that leads outside"),
    (swap("worker", "--without-gossip", "--without-gosip"), "worker has no option --without-gosip"),
    (swap("worker", "worker@%h", "worker@here"), "replicas must differ in their --hostname"),
    (put("worker", stop_grace_period="10s"), "killed before a statement's time limit"),
    (swap("worker", "worker.heartbeat", "heartbeat"), "does not look at worker.heartbeat"),
    (put("beat", command="celery --app=tasks beat"), "beat: its command must be a list"),
    (swap("beat", '"CREDIT_REFRESH_CRON": "', '"CREDIT_REFRESH_CRON": "0'), "beat: its variables differ"),
    (swap("migrate", '"upgrade"', '"upgrad"'), "db has no command upgrad"),
    (swap("migrate", '"CREDITS_FREE_TIER"', '"CREDIT_FREE_TIER"'), "nobody reads the variable CREDIT_FREE_TIER"),
    (swap("migrate", "${CREDITS_PRO_TIER", "${CREDITS_FREE_TIER"), "CREDITS_PRO_TIER is taken from CREDITS_FREE_TIER"),
    (remove("services", "migrate", "environment", "CREDITS_PRO_TIER"), "no service is given CREDITS_PRO_TIER"),
    (put("migrate", restart="always"), "migrate: runs once"),
    (put("flower", depends_on=["reddis"]), "depends on reddis, which is not a service"),
    (remove("volumes", "redis"), "redis: redis is not among the volumes"),
    (put("beat", networks=["database", "brokers"]), "brokers is not among the networks"),
    (put("beat", secrets=["token"]), "token is not among the secrets"),
    (swap("flower", "--read-only", ""), "must be started with --read-only"),
    (swap("flower", "--purge-offline-workers", "--purge-offline"), "flower has no option --purge-offline"),
    (remove("services", "flower", "environment", "FLOWER_BASIC_AUTH"), "must ask for a password"),
    (put("flower", ports=["5555:5555"]), "publishes 5555:5555 beyond loopback"),
    (swap("api", "api:app", "api:application"), "it does not serve api:app"),
    (swap("api", "--no-access-log", "--no-acces-log"), "uvicorn has no option --no-acces-log"),
    (swap("api", "--no-access-log", ""), "must be started with --no-access-log"),
    (swap("api", "--timeout-graceful-shutdown=20", "--timeout-graceful-shutdown=60"), "killed before it has cut"),
    (swap("api", "--host=0", "--host=1"), "nobody else reaches it"),
    (swap("api", "--port=8000", "--port=8001"), "is not its --port=8001"),
    (swap("api", "/healthz", "/"), "does not ask /healthz"),
    (put("api", ports=["8000:8000"]), "publishes 8000:8000 beyond loopback"),
    (swap("api", "${JWT_SECRET", "${ADMIN_TOKEN"), "JWT_SECRET is taken from ADMIN_TOKEN"),
    (swap("api", '"CRON_SECRET"', '"CRON_TOKEN"'), "nobody reads the variable CRON_TOKEN"),
    (put("flower", ports=["127.0.0.1:5555:5556"]), "is not its --port=5555"),
    (swap("flower", "--max-tasks=10000", "--persistent=True"), "--persistent pickles what it keeps"),
    (swap("redis", "noeviction", "allkeys-lru"), "maxmemory-policy must be noeviction, and is allkeys-lru"),
    (swap("redis", "appendonly yes", "appendonly no"), "appendonly must be yes"),
    (swap("redis", ":?see .env.example", ":-redis"), "REDISCLI_AUTH must come from .env"),
    (swap("worker", "credits:${POSTGRES_PASSWORD:?see .env.example}", "credits:x"), "password in DATABASE_URL"),
    (put("redis", image="redis"), "the image redis has no version"),
    (remove("services", "redis", "healthcheck"), "redis: has no health check"),
    (put("postgres", volumes=["postgres:/var/lib/postgresql/data"]), "the volume belongs at /var/lib/postgresql"),
    (put("postgres", user=None), "postgres: must run as a user and group of fixed numbers"),
    (put("worker", user="0:0"), "worker: must run as a user and group of fixed numbers"),
    (put("worker", read_only=False), "worker: must have a read-only file system"),
    (put("worker", cap_add=["SYS_ADMIN"]), "worker: must drop all capabilities"),
    (put("worker", security_opt=None), "worker: must not gain privileges"),
    (put("worker", restart=None), "worker: must be restarted"),
    (put("worker", tmpfs=[]), "worker: the state folder /var/lib/credits cannot be written to"),
    (put("worker", logging=None), "worker: must rotate its log"),
]


@pytest.mark.parametrize(("plant", "expected"), PLANTED, ids=[expected for _, expected in PLANTED])
def test_a_planted_error_is_named(compose: Compose, plant: Callable[[Compose], None], expected: str) -> None:
    plant(compose)
    assert [line for line in problems(compose, DOCKERFILE) if expected in line]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("COPY refresh/ refresh/\n", "", "does not copy refresh"),
        (" logs.py ", " ", "does not copy logs.py"),
        ("COPY migrations/ migrations/\n", "", "does not copy migrations"),
        ("COPY models/ models/", "COPY models/ tables/ models/", "copies tables, which is not there"),
        ("USER 10001:10001", "USER root", "its user root is not that of worker"),
        ('CMD ["credits", "--help"]', "CMD credits --help", "CMD goes through a shell"),
        ("--require-hashes ", "", "installs without --require-hashes"),
        ("python:3.11-slim-trixie", "python", "the base image python"),
    ],
)
def test_a_planted_error_in_the_dockerfile_is_named(compose: Compose, old: str, new: str, expected: str) -> None:
    assert old in DOCKERFILE
    assert [line for line in problems(compose, DOCKERFILE.replace(old, new)) if expected in line]


def test_the_example_names_the_variables_that_compose_reads(compose: Compose) -> None:
    example = (CHECKOUT / ".env.example").read_text()
    assert set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE)) == interpolated(compose)
    to_fill_in = set(re.findall(r"^([A-Z_]+)=$", example, re.MULTILINE))
    assert to_fill_in == set(re.findall(r"\$\{(\w+):\?", COMPOSE_TEXT))


def test_the_image_is_built_from_what_it_copies_alone() -> None:
    lines = (CHECKOUT / ".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:].rstrip("/") for rule in rules if rule.startswith("!")} == set(copied(DOCKERFILE))


def test_the_image_has_what_celerys_redis_transport_imports() -> None:
    """Celery declares it as an extra, and what the tests install for themselves hides that it is missing."""
    locked = set(re.findall(r"^([\w.-]+)==", (CHECKOUT / "requirements" / "runtime.txt").read_text(), re.MULTILINE))
    declared = [Requirement(line) for line in metadata.requires("kombu") or ()]
    wanted = {line.name for line in declared if line.marker and line.marker.evaluate({"extra": "redis"})}
    assert "redis" in wanted
    assert wanted <= locked


def test_flower_can_ask_the_workers() -> None:
    """Each of its questions holds a pooled connection while it takes a second one to publish.

    With a smaller pool they wait for each other for ever: Flower shows no worker and does not end on SIGTERM.
    """
    limit = celeryconfig.broker_pool_limit
    assert not limit or limit > Inspector.max_concurrency
