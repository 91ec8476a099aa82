"""The public keys of a token issuer: found through its discovery document, kept, and renewed.

An issuer rotates its keys when it likes. A token with an unknown key therefore leads to a new fetch; but tokens are
what strangers send, so there is at most one fetch in a while, whoever asks, and one at a time. When the issuer is
away, the keys that are known go on being good for a while: sign-in survives a short outage, and a key that the issuer
has withdrawn does not live for ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt

from dicom_depot.domain.errors import ServiceUnavailable

_log = logging.getLogger(__name__)

KEEP_SECONDS = 3600.0
"""How long keys are used before they are fetched again."""
STALE_SECONDS = 24 * 3600.0
"""How long keys are used while the issuer cannot be reached."""
PAUSE_SECONDS = 30.0
"""The shortest time between two fetches."""
FETCH_SECONDS = 5.0
DOCUMENT_BYTES_MAX = 512 * 1024
KEYS_MAX = 100
_RSA_BITS_MIN = 2048
_WAITING_MAX = 8
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A key and what it may be used for. `algorithm` is None where the issuer does not say."""

    key_id: str | None
    type: str
    curve: str | None
    algorithm: str | None
    public_key: Any

    def fits(self, algorithm: str) -> bool:
        """Whether the key can have made a signature of this algorithm."""
        if self.algorithm is not None and self.algorithm != algorithm:
            return False
        match algorithm[:2]:
            case "RS" | "PS":
                return self.type == "RSA"
            case "ES":
                return self.type == "EC" and self.curve == _CURVES.get(algorithm)
            case "Ed":
                return self.type == "OKP" and self.curve in ("Ed25519", "Ed448")
            case _:
                return False


class IssuerKeys:
    """The keys of one issuer. Safe for many threads."""

    def __init__(self, issuer: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.issuer = issuer
        self._clock = clock
        self._keys: tuple[IssuerKey, ...] = ()
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(_WAITING_MAX)

    def candidates(self, key_id: str | None, algorithm: str) -> list[IssuerKey]:
        """The keys that a token with this header may be signed with: none or one.

        A token without a key id is accepted only where there is a single key to choose. Raises ServiceUnavailable
        when no keys are known and the issuer does not answer.
        """
        found = self._choose(key_id, algorithm)
        is_due = self._age() > KEEP_SECONDS
        if found and not is_due:
            return found
        if found and self._age() <= STALE_SECONDS:
            # One caller sees to the renewal; the others go on with what is known.
            if self._may_try() and self._turn.acquire(blocking=False):
                try:
                    self._try_fetch()
                finally:
                    self._turn.release()
            return self._choose(key_id, algorithm)
        self._fetch_in_turn()
        if self._age() > STALE_SECONDS:
            raise ServiceUnavailable("The issuer of the token cannot be reached to check it; try again later.")
        return self._choose(key_id, algorithm)

    def _choose(self, key_id: str | None, algorithm: str) -> list[IssuerKey]:
        if key_id is None:
            return [key for key in self._keys if key.fits(algorithm)] if len(self._keys) == 1 else []
        return [key for key in self._keys if key.key_id == key_id and key.fits(algorithm)][:1]

    def _age(self) -> float:
        return float("inf") if self._fetched_at is None else self._clock() - self._fetched_at

    def _may_try(self) -> bool:
        return self._tried_at is None or self._clock() - self._tried_at >= PAUSE_SECONDS

    def _fetch_in_turn(self) -> None:
        """Fetch, or wait for the one who does. Few may wait: a stranger with invented key ids must not hold up the
        threads that others need.
        """
        if not self._may_try() and not self._turn.locked():
            return
        if not self._places.acquire(blocking=False):
            raise ServiceUnavailable("The issuer of the token is slow to answer; try again later.")
        try:
            with self._turn:
                if self._may_try():
                    self._try_fetch()
        finally:
            self._places.release()

    def _try_fetch(self) -> None:
        """The caller has the turn."""
        self._tried_at = self._clock()
        try:
            keys = fetch_keys(self.issuer)
        except (httpx.HTTPError, ValueError, RecursionError, OSError) as error:
            _log.warning("the keys of the issuer %s cannot be fetched: %s", self.issuer, _reason(error))
            return
        self._keys = keys
        self._fetched_at = self._clock()
        _log.info("fetched %d keys of the issuer %s", len(keys), self.issuer)


def fetch_keys(issuer: str) -> tuple[IssuerKey, ...]:
    """Ask the issuer for its keys (OpenID Connect Discovery 1.0 section 4, RFC 7517).

    Raises httpx.HTTPError, ValueError.
    """
    # trust_env: a proxy for outgoing requests is the operator's to set, as for the storage service.
    with httpx.Client(timeout=FETCH_SECONDS, follow_redirects=False) as client:
        document = _get_json(client, issuer.rstrip("/") + "/.well-known/openid-configuration")
        if document.get("issuer") != issuer:
            raise ValueError("its discovery document names another issuer")
        address = document.get("jwks_uri")
        if not isinstance(address, str) or not (_is_https(address) or (_is_local(issuer) and _is_local(address))):
            raise ValueError("its discovery document has no https:// jwks_uri")
        listed = _get_json(client, address).get("keys")
    if not isinstance(listed, list) or len(listed) > KEYS_MAX:
        raise ValueError("its key set is not a list of keys")
    keys = tuple(_usable(listed))
    if not keys:
        raise ValueError("its key set has no key that can check signatures")
    return keys


def _get_json(client: httpx.Client, url: str) -> Mapping[str, Any]:
    give_up_at = time.monotonic() + FETCH_SECONDS
    content = b""
    with client.stream("GET", url, headers={"Accept": "application/json"}) as answer:
        if answer.status_code != httpx.codes.OK:
            raise ValueError(f"it answers {answer.status_code}")
        for block in answer.iter_bytes(16384):
            content += block
            if len(content) > DOCUMENT_BYTES_MAX:
                raise ValueError("its answer is too long")
            if time.monotonic() > give_up_at:
                raise ValueError("its answer takes too long")
    document = json.loads(content)
    if not isinstance(document, dict):
        raise ValueError("its answer is not a JSON object")  # noqa: TRY004  # what was sent is wrong, not our call
    return document


def _is_https(url: str) -> bool:
    return urlsplit(url).scheme == "https"


def _is_local(url: str) -> bool:
    """Whether the URL is http:// on this machine: fit for an issuer there, not for what another issuer names."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname in _LOOPBACK


def _usable(listed: list[Any]) -> Iterator[IssuerKey]:
    """Public signature keys of known kinds. Others, secret (`oct`) ones above all, are left out."""
    for each in listed:
        if not isinstance(each, dict) or each.get("kty") not in ("RSA", "EC", "OKP"):
            continue
        if each.get("use", "sig") != "sig" or "d" in each:
            continue
        key_id, algorithm, curve = each.get("kid"), each.get("alg"), each.get("crv")
        with contextlib.suppress(jwt.PyJWTError, ValueError, TypeError, KeyError):
            # PyJWT wants an algorithm where the key names none; which one makes no difference to the key.
            key = jwt.PyJWK(each, algorithm if isinstance(algorithm, str) else _any_algorithm(each)).key
            if each["kty"] == "RSA" and key.key_size < _RSA_BITS_MIN:
                continue
            yield IssuerKey(
                key_id if isinstance(key_id, str) else None,
                each["kty"],
                curve if isinstance(curve, str) else None,
                algorithm if isinstance(algorithm, str) else None,
                key,
            )


def _any_algorithm(key: Mapping[str, Any]) -> str:
    match key["kty"], key.get("crv"):
        case "RSA", _:
            return "RS256"
        case "OKP", _:
            return "EdDSA"
        case _, curve:
            return next((name for name, known in _CURVES.items() if known == curve), "none of ours")


def _reason(error: Exception) -> str:
    """What failed, without anything that came over the network."""
    return str(error) if type(error) is ValueError else type(error).__name__
