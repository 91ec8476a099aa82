"""Which bearer tokens are accepted: a table of good and bad ones against the verifier that the service uses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest

from dicom_depot.adapters.jwt_verifier import TOKEN_LENGTH_MAX, JwtVerifier
from dicom_depot.domain.access import BUILT_IN_ROLES, Action
from dicom_depot.domain.errors import Unauthenticated
from tests.support.issuer import AUDIENCE, Issuer, new_key, public_jwk, segment

Make = Callable[[Issuer], str]


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        running.rotate("second")
        running.rotate("elliptic", "P-256")
        running.rotate("first-again")
        yield running


@pytest.fixture(scope="module")
def verifier(issuer: Issuer) -> JwtVerifier:
    return make_verifier(issuer.url)


def make_verifier(*issuers: str, algorithms: tuple[str, ...] = ("RS256", "PS256", "ES256")) -> JwtVerifier:
    return JwtVerifier(issuers, (AUDIENCE, "other-audience"), algorithms, "roles", 60.0, BUILT_IN_ROLES)


def _now() -> int:
    return int(time.time())


def _tampered(issuer: Issuer) -> str:
    header, _, signature = issuer.token("reader").split(".")
    return f"{header}.{segment(issuer.claims(roles=['administrator']))}.{signature}"


def _header_swapped(issuer: Issuer, **header: Any) -> str:
    token = issuer.token("reader")
    return f"{segment({'alg': 'RS256', 'kid': issuer.key_id} | header)}.{token.split('.', 1)[1]}"


def _with_own_key(issuer: Issuer) -> str:
    key = new_key()
    return issuer.sign(issuer.claims(), key=key, jwk=public_jwk(key, "first-again"))


def _with_raw_payload(issuer: Issuer, payload: bytes) -> str:
    signed = f"{segment({'alg': 'RS256', 'kid': issuer.key_id})}.{segment(payload)}"
    algorithm = jwt.get_algorithm_by_name("RS256")
    return f"{signed}.{segment(algorithm.sign(signed.encode(), issuer.key))}"


BAD: dict[str, dict[str, Make]] = {
    "its algorithm is not one of": {
        "algorithm none": lambda issuer: issuer.unsigned(issuer.claims()),
        "algorithm None": lambda issuer: issuer.unsigned(issuer.claims(), "None"),
        "algorithm nOnE": lambda issuer: issuer.unsigned(issuer.claims(), "nOnE"),
        "algorithm empty": lambda issuer: issuer.unsigned(issuer.claims(), ""),
        "HS256 with the public key": lambda issuer: issuer.signed_with_public_key(issuer.claims()),
        "HS256 with the public key as DER": lambda issuer: issuer.signed_with_public_key(issuer.claims(), "DER"),
        "RS512, not on the list": lambda issuer: issuer.sign(issuer.claims(), "RS512"),
        "algorithm a number": lambda issuer: _header_swapped(issuer, alg=256),
        "algorithm a list": lambda issuer: _header_swapped(issuer, alg=["RS256"]),
    },
    "its signature is wrong": {
        "RS256 without signature": lambda issuer: issuer.unsigned(issuer.claims(), "RS256"),
        "PS256 header, RS256 signature": lambda issuer: _header_swapped(issuer, alg="PS256"),
        "key id of another key": lambda issuer: issuer.sign(issuer.claims(), kid="second"),
        "key brought along": _with_own_key,
        "key address brought along": lambda issuer: issuer.sign(
            issuer.claims(), key=new_key(), jku="http://127.0.0.1:1/keys", x5u="http://127.0.0.1:1/"
        ),
        "tampered payload": _tampered,
        "signature of another token": lambda issuer: (
            issuer.token(sub="bob").rsplit(".", 1)[0] + "." + issuer.token().rsplit(".", 1)[1]
        ),
    },
    "its issuer has no such key": {
        "RSA signature, elliptic key": lambda issuer: issuer.sign(issuer.claims(), kid="elliptic"),
        "RSA key for ES256": lambda issuer: _header_swapped(issuer, alg="ES256"),
        "unknown key": lambda issuer: issuer.sign(issuer.claims(), kid="nobody"),
        "no key id, several keys": lambda issuer: issuer.sign(issuer.claims(), kid=None),
        "key id a path": lambda issuer: issuer.sign(issuer.claims(), kid="../../etc/passwd"),
    },
    "its issuer is not trusted here": {
        "another issuer": lambda issuer: issuer.token(iss="https://login.example.org/tenant"),
        "issuer with a slash more": lambda issuer: issuer.token(iss=issuer.url + "/"),
        "issuer in capitals": lambda issuer: issuer.token(iss=issuer.url.upper()),
        "issuer a list": lambda issuer: _with_raw_payload(issuer, json.dumps(issuer.claims(iss=[issuer.url])).encode()),
        "no issuer": lambda issuer: issuer.token(iss=None),
    },
    "it is meant for another audience": {
        "another audience": lambda issuer: issuer.token(aud="api://something-else"),
        "audience in part": lambda issuer: issuer.token(aud=AUDIENCE[:-1]),
    },
    "it has no claim 'aud'": {
        "no audience": lambda issuer: issuer.token(aud=None),
        "audience empty": lambda issuer: issuer.token(aud=[]),
    },
    "it is malformed": {
        "key id a number": lambda issuer: _header_swapped(issuer, kid=7),
        "critical extension": lambda issuer: issuer.sign(issuer.claims(), crit=["exp"]),
        "expiry a text": lambda issuer: _with_raw_payload(issuer, json.dumps(issuer.claims(exp="tomorrow")).encode()),
        "expiry infinite": lambda issuer: _with_raw_payload(
            issuer, json.dumps(issuer.claims(exp=0)).replace('"exp": 0', '"exp": 1e999').encode()
        ),
        "subject a number": lambda issuer: _with_raw_payload(issuer, json.dumps(issuer.claims(sub=7)).encode()),
        "signature cut": lambda issuer: issuer.token()[:-9],  # of 86 or 342 characters: what is left is no base64
        "payload a list": lambda issuer: _with_raw_payload(issuer, b"[]"),
        "payload no JSON": lambda issuer: _with_raw_payload(issuer, b"\xff\xfe{"),
        "payload nested deeply": lambda issuer: _with_raw_payload(
            issuer, b'{"iss":' + b"[" * 5000 + b"]" * 5000 + b"}"
        ),
        "header nested deeply": lambda issuer: segment(b'{"alg":' + b"[" * 5000 + b"]" * 5000 + b"}") + ".e30.AAAA",
        "header no JSON": lambda issuer: "AAAA.BBBB.CCCC",
        "empty": lambda issuer: "",
        "dots": lambda issuer: "..",
        "one segment": lambda issuer: "abc",
        "five segments, encrypted": lambda issuer: "e30.e30.e30.e30.e30",
        "garbage": lambda issuer: "%00\x00ä\ud800" * 20,
    },
    "it has expired": {
        "expired": lambda issuer: issuer.token(exp=_now() - 120),
        "expiry true": lambda issuer: _with_raw_payload(issuer, json.dumps(issuer.claims(exp=True)).encode()),
    },
    "it has no claim 'exp'": {
        "no expiry": lambda issuer: issuer.token(exp=None),
    },
    "it is not valid yet": {
        "not valid yet": lambda issuer: issuer.token(nbf=_now() + 600),
        "issued in the future": lambda issuer: issuer.token(iat=_now() + 600),
        "issued a text": lambda issuer: _with_raw_payload(issuer, json.dumps(issuer.claims(iat="now")).encode()),
    },
    "it has no claim 'sub'": {
        "no subject": lambda issuer: issuer.token(sub=None),
    },
    "its claim 'sub' cannot be used": {
        "subject with a line break": lambda issuer: issuer.token(sub="alice\nadmin"),
        "subject very long": lambda issuer: issuer.token(sub="a" * 600),
    },
    "it is too long": {
        "huge": lambda issuer: issuer.token(padding="x" * TOKEN_LENGTH_MAX),
    },
}


@pytest.mark.parametrize(("reason", "name"), [(reason, name) for reason, makers in BAD.items() for name in makers])
def test_a_bad_token_is_refused(reason: str, name: str, issuer: Issuer, verifier: JwtVerifier) -> None:
    token = BAD[reason][name](issuer)
    with pytest.raises(Unauthenticated) as refused:
        verifier.verify(token)
    assert reason in refused.value.message
    assert not token or token not in refused.value.message


GOOD: dict[str, Make] = {
    "as it comes": lambda issuer: issuer.token(),
    "PS256": lambda issuer: issuer.sign(issuer.claims(), "PS256"),
    "ES256": lambda issuer: issuer.sign(issuer.claims(), "ES256", issuer._keys["elliptic"], kid="elliptic"),
    "the key before": lambda issuer: issuer.sign(issuer.claims(), key=issuer._keys["second"], kid="second"),
    "one of several audiences": lambda issuer: issuer.token(aud=["elsewhere", AUDIENCE]),
    "the other audience": lambda issuer: issuer.token(aud="other-audience"),
    "just expired, within the leeway": lambda issuer: issuer.token(exp=_now() - 30),
    "not valid yet, within the leeway": lambda issuer: issuer.token(nbf=_now() + 30, iat=_now() + 30),
    "without nbf and iat": lambda issuer: issuer.token(nbf=None, iat=None),
    "object id instead of a subject": lambda issuer: issuer.token(sub=None, oid="alice"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_token_is_accepted(name: str, issuer: Issuer, verifier: JwtVerifier) -> None:
    caller = verifier.verify(GOOD[name](issuer))
    assert caller.key == f"{issuer.url}|alice"
    assert caller.actions == {Action.READ}


@pytest.mark.parametrize(
    ("claim", "actions"),
    [
        (["reader"], {Action.READ}),
        (["Reader", "EXPORTER"], {Action.READ, Action.EXPORT}),
        ("reader exporter", {Action.READ, Action.EXPORT}),
        ("administrator", set(Action)),
        (["unknown"], set()),
        ([], set()),
        (None, set()),
        ({"reader": True}, set()),
        (["reader", 7, None, ["administrator"]], {Action.READ}),
        ([" administrator "], set()),
        (True, set()),
    ],
)
def test_roles_of_the_claim_grant_actions(
    claim: Any, actions: set[Action], issuer: Issuer, verifier: JwtVerifier
) -> None:
    assert verifier.verify(issuer.token(roles=claim)).actions == actions


def test_each_issuer_vouches_only_for_its_own_tokens(issuer: Issuer) -> None:
    with Issuer() as other:
        verifier = make_verifier(issuer.url, other.url)
        assert verifier.verify(issuer.token(sub="x")).key == f"{issuer.url}|x"
        assert verifier.verify(other.token(sub="x")).key == f"{other.url}|x"
        forged = other.sign(other.claims(iss=issuer.url), kid=issuer.key_id)
        with pytest.raises(Unauthenticated):
            verifier.verify(forged)


@pytest.mark.parametrize(("kind", "algorithm"), [("Ed25519", "EdDSA"), ("P-384", "ES384"), ("P-256", "ES256")])
def test_a_single_key_needs_no_key_id(kind: str, algorithm: str) -> None:
    with Issuer() as issuer:
        issuer.rotate("only", kind, keep=False)
        verifier = make_verifier(issuer.url, algorithms=(algorithm,))
        assert verifier.verify(issuer.sign(issuer.claims(), algorithm, kid=None)).key.endswith("|alice")


@pytest.mark.parametrize("kind", ["RSA1024", "P-384"])
def test_a_weak_key_or_one_of_another_curve_is_not_used(kind: str) -> None:
    with Issuer() as issuer:
        issuer.rotate("only", kind)
        token = f"{segment({'alg': 'ES256' if kind == 'P-384' else 'RS256', 'kid': 'only'})}.{segment(issuer.claims())}"
        if kind == "RSA1024":
            signature = jwt.get_algorithm_by_name("RS256").sign(token.encode(), issuer.key)
        else:
            signature = jwt.get_algorithm_by_name("ES384").sign(token.encode(), issuer.key)
        with pytest.raises(Unauthenticated, match="no such key"):
            make_verifier(issuer.url).verify(f"{token}.{segment(signature)}")


def test_the_claim_that_holds_the_roles_is_a_setting(issuer: Issuer) -> None:
    verifier = JwtVerifier((issuer.url,), (AUDIENCE,), ("RS256",), "groups", 60.0, BUILT_IN_ROLES)
    assert verifier.verify(issuer.token(groups=["exporter"])).actions == {Action.READ, Action.EXPORT}
