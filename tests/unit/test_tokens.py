"""Users' tokens: whose they are, and everything that makes them nobody's."""

from __future__ import annotations

import base64
import hmac
import json
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from structlog.testing import capture_logs

import settings
from api import tokens
from api.tokens import JwksUnavailableError, Tokens
from tests.unit.key_server import KeyServer, Signer, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHARED = "s" * 32
NOBODY: Any = {}
"""A claim with this value is left out."""


def claims(**changed: Any) -> dict[str, Any]:
    now = int(time.time())
    all_claims = {"sub": "ada", "aud": "credits", "exp": now + 60, "iat": now, **changed}
    return {name: value for name, value in all_claims.items() if value is not NOBODY}


def hs256(payload: dict[str, Any], secret: str | bytes = SHARED, algorithm: str = "HS256") -> str:
    return jwt.encode(payload, secret, algorithm)


def by_secret(**more: Any) -> Tokens:
    return Tokens(settings.Settings(jwt_secret=SecretStr(SHARED), **more))


def segment(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def raw(header: object, payload: object, secret: bytes = SHARED.encode()) -> str:
    """A token that no library would make, with a good HMAC."""
    signed = ".".join(
        segment(part if isinstance(part, bytes) else json.dumps(part).encode()) for part in (header, payload)
    )
    return f"{signed}.{segment(hmac.digest(secret, signed.encode(), sha256))}"


# --- with a secret ---------------------------------------------------------------------------------------------------


def test_the_subject_of_a_good_token_is_its_user() -> None:
    checked = by_secret()
    assert checked.subject(hs256(claims())) == "ada"
    assert checked.subject(hs256(claims(aud=["app", "credits"], nbf=int(time.time()), jti="1", more=[1]))) == "ada"
    assert checked.subject(hs256(claims(sub="ädä / 42"))) == "ädä / 42"


def test_without_settings_no_token_is_anybodys() -> None:
    closed = Tokens(settings.Settings(jwt_secret=None, jwks_url=None))
    for secret in ("", "x", SHARED):
        signed = raw({"alg": "HS256", "typ": "JWT"}, claims(), secret.encode())
        assert closed.subject(signed) is None


BAD: list[dict[str, Any]] = [
    {"exp": NOBODY}, {"aud": NOBODY}, {"sub": NOBODY}, {"exp": 1}, {"exp": None}, {"exp": "soon"}, {"exp": [1]},
    {"exp": float("inf")}, {"exp": float("nan")}, {"exp": "9" * 5_000}, {"aud": "app"}, {"aud": []}, {"aud": [1]},
    {"aud": {"credits": 1}}, {"aud": "Credits"}, {"aud": "credits "}, {"sub": ""}, {"sub": " \t"}, {"sub": 7},
    {"sub": None}, {"sub": ["ada"]}, {"sub": "a\0b"}, {"sub": "\ud800"}, {"nbf": 4_000_000_000}, {"nbf": "x"},
    {"iat": 4_000_000_000}, {"iat": []},
]  # fmt: skip


@pytest.mark.parametrize("changed", BAD, ids=str)
def test_claims_that_make_a_token_nobodys(changed: dict[str, Any]) -> None:
    assert by_secret().subject(raw({"alg": "HS256", "typ": "JWT"}, claims(**changed))) is None


def test_the_log_says_why_and_repeats_no_token() -> None:
    """The one who asks is told no more than 401; the one who has set it up finds out why."""
    reasons = {
        hs256(claims(aud="another")): "InvalidAudienceError",
        hs256(claims(exp=1)): "ExpiredSignatureError",
        hs256(claims(exp=NOBODY)): "MissingRequiredClaimError",
        hs256(claims(), "x" * 40): "InvalidSignatureError",
        hs256(claims(sub=" ")): "its subject is no user's id",
    }
    checked = by_secret()
    with capture_logs() as lines:
        assert [checked.subject(token) for token in reasons] == [None] * len(reasons)
        assert Tokens(settings.Settings(jwt_secret=None, jwks_url=None)).subject(hs256(claims())) is None
    assert [line["because"] for line in lines] == [*reasons.values(), "NoSignerError"]
    assert [line for line in lines if "eyJ" in str(line)] == []


@pytest.mark.parametrize(("seconds", "whose"), [(-20, "ada"), (-40, None)])
def test_clocks_may_differ_by_half_a_minute(seconds: int, whose: str | None) -> None:
    assert by_secret().subject(hs256(claims(exp=int(time.time()) + seconds))) == whose


def test_the_issuer_counts_where_it_is_set() -> None:
    strict = by_secret(jwt_issuer="https://auth.example.com/")
    assert strict.subject(hs256(claims(iss="https://auth.example.com/"))) == "ada"
    for issuer in (NOBODY, "https://auth.example.com", "", ["https://auth.example.com/"]):
        assert strict.subject(raw({"alg": "HS256"}, claims(iss=issuer))) is None
    assert by_secret().subject(hs256(claims(iss="anybody"))) == "ada"


def test_the_audience_is_the_setting() -> None:
    assert by_secret(jwt_audience="app").subject(hs256(claims(aud="app"))) == "ada"
    assert by_secret(jwt_audience="app").subject(hs256(claims())) is None


@pytest.mark.parametrize("algorithm", ["none", "None", "nOnE", "", "HS384", "RS256", "hs256", None, ["HS256"], {}])
def test_no_other_algorithm_is_taken(algorithm: object) -> None:
    token = raw({"alg": algorithm, "typ": "JWT"}, claims())
    unsigned = token.rpartition(".")[0]
    for shown in (token, f"{unsigned}.", unsigned):
        assert by_secret().subject(shown) is None
    assert by_secret().subject(raw({"typ": "JWT"}, claims())) is None


def test_no_other_secret_is_taken() -> None:
    for secret in ("t" * 32, SHARED + "s", SHARED[:-1], ""):
        assert by_secret().subject(raw({"alg": "HS256"}, claims(), secret.encode())) is None
    for algorithm in ("HS384", "HS512"):
        with pytest.warns(jwt.InsecureKeyLengthWarning):
            token = hs256(claims(), algorithm=algorithm)
        assert by_secret().subject(token) is None


@pytest.mark.parametrize(
    "token",
    [
        "", ".", "..", "...", "a.b.c", "\udcff.\udcff.\udcff", "\0", "ä.ö.ü", "x" * 100_000, "." * 100_000,
        raw(b"[" * 50_000, claims()), raw({"alg": "HS256"}, b"[" * 50_000), raw(b'{"alg":"HS256"', claims()),
        raw([], claims()), raw({"alg": "HS256"}, []), raw({"alg": "HS256"}, "ada"), raw({"alg": "HS256"}, b"\xff"),
        raw({"alg": "HS256", "kid": 7}, claims()), raw({"alg": "HS256", "crit": ["exp"]}, claims()),
        raw({"alg": "HS256", "b64": False, "crit": ["b64"]}, b""), raw({"alg": "HS256"}, b'{"exp":' + b"9" * 9_000),
    ],
    ids=range(21),
)  # fmt: skip
def test_what_is_no_token_is_nobodys(token: str) -> None:
    assert by_secret().subject(token) is None


@given(text=st.text() | st.text(alphabet="abcXYZ019-_.=", max_size=60))
def test_any_text_is_answered(text: str) -> None:
    assert by_secret().subject(text) is None


@given(position=st.integers(min_value=0), character=st.sampled_from("aZ9-_.=ä "))
def test_a_token_with_one_character_changed_is_nobodys(position: int, character: str) -> None:
    token = hs256(claims(exp=4_000_000_000, iat=0))
    at = position % len(token)
    changed = token[:at] + character + token[at + 1 :]
    assert by_secret().subject(changed) == ("ada" if changed == token else None)


# --- with published keys ---------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[KeyServer]:
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def rsa() -> Signer:
    return Signer.make("RS256")


def by_url(server: KeyServer) -> Tokens:
    return Tokens(settings.Settings(jwks_url=server.url))


@pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256", "ES256", "EdDSA"])
def test_each_kind_of_key_pair(server: KeyServer, algorithm: str) -> None:
    signer, stranger = Signer.make(algorithm), Signer.make(algorithm)
    server.keys = [Signer.make("ES256", "other").published(), signer.published()]
    checked = by_url(server)
    assert checked.subject(signer.sign(claims())) == "ada"
    assert checked.subject(stranger.sign(claims())) is None
    for changed in BAD[:3]:
        assert checked.subject(signer.sign(claims(**changed))) is None
    assert server.asked == 1


def test_a_key_is_for_the_algorithm_that_it_is_published_for(server: KeyServer, rsa: Signer) -> None:
    server.keys = [rsa.published()]
    checked = by_url(server)
    for algorithm in ("RS512", "PS256"):
        assert checked.subject(rsa.sign(claims(), alg=algorithm)) is None
    server.keys = [{name: value for name, value in rsa.published().items() if name != "alg"}]
    assert by_url(server).subject(rsa.sign(claims())) == "ada"


def test_the_public_key_is_no_secret_to_sign_with(server: KeyServer, rsa: Signer) -> None:
    server.keys = [rsa.published(), {"kty": "oct", "kid": "shared", "k": segment(SHARED.encode()), "alg": "HS256"}]
    checked = by_url(server)
    public = rsa.private.public_key()
    forms = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(rsa.published()).encode(), rsa.published()["n"].encode(), b"",
    ]  # fmt: skip
    for secret in forms:
        for algorithm in ("HS256", "RS256", "none"):
            assert checked.subject(raw({"alg": algorithm, "kid": "first"}, claims(), secret)) is None
    assert checked.subject(raw({"alg": "HS256", "kid": "shared"}, claims())) is None
    assert checked.subject(raw({"alg": "RS256", "kid": "shared"}, claims())) is None
    assert checked.subject(rsa.sign(claims())) == "ada"


def test_a_key_that_is_too_short_is_not_believed(server: KeyServer) -> None:
    short = Signer.make("RS256", bits=1_024)
    server.keys = [short.published()]
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        token = short.sign(claims())
    assert by_url(server).subject(token) is None


def test_tokens_that_cannot_be_good_cost_no_fetch(server: KeyServer, rsa: Signer) -> None:
    checked = by_url(server)
    nameless = jwt.encode(claims(), rsa.private, "RS256")
    for token in (nameless, hs256(claims()), raw({"alg": "none", "kid": "first"}, claims()), "x", "a.b.c"):
        assert checked.subject(token) is None
    assert server.asked == 0


def test_an_unknown_key_is_asked_for_once_and_not_by_every_request(server: KeyServer, rsa: Signer) -> None:
    server.keys = [rsa.published()]
    checked = by_url(server)
    strange = Signer("strange", "RS256", rsa.private)
    for _ in range(20):
        assert checked.subject(strange.sign(claims())) is None
    assert server.asked == 1


def test_a_key_that_is_new_is_found(server: KeyServer, rsa: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "UNKNOWN_KEY_SECONDS", 0)
    server.keys = [rsa.published()]
    checked = by_url(server)
    assert checked.subject(rsa.sign(claims())) == "ada"
    second = Signer.make("ES256", "second")
    server.keys = [second.published()]
    assert checked.subject(second.sign(claims())) == "ada"
    assert checked.subject(rsa.sign(claims())) is None


def broken(**changed: Any) -> Callable[[KeyServer], None]:
    def breaks(server: KeyServer) -> None:
        for name, value in changed.items():
            setattr(server, name, value)

    return breaks


@pytest.mark.parametrize(
    "breaks",
    [
        broken(status=500), broken(status=404), broken(status=302, headers={"Location": "http://127.0.0.1:1/"}),
        broken(body=b"<html>"), broken(body=b""), broken(body=b"[]"), broken(body=b"{}"), broken(body=b'{"keys": []}'),
        broken(body=b'{"keys": 7}'), broken(body=b'{"keys": [{"kty": "RSA"}]}'), broken(body=b"\xff\xfe"),
        broken(body=b'{"keys"', headers={"Content-Length": "1000"}), broken(delay_seconds=1.0),
        broken(url="http://127.0.0.1:1/jwks"), broken(url="http://nobody.invalid/jwks"),
    ],
    ids=range(15),
)  # fmt: skip
def test_without_keys_nobody_knows_and_nobody_waits_twice(
    server: KeyServer, rsa: Signer, breaks: Callable[[KeyServer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FETCH_TIMEOUT_SECONDS", 0.2)
    server.keys = [rsa.published()]
    breaks(server)
    checked = Tokens(settings.Settings.model_construct(jwks_url=server.url))
    token = rsa.sign(claims())
    for _ in range(3):
        with pytest.raises(JwksUnavailableError, match=r"^The keys at JWKS_URL cannot be had: .+") as caught:
            checked.subject(token)
        assert "\n" not in str(caught.value)
        assert not any(part in str(caught.value) for part in token.split("."))
    assert server.asked <= 1


def test_a_server_that_hangs_holds_up_nobody_but_the_first(
    server: KeyServer, rsa: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FETCH_TIMEOUT_SECONDS", 0.5)
    server.delay_seconds = 2.0
    checked = by_url(server)
    token = rsa.sign(claims())

    def ask(_: int) -> bool:
        try:
            checked.subject(token)
        except JwksUnavailableError:
            return True
        return False

    began = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(ask, range(100)))
    assert time.monotonic() - began < 4 * 0.5
    assert server.asked == 1


def test_it_recovers(server: KeyServer, rsa: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FETCH_PAUSE_SECONDS", 0.1)
    server.keys, server.status = [rsa.published()], 503
    checked = by_url(server)
    with pytest.raises(JwksUnavailableError):
        checked.subject(rsa.sign(claims()))
    server.status = 200
    time.sleep(0.15)
    assert checked.subject(rsa.sign(claims())) == "ada"


def test_known_keys_serve_while_the_server_is_away(server: KeyServer, rsa: Signer) -> None:
    server.keys = [rsa.published()]
    checked = by_url(server)
    assert checked.subject(rsa.sign(claims())) == "ada"
    server.status = 500
    assert checked.subject(rsa.sign(claims(sub="bob"))) == "bob"
    assert server.asked == 1
