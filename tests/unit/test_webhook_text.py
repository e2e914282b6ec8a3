"""What is sent: the signed JSON, and a chat's one line."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from api.routes.webhooks import Event
from refresh.webhook_events import EVENTS
from refresh.webhook_outbox import Message
from refresh.webhook_text import SENTENCE_MAX, compose, sentence

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 - made up
ID = UUID(int=7)
RUN: dict[str, Any] = {
    "runId": "1f2e3d4c-0000-0000-0000-000000000000", "kind": "refresh", "work": "refresh", "source": "beat",
    "status": "partial", "dryRun": False, "slot": None, "parentRunId": None, "requestedBy": "beat", "reason": None,
    "usersSelected": 1_000, "usersRefreshed": 995, "usersHeld": 0, "usersSkipped": 3, "usersFailed": 2,
    "creditsGranted": 123_456, "startedAt": None, "finishedAt": None, "error": "a check said no", "correlationId": None,
}  # fmt: skip
HELD: dict[str, Any] = {
    "userId": "user-7", "runId": None, "source": "run", "planCode": "free", "windowStart": "2026-11-01T00:00:00Z",
    "windowEnd": None, "creditBalance": 5, "holdReason": "fraud check", "holdUntil": None,
}  # fmt: skip
FINDING: dict[str, Any] = {
    "finding": "double_grant", "count": 1_200, "examples": [
        {"finding": "double_grant", "userId": "user-7", "runId": None, "text": "granted twice", "wayOut": "look"}
    ],
}  # fmt: skip


def message(type_: str, payload: dict[str, Any], *, chat: str | None = None, at: datetime | None = None) -> Message:
    now = at or datetime.now(UTC)
    return Message(
        id=1, message_id=ID, endpoint_id=UUID(int=1), type=type_, payload=payload,
        created_at=datetime(2026, 11, 21, 12, tzinfo=timezone(timedelta(hours=1))), attempts=1, due_at=now,
        claimed_at=now, url="https://example.com/", secret=None if chat else SECRET, format=chat or "standard",
    )  # fmt: skip


def test_it_is_signed_as_the_library_verifies_it() -> None:
    headers, body = compose(message("run.finished", RUN))
    told = Webhook(SECRET).verify(body, headers)
    assert told == {"type": "run.finished", "timestamp": "2026-11-21T11:00:00.000000Z", "data": RUN}
    assert headers["webhook-id"] == str(ID)
    assert headers["Content-Type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace(b"995", b"996"), headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body, {**headers, "webhook-id": str(UUID(int=8))})
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 44).verify(body, headers)


def test_a_signature_is_of_the_attempts_instant_whatever_zone_it_is_told_in() -> None:
    at = datetime.now(timezone(timedelta(hours=-7)))
    headers, body = compose(message("ping", {}, at=at))
    assert headers["webhook-timestamp"] == str(int(at.timestamp()))
    Webhook(SECRET).verify(body, headers)
    old, body = compose(message("ping", {}, at=at - timedelta(minutes=6)))
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(SECRET).verify(body, old)


def test_what_is_sent_holds_no_number_that_javascript_rounds() -> None:
    big = {"a": 2**53 - 1, "b": 2**53, "c": [-(2**63), {"d": 2**63 - 1}], "e": True, "f": 0.5, "g": None}
    _, body = compose(message("user.refreshed", big))
    assert json.loads(body)["data"] == {
        "a": 2**53 - 1, "b": "9007199254740992", "c": ["-9223372036854775808", {"d": "9223372036854775807"}],
        "e": True, "f": 0.5, "g": None,
    }  # fmt: skip


def test_a_message_shows_nothing_of_its_secrets() -> None:
    assert SECRET not in repr(message("ping", {}))


SENTENCES = {
    "run.finished": (
        RUN,
        (
            "Run 1f2e3d4c (refresh by beat) ended partial: 995 of 1,000 users refreshed, 3 skipped, 2 failed; 123,456 "
            "credits. First error: a check said no."
        ),
    ),
    "notice.run_failed": (
        RUN | {"status": "failed", "usersRefreshed": 0, "usersSkipped": 0, "creditsGranted": 0},
        (
            "Run 1f2e3d4c (refresh by beat) ended failed: 0 of 1,000 users refreshed, 2 failed; 0 credits. First "
            "error: a check said no. See `credits runs show 1f2e3d4c`."
        ),
    ),
    "user.held": (
        HELD,
        "User user-7 is held and was not refreshed for the window from 2026-11-01T00:00:00Z: fraud check.",
    ),
    "verify.finding": (
        FINDING,
        (
            "The nightly check has found double_grant 1,200 times; first, of user user-7: granted twice; look. See "
            "`credits verify`."
        ),
    ),
    "notice.no_grants": (
        {"days": 3, "lastGrantAt": "2026-11-01T00:00:00Z", "paused": True},
        (
            "No user has been refreshed for the last 3 days; the last one was at 2026-11-01T00:00:00Z. The service is "
            "paused. See `credits doctor`."
        ),
    ),
    "ping": ({}, "A test of the notices of credit refresh: they arrive."),
}


@pytest.mark.parametrize("type_", SENTENCES)
def test_a_chat_gets_a_sentence(type_: str) -> None:
    payload, expected = SENTENCES[type_]
    assert sentence(type_, payload) == expected
    headers, body = compose(message(type_, payload, chat="slack"))
    assert json.loads(body)["text"] == expected
    assert not any(name.startswith("webhook-") for name in headers)


def test_a_rollback_and_a_dry_run_are_called_what_they_are() -> None:
    said = sentence(
        "run.finished", RUN | {"kind": "rollback", "work": "rollback", "status": "succeeded", "error": None}
    )
    assert "(rollback by beat) ended succeeded: 995 of 1,000 users taken back" in said
    assert sentence("run.finished", RUN | {"dryRun": True}).startswith("Dry run 1f2e3d4c")
    assert "credits" not in sentence("run.finished", RUN | {"kind": "regrid", "work": "regrid"})


NASTY = "@everyone <!channel> <@U123> *b* _i_ ~s~ `c` [x](https://evil.example) > # & | \\ - \n\r\t\x1b[31m\u202e"


@pytest.mark.parametrize("chat", ["slack", "discord"])
def test_nobody_is_called_and_nothing_is_formatted_by_what_a_users_id_says(chat: str) -> None:
    _, body = compose(message("user.held", HELD | {"userId": NASTY, "holdReason": NASTY}, chat=chat))
    sent = json.loads(body)
    said = sent["text" if chat == "slack" else "content"]
    assert "@everyone" not in said
    assert "\n" not in said
    assert said.isprintable() or "\u200b" in said
    if chat == "slack":
        assert sent["mrkdwn"] is False
        assert "<" not in said
        assert ">" not in said
        assert re.search(r"&(?!amp;|lt;|gt;)", said) is None
    else:
        assert sent["allowed_mentions"] == {"parse": []}
        assert re.search(r"(?<!\\)(?:\\\\)*[*_~`|<>\[\]()#]", said) is None


@given(st.text(max_size=3_000), st.sampled_from(["slack", "discord"]))
def test_whatever_an_id_holds_the_message_is_one_line_and_fits(user_id: str, chat: str) -> None:
    said = sentence("user.held", HELD | {"userId": user_id})
    assert len(said) <= SENTENCE_MAX
    assert said.isprintable()
    _, body = compose(message("user.held", HELD | {"userId": user_id}, chat=chat))
    sent = json.loads(body)
    text = sent["text" if chat == "slack" else "content"]
    assert len(text) <= (2_000 if chat == "discord" else 40_000)
    assert re.search(r"@(?!\u200b)", text) is None


def test_the_api_names_the_events_that_there_are() -> None:
    assert get_args(Event) == EVENTS
