"""Where an issuer's keys come from, how long they are good for, and how seldom the issuer is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dicom_depot.adapters import issuer_keys
from dicom_depot.adapters.issuer_keys import KEEP_SECONDS, PAUSE_SECONDS, STALE_SECONDS, IssuerKeys, fetch_keys
from dicom_depot.domain.errors import ServiceUnavailable
from tests.support.certificates import make_certificate
from tests.support.issuer import DISCOVERY, KEY_SET, Issuer, new_key, public_jwk
from tests.support.secured import open_secured


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


def test_keys_are_fetched_once_and_kept(issuer: Issuer) -> None:
    clock = Clock()
    keys = IssuerKeys(issuer.url, clock)
    for _ in range(100):
        assert keys.candidates("first", "RS256")
        clock.seconds += KEEP_SECONDS / 101
    assert issuer.requests == {DISCOVERY: 1, KEY_SET: 1}
    clock.seconds += KEEP_SECONDS
    assert keys.candidates("first", "RS256")
    assert issuer.requests[KEY_SET] == 2


def test_a_rotated_key_is_found_at_once(issuer: Issuer) -> None:
    clock = Clock()
    keys = IssuerKeys(issuer.url, clock)
    assert keys.candidates("first", "RS256")
    clock.seconds += PAUSE_SECONDS
    issuer.rotate("second", keep=False)
    assert keys.candidates("second", "RS256")
    assert not keys.candidates("first", "RS256")


def test_invented_key_ids_do_not_hammer_the_issuer(issuer: Issuer) -> None:
    clock = Clock()
    keys = IssuerKeys(issuer.url, clock)
    for number in range(1000):
        assert not keys.candidates(f"invented-{number}", "RS256")
    assert issuer.requests[KEY_SET] == 1
    clock.seconds += PAUSE_SECONDS
    for number in range(1000):
        assert not keys.candidates(f"invented-{number}", "RS256")
    assert issuer.requests[KEY_SET] == 2
    assert keys.candidates("first", "RS256")


def test_many_callers_at_once_lead_to_one_fetch(issuer: Issuer) -> None:
    issuer.delay_seconds = 0.2
    keys = IssuerKeys(issuer.url)
    barrier = threading.Barrier(8)

    def ask(_: int) -> bool:
        barrier.wait()
        return bool(keys.candidates("first", "RS256"))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert issuer.requests == {DISCOVERY: 1, KEY_SET: 1}


def test_a_slow_issuer_holds_up_few_callers_and_none_with_a_known_key(issuer: Issuer) -> None:
    keys = IssuerKeys(issuer.url, clock := Clock())
    assert keys.candidates("first", "RS256")
    issuer.delay_seconds = 0.5
    clock.seconds += PAUSE_SECONDS

    def ask(_: int) -> str:
        try:
            return str(len(keys.candidates("invented", "RS256")))
        except ServiceUnavailable:
            return "busy"

    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(ask, number) for number in range(40)]
        time.sleep(0.1)
        started_at = time.monotonic()
        assert keys.candidates("first", "RS256")
        assert time.monotonic() - started_at < 0.1
        answers = [each.result() for each in asked]
    assert answers.count("busy") >= 40 - issuer_keys._WAITING_MAX - 1
    assert issuer.requests[KEY_SET] == 2


def test_known_keys_outlive_a_short_absence_and_not_a_long_one(issuer: Issuer) -> None:
    clock = Clock()
    keys = IssuerKeys(issuer.url, clock)
    assert keys.candidates("first", "RS256")
    issuer.is_away = True
    clock.seconds += STALE_SECONDS - 1
    assert keys.candidates("first", "RS256")
    assert keys.candidates("first", "RS256")
    assert issuer.requests["away"] == 1
    clock.seconds += 2
    with pytest.raises(ServiceUnavailable):
        keys.candidates("first", "RS256")
    issuer.is_away = False
    clock.seconds += PAUSE_SECONDS
    assert keys.candidates("first", "RS256")


def test_an_issuer_that_never_answered_is_a_503_and_is_asked_again_later(issuer: Issuer) -> None:
    clock = Clock()
    keys = IssuerKeys(issuer.url, clock)
    issuer.is_away = True
    for _ in range(5):
        with pytest.raises(ServiceUnavailable):
            keys.candidates("first", "RS256")
    assert issuer.requests["away"] == 1
    issuer.is_away = False
    clock.seconds += PAUSE_SECONDS
    assert keys.candidates("first", "RS256")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("another issuer's document", {DISCOVERY: {"issuer": "https://x.example", "jwks_uri": "https://x.example/k"}}),
        ("no key set", {DISCOVERY: {"issuer": "ISSUER"}}),
        ("key set over http", {DISCOVERY: {"issuer": "ISSUER", "jwks_uri": "http://192.0.2.1/keys"}}),
        ("key set in a file", {DISCOVERY: {"issuer": "ISSUER", "jwks_uri": "file:///etc/passwd"}}),
        ("a redirect", {"redirect": "http://127.0.0.1:1/"}),
        ("no JSON", {KEY_SET: b"<html>"}),
        ("a list", {KEY_SET: b"[]"}),
        ("nested deeply", {KEY_SET: b'{"keys":' + b"[" * 100_000}),
        ("too long", {KEY_SET: b'{"keys": []}' + b" " * (issuer_keys.DOCUMENT_BYTES_MAX + 1)}),
        ("too many keys", {KEY_SET: {"keys": [{}] * 101}}),
        ("no keys", {KEY_SET: {"keys": []}}),
        ("keys no list", {KEY_SET: {"keys": {"kid": "first"}}}),
        ("only a secret key", {KEY_SET: {"keys": [{"kty": "oct", "kid": "first", "k": "c2VjcmV0", "alg": "HS256"}]}}),
        ("only an encryption key", {KEY_SET: {"keys": [public_jwk(new_key(), "first") | {"use": "enc"}]}}),
        ("broken keys", {KEY_SET: {"keys": [{"kty": "RSA", "kid": "first", "n": "!", "e": "AQAB"}, 7, None]}}),
    ],
)
def test_a_hostile_answer_gives_no_keys(name: str, overrides: dict[str, Any], issuer: Issuer) -> None:
    document = overrides.get(DISCOVERY)
    if document and document["issuer"] == "ISSUER":
        document = document | {"issuer": issuer.url}
        overrides = {DISCOVERY: document}
    issuer.overrides = overrides
    with pytest.raises((ValueError, RecursionError)):
        fetch_keys(issuer.url)
    with pytest.raises(ServiceUnavailable):
        IssuerKeys(issuer.url).candidates("first", "RS256")


def test_an_https_issuer_must_have_a_certificate_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    with Issuer(certificate) as issuer:
        with pytest.raises(ServiceUnavailable):
            IssuerKeys(issuer.url).candidates("first", "RS256")
        assert not issuer.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        assert IssuerKeys(issuer.url).candidates("first", "RS256")


def test_an_https_issuer_cannot_have_its_keys_fetched_over_http_from_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with Issuer(certificate) as issuer:
        issuer.overrides = {DISCOVERY: {"issuer": issuer.url, "jwks_uri": "http://127.0.0.1:1/keys"}}
        with pytest.raises(ValueError, match="no https:// jwks_uri"):
            fetch_keys(issuer.url)


def test_while_the_issuer_is_away_known_keys_are_good_and_others_wait(tmp_path: Path) -> None:
    with open_secured(tmp_path, with_data=False) as running:
        running.issuer.is_away = True
        with running.client("reader") as client:
            answer = client.get("/v2/operations")
            assert answer.status_code == 503
            assert answer.headers["Retry-After"]
            assert client.get("/health/check").status_code == 200
        began_at = time.monotonic()
        with running.client("reader") as client:
            assert client.get("/v2/operations").status_code == 503
        assert time.monotonic() - began_at < 5
