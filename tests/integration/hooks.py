"""Endpoints and the outbox, as the tests of outgoing webhooks need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refresh import webhook_endpoints as endpoints
from refresh.webhook_post import Round, Sender, deliver_round
from refresh.webhook_targets import read_target

if TYPE_CHECKING:
    from uuid import UUID

    from tests.integration.world import World

ALL = ("run.finished", "notice.run_failed", "user.refreshed", "user.held", "verify.finding")


def endpoint(
    world: World, *events: str, url: str = "http://127.0.0.1:9/hooks", **options: Any
) -> tuple[endpoints.Endpoint, str]:
    """An endpoint that is told of these events, and its secret; "" for a chat."""
    wanted = endpoints.Wanted(target=read_target(url, allow_private=True), events=events, **options)
    with world.database.transaction() as connection:
        added, secret = endpoints.add_endpoint(connection, wanted, actor="test")
    return added, secret or ""


def outbox(world: World, type_: str | None = None) -> list[dict[str, Any]]:
    """What is in it, in the order of its users."""
    return world.rows(
        "SELECT * FROM webhook_deliveries WHERE %s::text IS NULL OR type = %s ORDER BY payload ->> 'userId', id",
        type_,
        type_,
    )


def told(world: World, type_: str) -> list[dict[str, Any]]:
    """The payloads of one type."""
    return [row["payload"] for row in outbox(world, type_)]


def write(world: World, added: endpoints.Endpoint, number: int = 1) -> None:
    """Messages, as events write them."""
    world.sql.execute(
        "INSERT INTO webhook_deliveries (endpoint_id, type, payload, created_at, next_attempt_at)"
        " SELECT %s, 'ping', jsonb_build_object('n', n), now() - interval '1 minute' + n * interval '1 millisecond',"
        " now() - interval '1 minute' + n * interval '1 millisecond' FROM generate_series(1, %s) AS n",
        (added.id, number),
    )


def deliver(world: World, sender: Sender | None = None) -> Round:
    """A round, as the worker's task makes it."""
    with world.database.statements() as connection:
        return deliver_round(connection, sender or Sender(allow_private=True))


def now_is_later(world: World, by: str = "1 day") -> None:
    """As if so much time had passed for the outbox and the endpoints."""
    world.sql.execute(
        "UPDATE webhook_deliveries SET next_attempt_at = next_attempt_at - %s::interval,"
        " finished_at = finished_at - %s::interval",
        (by, by),
    )
    world.sql.execute(
        "UPDATE webhook_endpoints SET resume_at = resume_at - %s::interval,"
        " silence_checked_at = silence_checked_at - %s::interval",
        (by, by),
    )


def see(world: World, endpoint_id: UUID) -> dict[str, Any]:
    return world.row("SELECT * FROM webhook_endpoints WHERE id = %s", endpoint_id)
