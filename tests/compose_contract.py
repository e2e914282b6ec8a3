"""What docker-compose.yml and deploy/Dockerfile have to agree upon with the code, where no Docker engine can say so.

The schema checker (`make check`) knows the format and no more: it accepts services, volumes and queues that do not
exist, and variables that nobody reads. Use `problems()` for these. It does not show that the images start.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import TYPE_CHECKING, Any

import click
from celery.bin.celery import celery
from flower.options import default_options  # type: ignore[import-untyped]
from uvicorn.main import main as uvicorn

import celeryconfig
from cli.main import main
from db import STATEMENT_TIMEOUT_SECONDS
from settings import CHECKOUT, Settings
from tasks.app import heartbeat_path

if TYPE_CHECKING:
    from collections.abc import Iterator

Service = dict[str, Any]
Services = dict[str, Service]

SETTINGS = frozenset(name.upper() for name in Settings.model_fields)
NOT_OFFERED = {"CREDIT_REFRESH_INTERVAL_SECONDS"}
"""Settings that no service takes from .env: for demos and tests alone."""
OTHERS_VARIABLES = {
    "postgres": {"POSTGRES_DB", "POSTGRES_PASSWORD", "POSTGRES_USER"},
    "redis": {"REDISCLI_AUTH"},
}
SECRETS = {"POSTGRES_PASSWORD", "REDISCLI_AUTH", "FLOWER_BASIC_AUTH"}
URLS = {"DATABASE_URL", "REDIS_URL"}
REDIS = {
    "requirepass": "$$REDISCLI_AUTH",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "maxmemory-policy": "noeviction",
}
FLOWER = {"--read-only": ("", "True"), "--purge-offline-workers": ("10",), "--max-tasks": ("10000",)}
API = ("--no-access-log", "--no-server-header", "--timeout-graceful-shutdown")
"""Uvicorn's log has queries; and it would wait for as long as somebody follows a run."""
POSTGRES_VOLUME = "/var/lib/postgresql"
NON_ROOT = re.compile(r"[1-9][0-9]*:[1-9][0-9]*")
LOOPBACK = "127.0.0.1:"


def problems(compose: dict[str, Any], dockerfile: str) -> list[str]:
    """Compare the parsed docker-compose.yml and the Dockerfile's text with the code; a line for each difference."""
    services: Services = compose["services"]
    once = _run_once(services)
    found = [*_references(compose), *_settings(services), *_worker(services), *_reach(compose)]
    found += [f"deploy/Dockerfile: {problem}" for problem in (*_copies(dockerfile), *_image(dockerfile, services))]
    for name, service in services.items():
        found += [f"{name}: {problem}" for problem in _hardening(service)]
        found += [f"{name}: {problem}" for problem in _life(service, once=name in once)]
        found += [f"{name}: {problem}" for problem in _variables(name, service)]
        if "build" in service:
            found += [f"{name}: {problem}" for problem in _command(service)]
    for name, check in (("redis", _redis), ("flower", _flower), ("postgres", _postgres), ("api", _api)):
        if name in services:
            found += [f"{name}: {problem}" for problem in check(services[name])]
        else:
            found.append(f"{name}: there is no such service")
    return found


def interpolated(value: object) -> set[str]:
    """The variables that a text takes from .env."""
    return set(re.findall(r"(?<!\$)\$\{(\w+)", str(value)))


def copied(dockerfile: str) -> list[str]:
    """What a Dockerfile takes from the checkout."""
    sources = []
    for word, arguments in _instructions(dockerfile):
        parts = shlex.split(arguments)
        if word == "COPY" and not any(part.startswith("--from=") for part in parts):
            sources += [part.rstrip("/") for part in parts[:-1] if not part.startswith("--")]
        sources += re.findall(r"--mount=type=bind,source=([^,\s]+)", arguments)
    return sources


def _depends_on(service: Service) -> dict[str, str]:
    given = service.get("depends_on", {})
    if isinstance(given, list):
        return dict.fromkeys(given, "service_started")
    return {name: how.get("condition", "service_started") for name, how in given.items()}


def _run_once(services: Services) -> set[str]:
    waits = [_depends_on(service) for service in services.values()]
    return {name for wait in waits for name, how in wait.items() if how == "service_completed_successfully"}


def _mounts(service: Service) -> dict[str, str]:
    """Where named volumes are mounted: target to name."""
    short = [volume.split(":") for volume in service.get("volumes", ())]
    return {parts[1]: parts[0] for parts in short if not parts[0].startswith((".", "/", "~"))}


def _references(compose: dict[str, Any]) -> Iterator[str]:
    services: Services = compose["services"]
    for name, service in services.items():
        for other, condition in _depends_on(service).items():
            if other not in services:
                yield f"{name}: depends on {other}, which is not a service"
            elif condition == "service_healthy" and "healthcheck" not in services[other]:
                yield f"{name}: waits for {other} to be healthy, which has no health check"
    for kind in ("volumes", "networks", "secrets", "configs"):
        defined = set(compose.get(kind, ()))
        used: set[str] = set()
        for name, service in services.items():
            wanted = set(_mounts(service).values()) if kind == "volumes" else set(service.get(kind, ()))
            used |= wanted
            for missing in sorted(wanted - defined):
                yield f"{name}: {missing} is not among the {kind}"
        for unused in sorted(defined - used):
            yield f"{kind}: no service uses {unused}"


def _settings(services: Services) -> Iterator[str]:
    ours = [service["environment"] for service in services.values() if "build" in service]
    for missing in sorted(SETTINGS - NOT_OFFERED - {name for variables in ours for name in variables}):
        yield f"settings: no service is given {missing}"
    worker, beat = services.get("worker"), services.get("beat")
    if worker and beat and worker["environment"] != beat["environment"]:
        yield "beat: its variables differ from the worker's"


def _variables(name: str, service: Service) -> Iterator[str]:
    for variable, value in service.get("environment", {}).items():
        if not _is_known(name, variable, ours="build" in service):
            yield f"nobody reads the variable {variable}"
        if variable in SETTINGS - URLS and not interpolated(value) <= {variable}:
            yield f"{variable} is taken from {', '.join(sorted(interpolated(value)))}"
        required = r"\$\{\w+:\?[^}]+\}"
        if variable in SECRETS and not re.fullmatch(required, value):
            yield f"{variable} must come from .env, and its absence must stop the start"
        if variable in URLS and not re.search(f":{required}@", value):
            yield f"the password in {variable} must come from .env, and its absence must stop the start"
        if variable == "CREDITS_STATE_DIR" and value not in [mount.split(":")[0] for mount in service["tmpfs"]]:
            yield f"the state folder {value} cannot be written to"


def _is_known(name: str, variable: str, *, ours: bool) -> bool:
    if not ours:
        return variable in OTHERS_VARIABLES.get(name, ())
    option = variable.removeprefix("FLOWER_")
    return variable in SETTINGS or (name == "flower" and option != variable and option.lower() in default_options)


def _hardening(service: Service) -> Iterator[str]:
    if not NON_ROOT.fullmatch(str(service.get("user", ""))):
        yield "must run as a user and group of fixed numbers other than root's"
    if service.get("read_only") is not True:
        yield "must have a read-only file system"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
        yield "must drop all capabilities and add none"
    if "no-new-privileges:true" not in service.get("security_opt", ()):
        yield "must not gain privileges"
    if service.get("init") is not True:
        yield "must have an init process"
    if not service.get("logging", {}).get("options", {}).get("max-size"):
        yield "must rotate its log"
    for port in service.get("ports", ()):
        if not str(port).startswith(LOOPBACK):
            yield f"publishes {port} beyond loopback"
    if "build" not in service and not re.search(r":(?!latest)[\w.-]+$", service["image"]):
        yield f"the image {service['image']} has no version"


def _life(service: Service, *, once: bool) -> Iterator[str]:
    if once:
        if service.get("restart") != "no":
            yield "runs once, so it must not be restarted"
        return
    if service.get("restart") not in {"unless-stopped", "always"}:
        yield "must be restarted when it ends"
    check = service.get("healthcheck", {})
    if check.get("disable") or not check.get("test") or check["test"] == ["NONE"]:
        yield "has no health check"
    if "stop_grace_period" not in service:
        yield "does not say how long it may take to stop"


def _words(service: Service) -> list[str]:
    command = service.get("command", [])
    return [str(word) for word in command] if isinstance(command, list) else []


def _command(service: Service) -> Iterator[str]:
    """Walk a command line through the Click commands that will read it."""
    words = _words(service)
    command: click.Command | None = (
        {"credits": main, "celery": celery, "uvicorn": uvicorn}.get(words[0]) if words else None
    )
    if command is None:
        yield "its command must be a list that starts with credits, celery or uvicorn"
        return
    called, words = words[0], words[1:]
    while words:
        word, _, value = words.pop(0).partition("=")
        if word.startswith("-"):
            option = next((option for option in command.params if word in _spellings(option)), None)
            if option is None:
                yield f"{called} has no option {word}"
            elif isinstance(option, click.Option) and not option.is_flag and not value:
                words = words[1:]
        elif isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            if found is None:
                yield f"{called} has no command {word}"
                return
            called, command = word, found
            if word == "flower":  # Tornado reads what follows
                unknown = [option for option in _options(words) if _tornado_name(option) not in default_options]
                yield from (f"flower has no option {option}" for option in unknown)
                return


def _spellings(option: click.Parameter) -> list[str]:
    """`--access-log`, and `--no-access-log`."""
    return [*option.opts, *option.secondary_opts]


def _tornado_name(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _options(words: list[str]) -> dict[str, str]:
    """Options of the form --name=value, or --name."""
    split = (word.partition("=") for word in words if word.startswith("--"))
    return {name: value for name, _, value in split}


def _worker(services: Services) -> Iterator[str]:
    workers = {name: service for name, service in services.items() if "worker" in _words(service)}
    drained: set[str] = set()
    for name, service in workers.items():
        options = _options(_words(service))
        queues = set(options.get("--queues", "").split(","))
        drained |= queues
        for unknown in sorted(queues - set(celeryconfig.QueueNames.ALL)):
            yield f"{name}: the queue {unknown!r} is not in celeryconfig.QueueNames"
        if "%h" not in options.get("--hostname", "%h"):
            yield f"{name}: replicas must differ in their --hostname"
        if _seconds(service.get("stop_grace_period", "0s")) <= STATEMENT_TIMEOUT_SECONDS:
            yield f"{name}: is killed before a statement's time limit ({STATEMENT_TIMEOUT_SECONDS} s) is over"
    for missing in sorted(set(celeryconfig.QueueNames.ALL) - drained):
        yield f"worker: no worker drains the queue {missing!r}"
    for kind in ("worker", "beat"):
        check = " ".join(services.get(kind, {}).get("healthcheck", {}).get("test", ()))
        age = re.search(r"-mmin -(\d+)", check)
        if not check:
            continue  # said elsewhere
        if f"$$CREDITS_STATE_DIR/{heartbeat_path(kind).name}" not in check:
            yield f"{kind}: its health check does not look at {heartbeat_path(kind).name}"
        if not age or int(age[1]) * 60 < 3 * celeryconfig.beat_max_loop_interval:
            yield f"{kind}: its health check is more impatient than three heartbeats"


def _reach(compose: dict[str, Any]) -> Iterator[str]:
    """Whoever sends webhooks reaches the internet; whoever grants does not."""
    inside = {name for name, network in compose["networks"].items() if (network or {}).get("internal")}
    for name, service in compose["services"].items():
        queues = set(_options(_words(service)).get("--queues", "").split(",")) & set(celeryconfig.QueueNames.ALL)
        reaches = bool(set(service.get("networks", ())) - inside)
        if celeryconfig.QueueNames.WEBHOOKS in queues and not reaches:
            yield f"{name}: sends webhooks, and is on no network that leads outside"
        if queues & set(celeryconfig.QueueNames.REFRESH) and reaches:
            yield f"{name}: grants credits, and is on a network that leads outside"


def _seconds(duration: str) -> int:
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    return 60 * int(match[1] or 0) + int(match[2] or 0) if match else 0


def _redis(service: Service) -> Iterator[str]:
    lines = [line.split(maxsplit=1) for line in "\n".join(_words(service)).splitlines()]
    given = {line[0]: line[1] for line in lines if len(line) == 2}
    for name, value in REDIS.items():
        if given.get(name) != value:
            yield f"{name} must be {value}, and is {given.get(name)}"
    if "/data" not in _mounts(service):
        yield "its data are in no volume"


def _postgres(service: Service) -> Iterator[str]:
    if POSTGRES_VOLUME not in _mounts(service):
        yield f"since version 18 the volume belongs at {POSTGRES_VOLUME}"


def _flower(service: Service) -> Iterator[str]:
    options = _options(_words(service))
    for option, allowed in FLOWER.items():
        if options.get(option) not in allowed:
            yield f"must be started with {option}{'=' if allowed[0] else ''}{allowed[0]}"
    if "FLOWER_BASIC_AUTH" not in service["environment"]:
        yield "must ask for a password (FLOWER_BASIC_AUTH)"
    if options.get("--persistent") is not None:
        yield "--persistent pickles what it keeps"
    yield from _published(service, options.get("--port"))


def _published(service: Service, port: str | None) -> Iterator[str]:
    if [str(published).removeprefix(LOOPBACK).split(":")[-1] for published in service.get("ports", ())] != [port]:
        yield f"the published port is not its --port={port}"


def _api(service: Service) -> Iterator[str]:
    words, options = _words(service), _options(_words(service))
    if words[1:2] != ["api:app"]:
        yield "it does not serve api:app"
    for option in API:
        if option not in options:
            yield f"must be started with {option}"
    grace = _seconds(service.get("stop_grace_period", "0s"))
    if int(options.get("--timeout-graceful-shutdown") or 0) >= grace:
        yield "is killed before it has cut the connections that last"
    if options.get("--host") != "0.0.0.0":  # noqa: S104 - within the networks of the file
        yield "nobody else reaches it at its --host"
    yield from _published(service, options.get("--port"))
    check = " ".join(service.get("healthcheck", {}).get("test", ()))
    if check and f"127.0.0.1:{options.get('--port')}/healthz" not in check:
        yield "its health check does not ask /healthz at its port"


def _instructions(dockerfile: str) -> list[tuple[str, str]]:
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word.upper(), arguments.strip()) for word, _, arguments in (x.partition(" ") for x in joined.splitlines())]


def _copies(dockerfile: str) -> Iterator[str]:
    sources = copied(dockerfile)
    packaged = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = [f"{module}.py" for module in packaged["py-modules"]]
    folders = [package for package in packaged["packages"] if "." not in package]  # with all that is in them
    for needed in ("pyproject.toml", "alembic.ini", "migrations", *modules, *folders):
        if needed not in sources:
            yield f"does not copy {needed}"
    for source in sources:
        if not (CHECKOUT / source).exists():
            yield f"copies {source}, which is not there"


def _image(dockerfile: str, services: Services) -> Iterator[str]:
    user = dict(_instructions(dockerfile)).get("USER")  # the last one counts
    for name, service in services.items():
        if "build" in service and service.get("user") != user:
            yield f"its user {user} is not that of {name}"
    for word, arguments in _instructions(dockerfile):
        if word == "FROM" and not re.match(r"\S+:(?!latest\b)\S+", arguments):
            yield f"the base image {arguments} has no version"
        if word in {"CMD", "ENTRYPOINT"} and not arguments.startswith("["):
            yield f"{word} goes through a shell, which swallows signals"
        if word == "RUN" and "--requirement" in arguments and "--require-hashes" not in arguments:
            yield "installs without --require-hashes"
