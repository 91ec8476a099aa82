"""A stand-in for what gives tokens to a host's identity: App Service, the metadata service of virtual machines, and the
token endpoint of Entra ID for workload identity. The tokens are signed by nobody; Azurite takes them all the same.

It counts requests, and gives tokens of any lifetime, audience and principal, or none, as a test says.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

TENANT = "72f988bf-0000-4000-8000-2d7cd011db47"
CLIENT = "11111111-0000-4000-8000-000000000001"
PRINCIPAL = "33333333-0000-4000-8000-000000000003"
STORAGE = "https://storage.azure.com"

APP_SERVICE_PATH = "/msi/token"
IMDS_PATH = "/metadata/identity/oauth2/token"
WORKLOAD_PATH = f"/{TENANT}/oauth2/v2.0/token"
HEADER = "the-secret-of-app-service"
ASSERTION = "the-token-of-the-service-account"


class IdentityEndpoint:
    """`with IdentityEndpoint() as endpoint:` listens on a free port of 127.0.0.1; with a certificate by TLS."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.requests: Counter[str] = Counter()
        """Requests by path."""
        self.tokens: list[str] = []
        """Every token that was given."""
        self.lifetime_seconds = 3600.0
        self.claimed_lifetime_seconds: float | None = None
        """What the answer says beside the token, where that differs."""
        self.audience = STORAGE
        self.principal_id = PRINCIPAL
        self.client_id: str | None = None
        """Of the one user-assigned identity that there is; None: the system-assigned one."""
        self.is_enabled = True
        self.delay_seconds = 0.0
        self._is_secure = certificate is not None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
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
        return f"{'https' if self._is_secure else 'http'}://127.0.0.1:{self._server.server_address[1]}"

    @property
    def request_count(self) -> int:
        return self.requests.total()

    def app_service_variables(self) -> dict[str, str]:
        """What App Service sets for an app."""
        return {"IDENTITY_ENDPOINT": f"{self.url}{APP_SERVICE_PATH}", "IDENTITY_HEADER": HEADER}

    def imds_variables(self) -> dict[str, str]:
        """What moves the metadata service of virtual machines here."""
        return {"AZURE_POD_IDENTITY_AUTHORITY_HOST": self.url}

    def workload_variables(self, token_file: Path) -> dict[str, str]:
        """What AKS sets for a pod. Needs TLS."""
        token_file.write_text(ASSERTION)
        return {
            "AZURE_TENANT_ID": TENANT,
            "AZURE_CLIENT_ID": CLIENT,
            "AZURE_FEDERATED_TOKEN_FILE": str(token_file),
            "AZURE_AUTHORITY_HOST": self.url,
        }

    def new_token(self) -> tuple[str, int]:
        """A token and the time, in seconds since the epoch, at which the answer says that it ends."""
        now = time.time()
        claims = {
            "aud": self.audience,
            "iss": f"https://sts.windows.net/{TENANT}/",
            "iat": int(now) - 60,
            "nbf": int(now) - 60,
            "exp": int(now + self.lifetime_seconds),
            "oid": self.principal_id,
            "tid": TENANT,
            "appid": CLIENT,
            "jti": f"{len(self.tokens)}-{now}",
        }
        token = ".".join([_segment({"alg": "none", "typ": "JWT"}), _segment(claims), _segment("no signature at all")])
        self.tokens.append(token)
        claimed = self.lifetime_seconds if self.claimed_lifetime_seconds is None else self.claimed_lifetime_seconds
        return token, int(now + claimed)

    def _answer(self, path: str, query: dict[str, str], headers: Any, form: dict[str, str]) -> tuple[int, Any]:
        time.sleep(self.delay_seconds)
        match path:
            case _ if path == APP_SERVICE_PATH:
                if headers.get("X-IDENTITY-HEADER") != HEADER:
                    return 401, {"statusCode": 401, "message": "Unauthorized"}
                if not self._has_identity(query):
                    return 400, {"statusCode": 400, "message": "No managed identity was found for the app."}
                return 200, self._given(query["resource"], expires_as_text=True)
            case _ if path == IMDS_PATH:
                if headers.get("Metadata") != "true":
                    return 400, {"error": "invalid_request", "error_description": "Required metadata header missing"}
                if not self._has_identity(query):
                    return 400, {"error": "invalid_request", "error_description": "Identity not found"}
                return 200, self._given(query["resource"], expires_as_text=True)
            case _ if path == WORKLOAD_PATH:
                if not self.is_enabled or form.get("client_assertion") != ASSERTION:
                    message = "AADSTS700213: No matching federated identity record found for presented assertion."
                    return 401, {"error": "invalid_client", "error_description": message}
                return 200, self._given(STORAGE, expires_as_text=False)
            case _:
                return 404, {"error": "not_found"}

    def _has_identity(self, query: dict[str, str]) -> bool:
        return self.is_enabled and query.get("client_id") == self.client_id

    def _given(self, resource: str, *, expires_as_text: bool) -> dict[str, Any]:
        token, expires_on = self.new_token()
        expires_in = expires_on - int(time.time())
        shown = (str(expires_on), str(expires_in)) if expires_as_text else (expires_on, expires_in)
        return {
            "access_token": token,
            "expires_on": shown[0],
            "expires_in": shown[1],
            "resource": resource,
            "token_type": "Bearer",
        }


def _segment(content: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def _handler(endpoint: IdentityEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            endpoint.requests[url.path] += 1
            length = int(self.headers.get("Content-Length") or 0)
            form = _single(self.rfile.read(length).decode())
            status, answer = endpoint._answer(url.path, _single(url.query), self.headers, form)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815  (the base class's name)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class names it)
            """Nothing."""

    return Handler


def _single(query: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(query).items()}
