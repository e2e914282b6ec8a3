"""The settings that say who may call the HTTP API: checked at the start, secrets never repeated."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import settings

SIXTEEN = "t0ken-of-sixteen"
THIRTY_TWO = "s3cret-of-thirty-two-characters!"
PLANTED = "s3cr3t"


@pytest.fixture(autouse=True)
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def load(monkeypatch: pytest.MonkeyPatch, **variables: str) -> settings.Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return settings.load()


def refused(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    with pytest.raises(settings.SettingsError) as caught:
        load(monkeypatch, **variables)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_absent_nobody_may_and_each_caller_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(monkeypatch)
    assert (loaded.admin_token, loaded.cron_secret, loaded.jwt_secret, loaded.jwks_url) == (None, None, None, None)
    assert (loaded.jwt_audience, loaded.jwt_issuer, loaded.api_rate_limit) == ("credits", None, "600/minute")


def test_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(
        monkeypatch, ADMIN_TOKEN=SIXTEEN, CRON_SECRET=SIXTEEN[::-1], JWT_SECRET=THIRTY_TWO, JWT_AUDIENCE="app",
        JWT_ISSUER="https://auth.example.com/", API_RATE_LIMIT="20 per second",
    )  # fmt: skip
    secrets = (loaded.admin_token, loaded.cron_secret, loaded.jwt_secret)
    assert [secret and secret.get_secret_value() for secret in secrets] == [SIXTEEN, SIXTEEN[::-1], THIRTY_TWO]
    assert (loaded.jwt_audience, loaded.jwt_issuer) == ("app", "https://auth.example.com/")


def test_an_empty_value_is_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(monkeypatch, ADMIN_TOKEN="", JWT_SECRET="", JWKS_URL="", JWT_AUDIENCE="", API_RATE_LIMIT="")
    assert (loaded.admin_token, loaded.jwt_audience, loaded.api_rate_limit) == (None, "credits", "600/minute")


def test_secrets_stand_in_no_repr_and_no_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(monkeypatch, ADMIN_TOKEN=f"{PLANTED}-{SIXTEEN}", JWT_SECRET=f"{PLANTED}-{THIRTY_TWO}")
    with caplog.at_level(logging.DEBUG):
        logging.getLogger(__name__).info("%s %r %s", loaded, loaded, loaded.admin_token)
    assert PLANTED not in f"{loaded} {loaded!r} {loaded.model_dump()} {loaded.model_dump_json()} {caplog.text}"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ADMIN_TOKEN", f"{PLANTED}-too-short"[:15], "must have 16 characters at least"),
        ("CRON_SECRET", PLANTED, "must have 16 characters at least"),
        ("ADMIN_TOKEN", f"{PLANTED} {SIXTEEN}", "no space and no line's end"),
        ("ADMIN_TOKEN", f"{PLANTED}{SIXTEEN}\n", "no space and no line's end"),
        ("CRON_SECRET", f"{PLANTED}ä{SIXTEEN}", "ASCII's signs alone"),
        ("CRON_SECRET", f"{PLANTED}\udcff{SIXTEEN}", "ASCII's signs alone"),
        ("JWT_SECRET", THIRTY_TWO[:-1].replace("s3cret", PLANTED), "must have 32 bytes at least"),
        ("JWT_SECRET", f"{PLANTED}{THIRTY_TWO}\n", "such as a line's end"),
        ("JWT_SECRET", f"{PLANTED}{THIRTY_TWO}\udcff", "nobody can type"),
        ("JWT_SECRET", f"-----BEGIN PUBLIC KEY-----{PLANTED}", "Public keys come by JWKS_URL"),
        ("JWT_SECRET", f"ssh-ed25519 {PLANTED}{THIRTY_TWO}", "Public keys come by JWKS_URL"),
        ("JWKS_URL", f"http://auth.example.com/{PLANTED}", "must start with https://"),
        ("JWKS_URL", f"http://localhost.example.com/{PLANTED}", "must start with https://"),
        ("JWKS_URL", f"http://127.0.0.1.example.com/{PLANTED}", "must start with https://"),
        ("JWKS_URL", f"http://127.0.0.1@example.com/{PLANTED}", "must start with https://"),
        ("JWKS_URL", f"file:///{PLANTED}", "must start with https://"),
        ("JWKS_URL", PLANTED, "must start with https://"),
        ("JWKS_URL", f"https://app:{PLANTED}@auth.example.com/", "no password"),
        ("JWKS_URL", f"https://auth.example.com:{PLANTED}/", "must name a host"),
        ("JWKS_URL", f"https:///{PLANTED}", "must name a host"),
        ("JWKS_URL", f"https://auth.example.com/{PLANTED} x", "no address has"),
    ],
)
def test_a_bad_secret_is_named_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    line = refused(monkeypatch, **{name: value})
    assert line.startswith(f"{name}: ")
    assert says in line
    assert PLANTED not in line


@pytest.mark.parametrize(
    "url",
    [
        "https://auth.example.com/.well-known/jwks.json", "https://auth.example.com:8443/keys?tenant=7",
        "http://localhost:8080/jwks", "http://127.0.0.1/jwks", "http://[::1]:8080/jwks",
    ],
)  # fmt: skip
def test_keys_come_by_https_or_from_this_machine(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    assert load(monkeypatch, JWKS_URL=url).jwks_url == url


def test_users_tokens_are_checked_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    line = refused(monkeypatch, JWT_SECRET=THIRTY_TWO, JWKS_URL="https://auth.example.com/jwks")
    assert line == "JWKS_URL: cannot be beside JWT_SECRET: keep the one that users' tokens are signed for"


@pytest.mark.parametrize(
    ("first", "second"),
    [("ADMIN_TOKEN", "CRON_SECRET"), ("ADMIN_TOKEN", "JWT_SECRET"), ("CRON_SECRET", "JWT_SECRET")],
)
def test_one_value_opens_one_door(monkeypatch: pytest.MonkeyPatch, first: str, second: str) -> None:
    line = refused(monkeypatch, **{first: THIRTY_TWO, second: THIRTY_TWO})
    assert line == f"{second}: is the same as {first}: whoever has the one would have the other"


@pytest.mark.parametrize("rate", ["1/second", "600/minute", "20 per second", "1000 per 5 minutes", "100000/day"])
def test_rates(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    assert load(monkeypatch, API_RATE_LIMIT=rate).api_rate_limit == rate


@pytest.mark.parametrize(
    "rate", ["many", "600", "0/minute", "-1/minute", "1.5/minute", "600/minute;20/second", "100001/day", "1/month"]
)
def test_no_rates(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    line = refused(monkeypatch, API_RATE_LIMIT=rate)
    assert line.startswith(f"API_RATE_LIMIT={rate!r}: must be 1 to 100,000 requests in a day or less, such as")


def test_embedded_servers_change_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: Any = load(monkeypatch, ADMIN_TOKEN=SIXTEEN)
    moved = loaded.with_urls(database_url="postgresql://db/app", redis_url="redis://redis")
    assert moved.admin_token == loaded.admin_token
