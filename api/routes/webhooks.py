"""Outgoing webhooks: who is told of what, and what became of each message."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from pydantic import Field

from api.callers import Admin
from api.context import Config, Db
from api.problems import InvalidRequestError, documented
from api.schema import Answer, Body, Credits, Flag, Instant, Json, Number, Text
from refresh import webhook_deliveries as deliveries
from refresh import webhook_endpoints as endpoints
from refresh.errors import RefusedError
from refresh.webhook_events import EVENTS, tell_ping
from refresh.webhook_targets import URL_MAX, TargetError, check_target
from tasks.deliver import ring_for_webhooks

if TYPE_CHECKING:
    from collections.abc import Iterator

router = APIRouter(prefix="/api/admin", tags=["webhooks"])

PAGE = 50
PAGE_MAX = 200
BIGINT = r"^[1-9][0-9]{0,17}$"

Event = Literal["run.finished", "notice.run_failed", "user.refreshed", "user.held", "verify.finding"]
Url = Annotated[
    Text,
    Field(
        min_length=1,
        max_length=URL_MAX,
        description="https://, and a public address.",
        examples=["https://example.com/hooks"],
    ),
]
Events = Annotated[
    list[Event],
    Field(
        max_length=2 * len(EVENTS),
        description="`user.refreshed` is a message for each user.",
        examples=[["run.finished"]],
    ),
]
NoGrantsDays = Annotated[
    Number,
    Field(
        ge=1,
        le=endpoints.NO_GRANTS_DAYS_MAX,
        description="Tell when nobody was refreshed for so many days: `notice.no_grants`.",
    ),
]
Description = Annotated[Text, Field(min_length=1, max_length=endpoints.DESCRIPTION_MAX, description="For people.")]
EndpointId = Annotated[UUID, Path(alias="endpointId")]
DeliveryId = Annotated[str, Path(alias="deliveryId", pattern=BIGINT)]


class NewEndpoint(Body):
    """An endpoint to be added."""

    url: Url
    format: endpoints.Format = Field("standard", description="Signed JSON (Standard Webhooks), or a chat's.")
    events: Events | None = Field(None, description="Null: what is usual for the format; of each user never.")
    no_grants_days: NoGrantsDays | None = None
    description: Description | None = None


class EndpointChanges(Body):
    """What to change; what is not named stays as it is."""

    url: Url | None = None
    events: Events | None = None
    no_grants_days: NoGrantsDays | None = Field(None, description="Null: do not tell of silence.")
    description: Description | None = None
    active: Flag | None = Field(None, description="False: nothing is written for it or sent to it.")

    def named(self) -> dict[str, Any]:
        """What was named."""
        named = {name: getattr(self, name) for name in self.model_fields_set}
        for name in ("url", "events", "active"):
            if name in named and named[name] is None:
                raise InvalidRequestError(name, "leave it out to keep it as it is; it cannot be null")
        return named


class Endpoint(Answer):
    """An endpoint, without its secret; of a chat's address without the path, which is one."""

    id: UUID
    url: str
    format: endpoints.Format
    events: list[Event]
    no_grants_days: int | None
    description: str | None
    active: bool
    inactive_reason: str | None = Field(description="Why it was switched off by itself: it has answered 410 Gone.")
    created_by: str
    created_at: Instant
    failures: int = Field(description="Rounds in a row in which it did not take messages.")
    resume_at: Instant | None = Field(description="When it is tried again, while it fails.")


class AddedEndpoint(Endpoint):
    """A new endpoint, and its secret."""

    secret: str | None = Field(description="Verifies what is sent; shown this once. Null for a chat.")


class EndpointList(Answer):
    """All endpoints."""

    endpoints: list[Endpoint]


class Delivery(Answer):
    """A message to one endpoint."""

    id: Credits
    message_id: UUID = Field(description="The header `webhook-id`, the same in every attempt.")
    endpoint_id: UUID
    type: str
    status: deliveries.Status
    attempts: int
    next_attempt_at: Instant | None = Field(description="Or, while it is being sent, when it counts as lost.")
    last_status: int | None = Field(description="What the endpoint last answered; null: nothing.")
    last_error: str | None
    created_at: Instant
    finished_at: Instant | None


class DeliveryDetail(Delivery):
    """A message, with what it tells."""

    data: Json


class DeliveryPage(Answer):
    """Messages, the newest first."""

    deliveries: list[Delivery]
    next: str | None = Field(description="For `before`, to get the next page; null on the last one.")


@contextmanager
def _about(field: str, error: type[RefusedError]) -> Iterator[None]:
    try:
        yield
    except error as refused:
        raise InvalidRequestError(field, str(refused)) from None


@router.get("/webhooks", response_model=EndpointList, summary="The endpoints that are told")
def list_webhooks(_caller: Admin, database: Db) -> dict[str, Any]:
    """The oldest first; there are no more than twenty."""
    with database.statements() as connection:
        return {"endpoints": [endpoint.facts() for endpoint in endpoints.list_endpoints(connection)]}


@router.post(
    "/webhooks",
    status_code=201,
    response_model=AddedEndpoint,
    summary="Add an endpoint",
    responses=documented("refused", "invalid-request"),
)
def add_webhook(body: NewEndpoint, caller: Admin, config: Config, database: Db, response: Response) -> dict[str, Any]:
    """It is told of what happens from now on. The answer has the secret that its messages are signed with: keep it.

    Private and loopback addresses are refused, here and again before each message, unless WEBHOOKS_ALLOW_PRIVATE says
    otherwise.
    """
    with _about("url", TargetError):
        target = check_target(body.url, allow_private=config.webhooks_allow_private)
    asked = body.model_dump(exclude={"url", "events"})
    with _about("events", RefusedError):
        wanted = endpoints.Wanted(target=target, events=None if body.events is None else tuple(body.events), **asked)
    with database.transaction() as connection:
        added, secret = endpoints.add_endpoint(connection, wanted, actor=caller.name)
    response.headers["Location"] = f"/api/admin/webhooks/{added.id}"
    response.headers["Cache-Control"] = "no-store"
    return {**added.facts(), "secret": secret}


@router.get(
    "/webhooks/{endpointId}",
    response_model=Endpoint,
    summary="One endpoint",
    responses=documented("not-found", "invalid-request"),
)
def show_webhook(endpoint_id: EndpointId, _caller: Admin, database: Db) -> dict[str, Any]:
    """What it is told, and whether it takes it."""
    with database.statements() as connection:
        return endpoints.read_endpoint(connection, endpoint_id).facts()


@router.patch(
    "/webhooks/{endpointId}",
    response_model=Endpoint,
    summary="Change an endpoint, or switch it on or off",
    responses=documented("not-found", "refused", "invalid-request"),
)
def change_webhook(
    endpoint_id: EndpointId, body: EndpointChanges, caller: Admin, config: Config, database: Db
) -> dict[str, Any]:
    """Switched on again, it gets what has waited for it, up to three days' worth."""
    changes = body.named()
    url, target = changes.pop("url", None), None
    if url is not None:
        with _about("url", TargetError):
            target = check_target(url, allow_private=config.webhooks_allow_private)
    with database.transaction() as connection:
        changed = endpoints.change_endpoint(connection, endpoint_id, changes, actor=caller.name, target=target)
    return changed.facts()


@router.delete(
    "/webhooks/{endpointId}",
    status_code=204,
    summary="Remove an endpoint",
    responses=documented("not-found", "invalid-request"),
)
def remove_webhook(endpoint_id: EndpointId, caller: Admin, database: Db) -> None:
    """What was not sent yet is not sent any more."""
    with database.transaction() as connection:
        endpoints.remove_endpoint(connection, endpoint_id, actor=caller.name)


@router.post(
    "/webhooks/{endpointId}/test",
    status_code=202,
    response_model=DeliveryDetail,
    summary="Send a message that tests an endpoint",
    responses=documented("not-found", "refused", "invalid-request"),
)
def send_test(endpoint_id: EndpointId, _caller: Admin, database: Db, response: Response) -> Any:
    """A worker sends it; `Location` says what became of it."""
    with database.statements() as connection:
        delivery_id = tell_ping(connection, endpoint_id)
        ring_for_webhooks(connection)
        written = deliveries.read_delivery(connection, delivery_id)
    response.headers["Location"] = f"/api/admin/webhook-deliveries/{delivery_id}"
    response.headers["Retry-After"] = "1"
    return written.facts()


@router.get(
    "/webhook-deliveries",
    response_model=DeliveryPage,
    summary="What was sent and what was not, the newest first",
    responses=documented("invalid-request"),
)
def list_of_deliveries(
    _caller: Admin,
    database: Db,
    status: Annotated[deliveries.Status | None, Query(description="`dead` is the list of dead letters.")] = None,
    endpoint_id: Annotated[UUID | None, Query(alias="endpointId")] = None,
    before: Annotated[str | None, Query(pattern=BIGINT, description="Older than this one: `next`.")] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = PAGE,
) -> dict[str, Any]:
    """Delivered messages are kept for 7 days and dead ones for 30."""
    older_than = int(before) if before is not None else None
    with database.statements() as connection:
        found, more = deliveries.list_deliveries(
            connection, limit=limit, status=status, endpoint_id=endpoint_id, before=older_than
        )
    return {"deliveries": [one.facts() for one in found], "next": str(found[-1].id) if more else None}


@router.get(
    "/webhook-deliveries/{deliveryId}",
    response_model=DeliveryDetail,
    summary="One message, with what it tells",
    responses=documented("not-found", "invalid-request"),
)
def show_delivery(delivery_id: DeliveryId, _caller: Admin, database: Db) -> Any:
    """How often it was tried, and what the endpoint answered last."""
    with database.statements() as connection:
        return deliveries.read_delivery(connection, int(delivery_id)).facts()


@router.post(
    "/webhook-deliveries/{deliveryId}/retry",
    status_code=202,
    response_model=DeliveryDetail,
    summary="Send a dead message again",
    responses=documented("not-found", "refused", "invalid-request"),
)
def retry_delivery(delivery_id: DeliveryId, caller: Admin, database: Db) -> Any:
    """Its attempts begin anew; its message id stays what it was."""
    with database.transaction() as connection:
        retried = deliveries.retry_delivery(connection, int(delivery_id), actor=caller.name)
    with database.statements() as connection:
        ring_for_webhooks(connection)
    return retried.facts()
