"""A stand-in token issuer: discovery document, key set, and tokens of any kind, good and forged. It checks nothing.

Keys rotate, requests are counted, and the issuer goes away and comes back, as a test says.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

AUDIENCE = "api://dicom-depot-test"
DISCOVERY = "/.well-known/openid-configuration"
KEY_SET = "/keys"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def new_key(kind: str = "RSA") -> PrivateKey:
    match kind:
        case "RSA":
            return rsa.generate_private_key(65537, 2048)
        case "RSA1024":
            return rsa.generate_private_key(65537, 1024)  # noqa: S505  # the weak key that must be refused
        case "Ed25519":
            return ed25519.Ed25519PrivateKey.generate()
        case "P-384":
            return ec.generate_private_key(ec.SECP384R1())
        case _:
            return ec.generate_private_key(ec.SECP256R1())


def public_jwk(key: PrivateKey, key_id: str | None) -> dict[str, Any]:
    """The key as a key set lists it."""
    match key:
        case rsa.RSAPrivateKey():
            content = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case ec.EllipticCurvePrivateKey():
            content = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case _:
            content = jwt.algorithms.OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    content.pop("key_ops", None)
    return content | {"use": "sig"} | ({} if key_id is None else {"kid": key_id})


def segment(content: Any) -> str:
    """base64url without padding; dictionaries as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class Issuer:
    """`with Issuer() as issuer:` listens on a free port of 127.0.0.1."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        """certificate: PEM files of certificate and key, to listen with TLS."""
        self.requests: Counter[str] = Counter()
        self.is_away = False
        self.delay_seconds = 0.0
        self.overrides: dict[str, Any] = {}
        """What the discovery document or the key set says instead, by path: bytes, or an object for JSON."""
        self._keys: dict[str, PrivateKey] = {"first": new_key()}
        self._current = "first"
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}/tenant"

    @property
    def key_id(self) -> str:
        return self._current

    @property
    def key(self) -> PrivateKey:
        return self._keys[self._current]

    def rotate(self, key_id: str, kind: str = "RSA", *, keep: bool = True) -> None:
        """Sign with a new key from now on. keep: the old ones stay in the key set."""
        with self._lock:
            if not keep:
                self._keys.clear()
            self._keys[key_id] = new_key(kind)
            self._current = key_id

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Good claims, with changes; a claim that is changed to None is left out."""
        now = int(time.time())
        claims: dict[str, Any] = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "alice",
            "iat": now,
            "nbf": now,
            "exp": now + 3600,
            "roles": ["reader"],
        }
        return {name: value for name, value in (claims | changes).items() if value is not None}

    def token(self, *roles: str, **changes: Any) -> str:
        """A good token for these roles, with changed claims."""
        if roles:
            changes["roles"] = list(roles)
        return self.sign(self.claims(**changes))

    def sign(
        self,
        claims: dict[str, Any],
        algorithm: str = "RS256",
        key: PrivateKey | None = None,
        **headers: Any,
    ) -> str:
        given = {"kid": self.key_id} | headers
        return jwt.encode(
            claims,
            key or self.key,
            algorithm,
            headers={name: value for name, value in given.items() if value is not None},
        )

    def unsigned(self, claims: dict[str, Any], algorithm: str = "none") -> str:
        return f"{segment({'alg': algorithm, 'typ': 'JWT', 'kid': self.key_id})}.{segment(claims)}."

    def signed_with_public_key(self, claims: dict[str, Any], encoding: str = "PEM") -> str:
        """HS256 with the public key as the secret: what a checker that believes `alg` would accept."""
        secret = self.key.public_key().public_bytes(
            getattr(serialization.Encoding, encoding), serialization.PublicFormat.SubjectPublicKeyInfo
        )
        signed = f"{segment({'alg': 'HS256', 'typ': 'JWT', 'kid': self.key_id})}.{segment(claims)}"
        return f"{signed}.{segment(hmac.digest(secret, signed.encode(), hashlib.sha256))}"

    def answer(self, path: str) -> bytes | None:
        """The document at a path; None where there is none."""
        place = path.removeprefix("/tenant")
        with self._lock:
            self.requests[place] += 1
            if place in self.overrides:
                content = self.overrides[place]
            elif place == DISCOVERY:
                content = {"issuer": self.url, "jwks_uri": f"{self.url}{KEY_SET}"}
            elif place == KEY_SET:
                content = {"keys": [public_jwk(key, key_id) for key_id, key in self._keys.items()]}
            else:
                return None
        return content if isinstance(content, bytes) else json.dumps(content).encode()


def _handler(issuer: Issuer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(issuer.delay_seconds)
            if issuer.is_away:
                issuer.requests["away"] += 1
                self.close_connection = True
                return
            content = issuer.answer(self.path)
            redirect = issuer.overrides.get("redirect") if self.path.endswith(DISCOVERY) else None
            self.send_response(404 if content is None else 302 if redirect else 200)
            if redirect:
                self.send_header("Location", redirect)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content or b"")

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
