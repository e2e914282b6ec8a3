"""What bodies and answers have in common: camelCase, and credits that are exact.

RFC 8259 (6) warns that JSON numbers beyond 2^53 - 1 are not the same to every reader; JavaScript rounds them. So
credits beyond it are decimal strings, in both directions.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    StrictInt,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel

if TYPE_CHECKING:
    from collections.abc import Mapping

SAFE_INTEGER = 2**53 - 1
BIGINT_MAX = 2**63 - 1

FIRST = datetime(1970, 1, 1, tzinfo=UTC)
END = datetime(3000, 1, 1, tzinfo=UTC)
"""Instants that somebody asks for lie between: there is nothing before, and Python knows no year after 9999."""


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


def _asked(sign: str, **limits: int) -> WithJsonSchema:
    """Without an upper limit: OpenAPI's are floating-point numbers, and 2^63 - 1 is none."""
    return WithJsonSchema(
        {
            "anyOf": [{"type": "integer", **limits}, {"type": "string", "pattern": f"^{sign}[0-9]{{0,18}}$"}],
            "description": "A whole number of 64 bits, or its decimal digits as a string.",
        }
    )


Amount = Annotated[int, BeforeValidator(_integer), Field(ge=1, le=BIGINT_MAX), _asked("[1-9]", minimum=1)]
"""Credits that somebody asks for."""

Balance = Annotated[int, BeforeValidator(_integer), Field(ge=-BIGINT_MAX - 1, le=BIGINT_MAX), _asked("-?[0-9]")]
"""Credits that somebody compares with."""

Json = Annotated[Any, PlainSerializer(to_wire)]
"""Whatever was stored as JSON."""

Instant = AwareDatetime
"""In an answer: ISO 8601 with an offset."""


def _written(value: object) -> object:
    """No number: what is a date to whoever sends one may be another to us."""
    if not isinstance(value, str) or not re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]", value):
        raise ValueError("must be an instant such as 2026-12-01T00:00:00Z")
    return value


def _within(value: datetime) -> datetime:
    if not FIRST <= value < END:
        raise ValueError(f"must lie in the years {FIRST.year} to {END.year - 1}")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_written), AfterValidator(_within)]
"""In a request: ISO 8601 with an offset, for an instant without one is nobody's."""


def _storable(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not have the character of code 0")
    return value


Text = Annotated[str, AfterValidator(_storable)]
"""In a request: what PostgreSQL can store."""

Flag = StrictBool
"""In a body: true or false, and no word for it. `"dryRun": "off"` would be a live run."""
Number = StrictInt
"""In a body: a whole number, and no text of one."""


class Body(BaseModel):
    """What a client sends: camelCase, or snake_case as well; nothing that is not known."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="forbid", frozen=True
    )


class Answer(BaseModel):
    """What a client gets: camelCase."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)

    @classmethod
    def wire(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The facts as a route with this answer writes them, for what is sent in another way."""
        return cls.model_validate(facts).model_dump(mode="json", by_alias=True)
