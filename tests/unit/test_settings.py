from __future__ import annotations

from datetime import timedelta

import pytest

import settings


def test_absent_variables_have_the_documented_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    loaded = settings.load()
    assert loaded.database_url is None
    assert loaded.database_schema == "credits"
    assert loaded.credit_refresh_enabled is True
    assert loaded.interval == timedelta(hours=1)
    assert loaded.credit_refresh_batch_size == 100
    assert (loaded.credits_free_tier, loaded.credits_pro_tier) == (1_000, 20_000)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("CREDIT_REFRESH_BATCH_SIZE", "many", "valid integer"),
        ("CREDIT_REFRESH_BATCH_SIZE", "0", "greater than or equal to 1"),
        ("CREDIT_REFRESH_INTERVAL_HOURS", "1.5", "valid integer"),
        ("CREDIT_REFRESH_MAX_USERS_PER_SECOND", "-1", "greater than or equal to 0"),
        ("CREDIT_REFRESH_ENABLED", "perhaps", "valid boolean"),
        ("CREDIT_REFRESH_CRON", "every day", "0 2 * * *"),
        ("CREDIT_REFRESH_CRON", "61 * * * *", "0 2 * * *"),
        ("CREDIT_REFRESH_CRON", "0 0 2 * * *", "five fields"),
        ("DATABASE_SCHEMA", 'credits"; drop', "plain lower-case SQL name"),
        ("DATABASE_SCHEMA", "public", "schema of its own"),
        ("CREDITS_FREE_TIER", "-1", "greater than or equal to 1"),
        ("CELERY_TASK_DEFAULT_QUEUE_TYPE", "stream", "'quorum' or 'classic'"),
        ("LOG_LEVEL", "LOUD", "DEBUG"),
    ],
)
def test_a_bad_value_gives_one_line_that_names_variable_and_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(settings.SettingsError) as caught:
        settings.load()
    line = str(caught.value)
    assert line.startswith(f"{name}={value!r}: ")
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL"])
def test_a_bad_url_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "mysql://app:hunter2@db/app")
    with pytest.raises(settings.SettingsError) as caught:
        settings.load()
    assert str(caught.value).startswith(f"{name}: must start with ")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("DATABASE_URL", "postgresql://app:se@cret@db:5432/app"),
        ("DATABASE_URL", "postgresql://app:secret@db:secret/app"),
        ("REDIS_URL", "redis://:se/cret@redis:6379/0"),
        ("REDIS_URL", "redis://:se#cret@redis:6379/0"),
        ("REDIS_URL", "redis://:secret@redis:6379/secret"),
        ("CELERY_BROKER_URL", "amqp://app:se@cret@mq:5672/app"),
        ("CELERY_BROKER_URL", "amqps://app:secret@mq1/app;amqps://app:secret"),
    ],
)
def test_a_url_that_would_be_read_otherwise_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.setenv(name, url)
    with pytest.raises(settings.SettingsError, match=f"^{name}: names no ") as refused:
        settings.load()
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("DATABASE_URL", "postgresql://app:se%40cret@[::1]:5432/app?sslmode=require"),
        ("DATABASE_URL", "postgresql:///app?host=/run/postgresql"),
        ("REDIS_URL", "rediss://:secret@redis.internal:6380"),
        ("REDIS_URL", "unix:///tmp/a#b/redis.sock"),
        ("CELERY_BROKER_URL", "amqp://app:secret@mq1:5672/app;amqp://app:secret@mq2/app"),
    ],
)
def test_urls_in_all_their_forms_are_taken(monkeypatch: pytest.MonkeyPatch, name: str, url: str) -> None:
    monkeypatch.setenv(name, url)
    settings.load()


def test_urls_are_brought_into_the_form_of_their_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://app@db/app")
    monkeypatch.setenv("REDIS_URL", "unix:///run/redis.sock")
    loaded = settings.load()
    assert loaded.database_url == "postgresql+psycopg://app@db/app"
    assert loaded.redis_url == "redis+socket:///run/redis.sock"


@pytest.mark.parametrize(
    "url",
    ["amqp://app:secret@mq/credits", "amqps://mq1//;amqps://mq2//", "rediss://redis:6379/0", "redis+socket:///run/r"],
)
def test_another_broker_comes_before_redis(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://redis:6379/0")
    assert settings.load().broker_url == "redis://redis:6379/0"
    monkeypatch.setenv("CELERY_BROKER_URL", url)
    assert settings.load().broker_url == url


@pytest.mark.parametrize("url", ["unix:///run/redis.sock", "amqp://mq//;redis://redis/0", "mq.internal", "sqs://"])
def test_a_broker_must_be_one_that_celery_and_we_know(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Celery reads the variable itself, and knows no `unix://`; failover is between brokers of one kind."""
    monkeypatch.setenv("CELERY_BROKER_URL", url)
    with pytest.raises(settings.SettingsError, match=r"^CELERY_BROKER_URL: must start with amqp://"):
        settings.load()
