"""The OpenAPI document: FastAPI's, with the problems' schema and an example for each body and each answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api.examples import EXAMPLES
from api.keys import REQUIRED
from api.problems import ProblemAnswer

JSON = "application/json"
_SCHEMAS = "#/components/schemas/"


class Documented(FastAPI):
    """An application whose document is complete."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            problem = ProblemAnswer.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}")
            document["components"]["schemas"] |= {**problem.pop("$defs"), "Problem": problem}
            for default in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(default, None)
            for operations in document["paths"].values():
                for operation in operations.values():
                    _illustrate(operation)
        return self.openapi_schema or {}


def _illustrate(operation: dict[str, Any]) -> None:
    if "HTTPValidationError" in str(operation["responses"].get("422")):
        del operation["responses"]["422"]  # FastAPI's own: what is invalid is a problem, where it is documented
    for parameter in operation.get("parameters", ()):
        if parameter["name"] == "Idempotency-Key":
            parameter["required"] = parameter["description"] == REQUIRED
    contents = [answer.get("content", {}) for answer in operation["responses"].values()]
    contents.append(operation.get("requestBody", {}).get("content", {}))
    for content in contents:
        media = content.get(JSON, {})
        name = _name(media.get("schema", {}))
        if name in EXAMPLES:
            media["example"] = EXAMPLES[name]


def _name(schema: dict[str, Any]) -> str | None:
    """The model's; of a body that may be absent, that of the body."""
    for choice in (schema, *schema.get("anyOf", ())):
        if "$ref" in choice:
            return str(choice["$ref"]).removeprefix(_SCHEMAS)
    return None
