"""The OpenAPI document against a running server: what is asked by it is answered as it says, whatever is asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from api.application import create_app
from api.examples import EXAMPLES
from api.problems import KINDS
from api.schema import Answer
from settings import Settings
from tests.acceptance.http_service import ADMIN_TOKEN, CRON_SECRET, bearer, signed
from tests.integration.hooks import endpoint
from tests.integration.test_webhook_endpoints import kill

if TYPE_CHECKING:
    from schemathesis import Case

    from tests.acceptance.http_service import Deployment

EXAMPLES_EACH = 15
"""Made up for each operation, besides those of the document and those that cover its schemas one by one."""
SECONDS = 20
USER = "user-42"
NOBODYS = "00000000-0000-4000-8000-000000000000"

DOCUMENT = create_app(Settings(database_url="postgresql://nobody@127.0.0.1:1/none")).openapi()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
_CONFIG = {"generation": {"max-examples": EXAMPLES_EACH}, "phases": {"coverage": {"unexpected-methods": ["DELETE"]}}}
schema = schemathesis.openapi.from_dict(DOCUMENT, config=schemathesis.Config.from_dict(_CONFIG))


def credentials(path: str) -> dict[str, str]:
    """Of somebody whom the route is for."""
    if path.startswith("/api/user/"):
        return bearer(signed(USER))
    return bearer(CRON_SECRET if path.endswith("/reset-monthly-tokens") else ADMIN_TOKEN)


@pytest.fixture(scope="module")
def known(deployment: Deployment) -> dict[str, str]:
    """Users, a run that has ended, and a webhook. There is no worker: nothing is sent anywhere."""
    world = deployment.world
    for name in (USER, "ada", "grace/hopper"):
        world.user(name)
    run = world.refresh()
    added, _ = endpoint(world, "run.finished")
    (dead,) = kill(world, added, 1)
    ids = {"runId": str(run.run_id), "endpointId": str(added.id), "deliveryId": str(dead)}
    return {"userId": USER, "slug": "paused", **ids}


@schema.parametrize()
@settings(max_examples=EXAMPLES_EACH, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_documented(case: Case[Any], deployment: Deployment, known: dict[str, str]) -> None:
    """No 5xx; statuses, content types and bodies as documented; what is malformed is refused."""
    if case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE:
        # A made-up id is nobody's: most requests would end at that.
        for name in known.keys() & (case.path_parameters or {}).keys():
            if len(str(case.path_parameters[name])) % 2:
                case.path_parameters[name] = known[name]
    headers = credentials(case.operation.path)
    # What contradicts itself, in a way that no schema says, is refused as well.
    case.call_and_validate(
        base_url=deployment.api.url, headers=headers, excluded_checks=[positive_data_acceptance], timeout=SECONDS
    )


# --- the document itself


def test_the_server_hands_out_the_document(deployment: Deployment) -> None:
    assert deployment.client(token=None).get("/openapi.json").json() == DOCUMENT


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_explained(name: str) -> None:
    operation = OPERATIONS[name]
    assert operation["summary"]
    assert operation["description"]
    assert operation["tags"]
    for parameter in operation.get("parameters", ()):
        assert parameter["schema"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_examples(name: str) -> None:
    """Of its body and of its main answer."""
    operation = OPERATIONS[name]
    main = next(answer for status, answer in operation["responses"].items() if status[0] == "2")
    for content in [
        main.get("content", {}),
        *([operation["requestBody"]["content"]] if "requestBody" in operation else []),
    ]:
        for media in content.values():
            assert media.get("example") or media.get("examples")


def test_operations_are_named_once() -> None:
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(names)) == len(names)


def _models() -> dict[str, Any]:
    modules = ("answers", "reports", "problems", "routes.users", "routes.bulk", "routes.run_actions", "routes.reset")
    loaded = [
        importlib.import_module(f"api.{name}")
        for name in (*modules, "routes.health", "routes.webhooks", "routes.stripe")
    ]
    return {name: value for module in loaded for name, value in vars(module).items() if isinstance(value, type)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_of_their_models(name: str) -> None:
    """Complete, too: a field that an answer always has is in its example."""
    model = _models()[name]
    read = model.model_validate(EXAMPLES[name])
    if issubclass(model, Answer):
        assert read.model_dump(mode="json", by_alias=True) == EXAMPLES[name]


def test_every_example_is_shown() -> None:
    shown = str([operation.get("requestBody") for operation in OPERATIONS.values()])
    shown += str([operation["responses"] for operation in OPERATIONS.values()])
    assert [name for name, example in EXAMPLES.items() if str(example) not in shown] == []


def test_every_problem_is_documented_somewhere() -> None:
    shown = str(DOCUMENT["paths"])
    unlisted = {"internal", "method-not-allowed"}  # of any address, none in particular
    assert {slug for slug in KINDS if f"/problems/{slug}'" not in shown} == unlisted
