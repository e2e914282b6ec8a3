"""Stripe's settings: several secrets, none of which is ever repeated, and none that is an API key."""

from __future__ import annotations

import pytest

import settings


def test_several_secrets_while_one_takes_anothers_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIPE_WEBHOOK_SECRET", "whsec_0123456789abcdef, whsec_fedcba9876543210")
    assert settings.load().stripe_secrets == ["whsec_0123456789abcdef", "whsec_fedcba9876543210"]
    assert "0123456789abcdef" not in repr(settings.load())


def test_without_one_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRIPE_WEBHOOK_SECRET", raising=False)
    assert settings.load().stripe_secrets == []
    assert settings.load().stripe_plan_after_cancel == "free"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("short", "begins with whsec_"),
        ("whsec_0123456789abcdef,", "begins with whsec_"),
        ("whsec_0123456789abcdef\n", "begins with whsec_"),
        ("sk_live_0123456789abcdef", "is an API key"),
    ],
)
def test_what_is_no_signing_secret(monkeypatch: pytest.MonkeyPatch, value: str, says: str) -> None:
    monkeypatch.setenv("STRIPE_WEBHOOK_SECRET", value)
    with pytest.raises(settings.SettingsError) as caught:
        settings.load()
    assert str(caught.value).startswith("STRIPE_WEBHOOK_SECRET: ")
    assert says in str(caught.value)
    assert value.strip(",\n") not in str(caught.value)
