"""What is sent: signed JSON for programs, and for a chat one plain sentence, in which nothing calls or formats.

`standard` is Standard Webhooks: the headers webhook-id, webhook-timestamp and webhook-signature, which is the
HMAC-SHA256 of both and the body. The bytes that are signed are the bytes that are sent.
"""

from __future__ import annotations

import json
import re
from datetime import UTC
from typing import TYPE_CHECKING, Any

from standardwebhooks import Webhook

if TYPE_CHECKING:
    from collections.abc import Callable

    from refresh.webhook_outbox import Message

SAFE_INTEGER = 2**53 - 1
"""Beyond it JSON numbers are not the same to every reader (RFC 8259, 6): decimal strings, as in the API."""
SENTENCE_MAX = 900
"""Characters of a sentence: escaped, each may become two, and Discord takes 2,000."""
ID_SHOWN = 8
_USER_AGENT = "credit-refresh-webhooks/1"


def exact(value: Any) -> Any:
    """The same value, with numbers that every reader of JSON reads alike."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > SAFE_INTEGER:
        return str(value)
    return value


def compose(message: Message) -> tuple[dict[str, str], bytes]:
    """The headers and the body of a message."""
    headers = {"Content-Type": "application/json", "User-Agent": _USER_AGENT}
    if message.secret is None:
        return headers, _CHATS[message.format](sentence(message.type, message.payload))
    text = _json(
        {
            "type": message.type,
            "timestamp": message.created_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "data": exact(message.payload),
        }
    )
    at, message_id = message.claimed_at.astimezone(UTC), str(message.message_id)
    headers |= {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(message.secret).sign(message_id, at, text),
    }
    return headers, text.encode()


def sentence(type_: str, data: dict[str, Any]) -> str:
    """A message as one line of plain text, of at most `SENTENCE_MAX` characters."""
    said = _SENTENCES[type_](data) if type_ in _SENTENCES else type_
    line = " ".join("".join(c if c.isprintable() else " " for c in said).split())
    return line if len(line) <= SENTENCE_MAX else f"{line[: SENTENCE_MAX - 1]}…"


_DID = {"rollback": "taken back", "regrid": "moved to their plan's grid"}


def _of_run(data: dict[str, Any]) -> str:
    what = f"{'Dry run' if data['dryRun'] else 'Run'} {str(data['runId'])[:ID_SHOWN]}"
    kind = f"{data['kind']} by {data['requestedBy']}"
    counts = ", ".join(
        f"{data[name]:,} {word}"
        for name, word in (("usersHeld", "held"), ("usersSkipped", "skipped"), ("usersFailed", "failed"))
        if data[name]
    )
    did = "planned" if data["dryRun"] else _DID.get(data["work"], "refreshed")
    said = (
        f"{what} ({kind}) ended {data['status']}: {data['usersRefreshed']:,} of {data['usersSelected']:,} users {did}"
    )
    said += f", {counts}" if counts else ""
    said += f"; {data['creditsGranted']:,} credits. " if data["work"] != "regrid" else ". "
    return said + (f"First error: {data['error']}. " if data["error"] else "")


def _of_failed_run(data: dict[str, Any]) -> str:
    return f"{_of_run(data)}See `credits runs show {str(data['runId'])[:ID_SHOWN]}`."


def _of_held(data: dict[str, Any]) -> str:
    until = f" until {data['holdUntil']}" if data["holdUntil"] else ""
    reason = f": {data['holdReason']}" if data["holdReason"] else ""
    return (
        f"User {data['userId']} is held{until} and was not refreshed for the window from {data['windowStart']}{reason}."
    )


def _of_finding(data: dict[str, Any]) -> str:
    first = data["examples"][0]
    about = f"user {first['userId']}" if first["userId"] is not None else f"run {first['runId']}"
    times = "once" if data["count"] == 1 else f"{data['count']:,} times"
    return (
        f"The nightly check has found {data['finding']} {times}; first, of {about}: {first['text']}; "
        f"{first['wayOut']}. See `credits verify`."
    )


def _of_silence(data: dict[str, Any]) -> str:
    last = f"the last one was at {data['lastGrantAt']}" if data["lastGrantAt"] else "nobody ever was"
    paused = " The service is paused." if data["paused"] else ""
    days = "day" if data["days"] == 1 else f"{data['days']} days"
    return f"No user has been refreshed for the last {days}; {last}.{paused} See `credits doctor`."


def _of_ping(_: dict[str, Any]) -> str:
    return "A test of the notices of credit refresh: they arrive."


_SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "run.finished": _of_run,
    "notice.run_failed": _of_failed_run,
    "user.held": _of_held,
    "verify.finding": _of_finding,
    "notice.no_grants": _of_silence,
    "ping": _of_ping,
}


_BROKEN_AT = "@\u200b"  # a zero-width space: it looks the same, and names nobody


def _slack(said: str) -> bytes:
    """Slack's own three characters, without which nothing is a mention or a link; no formatting, no previews.

    Mattermost, which takes the same JSON, takes any @ for a mention.
    """
    escaped = said.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", _BROKEN_AT)
    return _json({"text": escaped, "mrkdwn": False, "unfurl_links": False, "unfurl_media": False}).encode()


_DISCORD_MARKS = re.compile(r"([\\*_~`|>#\[\]()<\-])")
_SUPPRESS_EMBEDS = 4


def _discord(said: str) -> bytes:
    """Mentions allowed for nobody, and broken up besides; every mark of its Markdown with a backslash; no previews."""
    escaped = _DISCORD_MARKS.sub(r"\\\1", said).replace("@", _BROKEN_AT)
    return _json({"content": escaped, "allowed_mentions": {"parse": []}, "flags": _SUPPRESS_EMBEDS}).encode()


_CHATS: dict[str, Callable[[str], bytes]] = {"slack": _slack, "discord": _discord}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
