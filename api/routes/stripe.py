"""Stripe's webhook. The signature is the credential: whoever has none that is valid here is told nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request, Security
from fastapi.security import APIKeyHeader
from pydantic import Field
from stripe import SignatureVerificationError, WebhookSignature

import logs
from api.context import Config, Db
from api.examples import STRIPE_EVENT
from api.problems import InvalidRequestError, Problem, documented
from api.schema import Answer, Instant
from refresh import stripe_events, stripe_inbox, stripe_objects
from refresh.errors import RefusedError
from refresh.stripe_inbox import OUTCOMES

if TYPE_CHECKING:
    from settings import Settings

TOLERANCE_SECONDS = 300
"""How old a signature may be. Stripe signs anew whenever it delivers again."""
RETRY_SECONDS = 60

log: structlog.stdlib.BoundLogger = structlog.get_logger("credits.stripe")
router = APIRouter(prefix="/api/webhooks", tags=["webhooks"])

_signature = APIKeyHeader(
    name="Stripe-Signature",
    scheme_name="stripeSignature",
    auto_error=False,
    description="Stripe's signature of the body, made with the endpoint's signing secret (`STRIPE_WEBHOOK_SECRET`).",
)


class StripeReceipt(Answer):
    """What became of an event."""

    event_id: str
    type: str
    outcome: str | None = Field(description="; ".join(f"`{name}`: {meaning}" for name, meaning in OUTCOMES.items()))
    user_id: str | None = Field(description="Your app's own id of the user.")
    run_id: str | None = Field(description="The run that granted the billing period.")
    period_start: Instant | None
    period_end: Instant | None
    text: str


async def _body(request: Request) -> bytes:
    """The body as it was signed. None of Stripe's comes near the application's limit."""
    return await request.body()


def _verified(
    config: Config, body: Annotated[bytes, Depends(_body)], signature: Annotated[str | None, Security(_signature)]
) -> dict[str, Any]:
    """What Stripe has signed.

    Raises:
        Problem: nobody has, or with another secret, or too long ago; or no secret is set here.
        InvalidRequestError: it was signed, and is no event.
    """
    if not any(_is_signed(body, signature, secret) for secret in config.stripe_secrets):
        raise Problem("unauthenticated", "send a Stripe-Signature that is valid here, and not older than five minutes")
    try:
        raw = json.loads(body)
        stripe_objects.read_event(raw)
    except (ValueError, RecursionError) as error:  # RefusedError among them
        text = str(error) if isinstance(error, RefusedError) else "is no JSON"
        raise InvalidRequestError("body", text) from error
    assert isinstance(raw, dict)  # noqa: S101 - read_event() has seen to it
    return raw


def _is_signed(body: bytes, signature: str | None, secret: str) -> bool:
    try:
        return bool(WebhookSignature.verify_header(body, signature, secret, TOLERANCE_SECONDS))
    except (SignatureVerificationError, UnicodeError, TypeError):  # a body or a header that is no text
        return False


def terms_of(config: Settings) -> stripe_events.Terms:
    """What the environment says of Stripe's events."""
    return stripe_events.Terms(config.stripe_plan_after_cancel, enabled=config.credit_refresh_enabled)


@router.post(
    "/stripe",
    response_model=StripeReceipt,
    summary="Stripe's webhook: billing periods become windows, subscriptions plans",
    responses=documented("unauthenticated", "too-large", "invalid-request", "unavailable"),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "A snapshot event of Stripe's, byte for byte as it was signed.",
            "content": {"application/json": {"schema": {"type": "object"}, "example": STRIPE_EVENT}},
        }
    },
)
def receive_stripe_event(event: Annotated[dict[str, Any], Depends(_verified)], config: Config, database: Db) -> Any:
    """Store an event, then let it take effect. Delivered twice, or at the same time, it does so once.

    `invoice.paid` grants the billing period to a user of an external plan; `customer.subscription.*` sets the user's
    plan, and for yearly subscriptions the day of the month. Other types may say which user a customer is. 200 says
    that the event is kept, whatever its outcome; 503 that it could not be processed yet, which upkeep will try, and
    Stripe may.
    """
    with database.statements() as connection:
        event_id = stripe_inbox.store(connection, event)
        try:
            done = stripe_events.process(connection, event_id, terms_of(config))
        except RefusedError as error:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise Problem("unavailable", f"event {event_id} is kept for later: {error}", headers=headers) from error
    log.info(
        f"{logs.PREFIX} Stripe event", event_id=done.id, type=done.type, outcome=done.outcome, user=done.user,
        run_id=str(done.run_id) if done.run_id else None,
    )  # fmt: skip
    return {**done.facts(), "type": done.type, "text": done.text}
