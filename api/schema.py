"""What bodies and answers have in common: camelCase, and credits that are exact.

RFC 8259 (6) warns that JSON numbers beyond 2^53 - 1 are not the same to every reader; JavaScript rounds them. So
credits beyond it are decimal strings, in both directions.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel

SAFE_INTEGER = 2**53 - 1
BIGINT_MAX = 2**63 - 1


def exact(number: int) -> int | str:
    """A number as every reader of JSON takes it."""
    return number if -SAFE_INTEGER <= number <= SAFE_INTEGER else str(number)


def to_wire(value: Any) -> Any:
    """The same for all numbers in a value made of dicts and lists."""
    if isinstance(value, dict):
        return {key: to_wire(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_wire(item) for item in value]
    return exact(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _integer(value: object) -> int:
    """A JSON integer, or one in decimal digits; no 1.0, no true, no '1_000', all of which Python would take."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and value.isascii() and len(value) <= 20:  # noqa: PLR2004 - the digits of 64 bits and a sign
        return int(value)
    raise ValueError("must be a whole number, or its decimal digits as a string")


_JSON_CREDITS = {
    "anyOf": [
        {"type": "integer", "minimum": -SAFE_INTEGER, "maximum": SAFE_INTEGER},
        {"type": "string", "pattern": "^-?[0-9]{1,30}$"},
    ],
    "description": "A whole number; beyond 2^53 - 1 in size, its decimal digits as a string.",
}

Credits = Annotated[int, BeforeValidator(_integer), PlainSerializer(exact), WithJsonSchema(_JSON_CREDITS)]
"""Credits, exact at any size; sums may exceed 64 bits."""

Amount = Annotated[
    int,
    BeforeValidator(_integer),
    Field(ge=1, le=BIGINT_MAX),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": SAFE_INTEGER},
                {"type": "string", "pattern": "^[1-9][0-9]{0,17}$"},
            ]
        }
    ),
]
"""Credits that somebody asks for."""

Instant = AwareDatetime
"""ISO 8601 with an offset: an instant without one is nobody's."""


class Body(BaseModel):
    """What a client sends: camelCase, or snake_case as well; nothing that is not known."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="forbid", frozen=True
    )


class Answer(BaseModel):
    """What a client gets: camelCase."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)
