"""Settings: the only reader of environment variables.

Every process loads its settings once, at its start, so that a bad value stops it with one line that
names the variable instead of surfacing as a traceback an hour later. Everything else in the project
takes the values that it needs as arguments.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

CHECKOUT = Path(__file__).resolve().parent
"""The folder that holds the code: `celery -A tasks` and `alembic` run from here."""

_POSTGRES_NAME_BYTES = 63
_TOKEN_CHARACTERS_MIN = 16
_JWT_SECRET_BYTES_MIN = 32
"""As many as the hash of HS256 has (RFC 7518, 3.2)."""
_RATE_MAX = 100_000
"""The instant of each request within the window is kept, in Redis or in memory."""
_RATE_SECONDS_MAX = 86_400
_SECRET_FIELDS = frozenset(
    {
        "database_url",
        "redis_url",
        "celery_broker_url",
        "admin_token",
        "cron_secret",
        "jwt_secret",
        "jwks_url",
        "stripe_webhook_secret",
    }
)


class SettingsError(ValueError):
    """An environment variable has a value that the service cannot start with. Its text is one line for people."""


def _identifier(value: str) -> str:
    if not (value.isascii() and value.isidentifier() and value == value.lower() and len(value) <= _POSTGRES_NAME_BYTES):
        raise ValueError("must be a plain lower-case SQL name: letters, digits and underscores, at most 63")
    if value.startswith("pg_") or value == "public":
        raise ValueError("must be a schema of its own: neither 'public' nor one of PostgreSQL's 'pg_…' schemas")
    return value


def _cron(value: str) -> str:
    try:
        CronSim(value, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f"must be a cron expression of five fields such as '0 2 * * *' ({error})") from None
    if len(value.split()) != len(("minute", "hour", "day of month", "month", "day of week")):
        raise ValueError("must be a cron expression of five fields such as '0 2 * * *'")
    return value


def _postgres_url(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise ValueError("must start with postgresql://, as in postgresql://user:password@host:5432/database")
    _readable(rest.partition("?")[0].rpartition("@")[2].partition("/")[0], at_signs=rest.partition("?")[0].count("@"))
    return f"postgresql+psycopg://{rest}"


def _readable(host_and_port: str, *, at_signs: int) -> None:
    """Refuse a URL that is read otherwise than it was meant: what libraries then say of it repeats half a password."""
    port = host_and_port.rpartition("]")[2].partition(":")[2]
    if at_signs > 1 or not (port.isdecimal() or not port):
        raise ValueError(
            "names no host and port after its one @: within a password, write @ : / ? # % as %40 %3A %2F %3F %23 %25"
        )


def _broker_url(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in {"redis", "rediss", "redis+socket", "unix"}:
        raise ValueError("must start with redis://, rediss:// or redis+socket://, as in redis://:password@host:6379/0")
    _nodes_readable(value)
    return f"redis+socket://{rest}" if scheme == "unix" else value


def _celery_broker_url(value: str) -> str:
    # Celery reads the same variable by itself, so it has to be in Celery's form already; several are a cluster's nodes.
    schemes = {url.partition("://")[0] for url in value.split(";")}
    if not (schemes <= {"amqp", "amqps"} or schemes <= {"redis", "rediss", "redis+socket"}):
        raise ValueError(
            "must start with amqp://, amqps://, redis://, rediss:// or redis+socket://, "
            "as in amqp://user:password@host:5672/vhost"
        )
    _nodes_readable(value)
    return value


def _nodes_readable(urls: str) -> None:
    """The same for a broker: urlsplit() as kombu uses it, which ends the host at the first / ? or #."""
    for parts in map(urlsplit, urls.split(";")):
        if parts.scheme in {"redis+socket", "unix"}:
            continue  # a path
        _readable(parts.netloc.rpartition("@")[2], at_signs=parts.netloc.count("@") + bool(parts.fragment) * 2)
        if parts.scheme in {"redis", "rediss"} and not (parts.path.strip("/").isdecimal() or not parts.path.strip("/")):
            raise ValueError("names no database of Redis by its number, as in redis://:password@host:6379/0")


def _token(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if len(text) < _TOKEN_CHARACTERS_MIN:
        raise ValueError(f"must have {_TOKEN_CHARACTERS_MIN} characters at least: make one with `openssl rand -hex 24`")
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("is sent in a header: letters, digits and ASCII's signs alone, no space and no line's end")
    return value


def _jwt_secret(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text.isprintable():
        raise ValueError("has a character that nobody can type, such as a line's end")
    if len(text.encode()) < _JWT_SECRET_BYTES_MIN:
        raise ValueError(f"must have {_JWT_SECRET_BYTES_MIN} bytes at least: make one with `openssl rand -hex 32`")
    if "-----BEGIN" in text or text.startswith("ssh-"):
        # Whoever knows the public key could sign for anybody.
        raise ValueError("is a key of a pair; HS256 takes a shared secret. Public keys come by JWKS_URL")
    return value


def _signing_secrets(value: SecretStr) -> SecretStr:
    for secret in value.get_secret_value().split(","):
        if len(secret.strip()) < _TOKEN_CHARACTERS_MIN or not (secret.isascii() and secret.isprintable()):
            raise ValueError(
                "must be the endpoint's signing secret, which begins with whsec_; several, while one takes another's "
                "place, are separated by commas"
            )
        if secret.strip().startswith(("sk_", "rk_", "pk_")):
            raise ValueError("is an API key: the endpoint's signing secret begins with whsec_")
    return value


def _jwks_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        raise ValueError(
            "must start with https://, as in https://auth.example.com/.well-known/jwks.json: "
            "whoever can change the keys on their way can be any user"
        )
    port = parts.netloc.rpartition("]")[2].partition(":")[2]
    if not parts.hostname or "@" in parts.netloc or not (port.isdecimal() or not port):
        raise ValueError("must name a host, perhaps a port, and no password")
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise ValueError("has a character that no address has: write it as %20 and the like")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _rate(value: str) -> str:
    from limits import parse_many  # noqa: PLC0415 - most processes are given no rate

    try:
        rates = parse_many(value)
    except ValueError:
        rates = []
    if len(rates) != 1 or not 1 <= rates[0].amount <= _RATE_MAX or rates[0].get_expiry() > _RATE_SECONDS_MAX:
        raise ValueError(f"must be 1 to {_RATE_MAX:,} requests in a day or less, such as 600/minute or 20/second")
    return value


class Settings(BaseSettings):
    """What the environment says, checked. An absent URL means: use an embedded server."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, validate_default=False)

    database_url: Annotated[str, AfterValidator(_postgres_url)] | None = None
    redis_url: Annotated[str, AfterValidator(_broker_url)] | None = None
    celery_broker_url: Annotated[str, AfterValidator(_celery_broker_url)] | None = None
    """The broker in the place of `REDIS_URL`: RabbitMQ, or Redis again."""
    celery_task_default_queue_type: Literal["quorum", "classic"] = "quorum"
    """How queues are declared on RabbitMQ; Redis has one kind. Celery's name for it is `task_default_queue_type`."""
    database_schema: Annotated[str, AfterValidator(_identifier)] = "credits"

    credit_refresh_enabled: bool = True
    credit_refresh_interval_hours: int = Field(default=1, ge=1, le=8_760)
    credit_refresh_interval_seconds: int | None = Field(default=None, ge=1, le=3_600)
    """For demos and tests alone: sets beat and slot together."""
    credit_refresh_cron: Annotated[str, AfterValidator(_cron)] | None = None
    credit_refresh_batch_size: int = Field(default=100, ge=1, le=10_000)
    credit_refresh_dry_run: bool = False
    credit_refresh_max_users_per_second: int = Field(default=5_000, ge=0, le=2**31 - 1)
    """Scheduled runs go no faster, so that they leave the host its database; 0: as fast as the workers can."""
    credit_refresh_max_attempts: int = Field(default=5, ge=1, le=100)
    """Times that a batch is tried, its worker's deaths included, before it is failed."""
    credit_refresh_task_events: bool = True
    """Task events feed Flower; they cost up to a twentieth of the throughput (`make bench`)."""

    credit_refresh_top_ups: bool = False
    """The host adds credits too, as it sells or returns some: `verify` at night does not report balances that rose."""

    credit_refresh_retention_months: int | None = Field(default=None, ge=13, le=1_200)
    """Whole months of history and audit that are kept, besides the present one; absent: nobody's books are cut."""
    credit_refresh_planned_days: int = Field(default=90, ge=1, le=36_500)
    """How long the rows that a dry run has planned are kept, and can be applied."""

    webhooks_allow_private: bool = False
    """Webhooks may go to private networks and to this machine, and by http; otherwise to public addresses by https."""

    credits_free_tier: int = Field(default=1_000, ge=1, le=2**63 - 1)
    credits_pro_tier: int = Field(default=20_000, ge=1, le=2**63 - 1)

    admin_token: Annotated[SecretStr, AfterValidator(_token)] | None = None
    """Opens every route of the HTTP API but users' own; meant for making the first keys."""
    cron_secret: Annotated[SecretStr, AfterValidator(_token)] | None = None
    """Opens the route that a hosted cron service calls, and no other."""
    jwt_secret: Annotated[SecretStr, AfterValidator(_jwt_secret)] | None = None
    """Users' tokens are signed with it (HS256), by the app that they are users of."""
    jwks_url: Annotated[str, AfterValidator(_jwks_url)] | None = None
    """In its place: where the public keys are that users' tokens are checked against."""
    jwt_audience: str = "credits"
    """A user's token must name it in `aud`, so that a token made for something else opens nothing here."""
    jwt_issuer: str | None = None
    """Where set, a user's token must name it in `iss`."""
    api_rate_limit: Annotated[str, AfterValidator(_rate)] = "600/minute"
    """Requests that each caller of the HTTP API may make."""

    stripe_webhook_secret: Annotated[SecretStr, AfterValidator(_signing_secrets)] | None = None
    """Stripe signs its events with it. Several, separated by commas, while one takes another's place."""
    stripe_plan_after_cancel: str = "free"
    """The plan of those whose subscription has ended. Where there is none of that code, they have none."""

    credits_state_dir: Path = CHECKOUT / ".state"
    """Where embedded servers, beat's timetable and the demo keep their files."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_format: Literal["console", "json"] = "console"

    @field_validator("cron_secret", "jwt_secret", "jwks_url")
    @classmethod
    def _apart(cls, value: SecretStr | str | None, info: ValidationInfo) -> SecretStr | str | None:
        """Secrets that open different doors differ, and users' tokens are checked in one way."""
        given = {name: info.data.get(name) for name in ("admin_token", "cron_secret", "jwt_secret")}
        if info.field_name == "jwks_url" and value and given["jwt_secret"]:
            raise ValueError("cannot be beside JWT_SECRET: keep the one that users' tokens are signed for")
        for name, other in given.items():
            if isinstance(value, SecretStr) and value == other:
                raise ValueError(f"is the same as {name.upper()}: whoever has the one would have the other")
        return value

    @property
    def broker_url(self) -> str | None:
        """Where messages go."""
        return self.celery_broker_url or self.redis_url

    @property
    def stripe_secrets(self) -> list[str]:
        """What Stripe's events may be signed with; none: nothing is accepted."""
        given = self.stripe_webhook_secret.get_secret_value() if self.stripe_webhook_secret else ""
        return [secret.strip() for secret in given.split(",") if secret.strip()]

    @property
    def interval(self) -> timedelta:
        """The width of a slot: one scheduled run stands for each."""
        if self.credit_refresh_interval_seconds is not None:
            return timedelta(seconds=self.credit_refresh_interval_seconds)
        return timedelta(hours=self.credit_refresh_interval_hours)

    @property
    def scheduled_max_users_per_second(self) -> int | None:
        """The pace of scheduled runs; None: none."""
        return self.credit_refresh_max_users_per_second or None

    def with_urls(self, *, database_url: str | None, redis_url: str | None) -> Settings:
        """The same settings, pointed at running servers; how the embedded ones come in."""
        urls = {
            "database_url": database_url and _postgres_url(database_url),
            "redis_url": redis_url and _broker_url(redis_url),
        }
        return self.model_copy(update=urls)


def load() -> Settings:
    """Read and check the environment.

    Raises:
        SettingsError: a value is not usable; the text names the variable, the value and what is allowed.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        reason = str(first["msg"]).removeprefix("Value error, ")
        # A connection URL may carry a password, so its value is never repeated.
        value = "" if field in _SECRET_FIELDS else f"={first['input']!r}"
        raise SettingsError(f"{field.upper()}{value}: {reason[:1].lower()}{reason[1:]}") from None


def environment(**overrides: str) -> dict[str, str]:
    """The environment for a child process: ours, with some variables replaced."""
    return {**os.environ, **overrides}  # noqa: TID251 - the one place
