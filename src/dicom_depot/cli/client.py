"""The export API as commands use it: requests, answers, polling. Prints nothing; `cli.progress` shows.

Messages made here hold the service's address without user and password, and never a part of a request's body.
"""

from __future__ import annotations

import ipaddress
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from dicom_depot.config import PREFIX, Settings
from dicom_depot.domain.errors import DepotError, InvalidRequest
from dicom_depot.domain.operation import OperationError, OperationStatus

_T = TypeVar("_T")

TOKEN_VARIABLE = PREFIX + "TOKEN"
OUTAGE_SECONDS_MAX = 60.0
"""How long a watch bears a service that does not answer."""

_RETRY_SECONDS = 1.0
_PAUSE_SECONDS = 1.0
_PAUSE_SECONDS_MAX = 30.0
_CONNECT_SECONDS = 10.0
_READ_SECONDS = 30.0
_START_SECONDS = 300.0
"""A start proves that the destination can be written, and a dry run counts: both may take a while."""
_START_TRIES = 3
_PAGE_MAX = 200
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_AWAY = frozenset({502, 503, 504})
_ENDED = frozenset(str(status) for status in OperationStatus if status.is_terminal)


class ServiceUnreachable(DepotError):
    """The service does not answer, or something before it says that it is away."""

    code = "ServiceUnreachable"

    def __init__(self, message: str, *, retry_after_seconds: float = _RETRY_SECONDS) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class RequestRefused(DepotError):
    """The service answered with an error; `code`, `message` and `target` are the service's."""

    def __init__(self, status: int, code: str, message: str, target: str | None) -> None:
        super().__init__(message, target=target)
        self.status = status
        self.code = code


class OperationReference(NamedTuple):
    """A started operation: its id, and where its state can be read."""

    id: str
    href: str


@dataclass(frozen=True, slots=True)
class OperationReport:
    """What is known of an operation. `body` is the API's answer as it came, for `--json`."""

    id: str
    status: str
    created_at: datetime
    updated_at: datetime
    percent_complete: int
    exported: int
    skipped: int
    total: int
    bytes_exported: int
    log_href: str
    error: OperationError | None
    body: Mapping[str, Any]

    @property
    def is_ended(self) -> bool:
        return self.status in _ENDED

    @staticmethod
    def parse(body: Mapping[str, Any]) -> OperationReport:
        """Read the API's answer; members that this version does not know are left alone. Raises KeyError, ValueError,
        TypeError when it is none.
        """
        results, error = body.get("results", _NO_RESULTS), body.get("error")
        return OperationReport(
            id=str(body["operationId"]),
            status=str(body["status"]),
            created_at=datetime.fromisoformat(body["createdTime"]),
            updated_at=datetime.fromisoformat(body["lastUpdatedTime"]),
            percent_complete=int(body["percentComplete"]),
            exported=int(results["exported"]),
            skipped=int(results["skipped"]),
            total=int(results["total"]),
            bytes_exported=int(results["bytes"]),
            log_href=str(results["errorHref"]),
            error=None if error is None else OperationError(str(error["code"]), str(error["message"])),
            body=body,
        )


_NO_RESULTS = {"exported": 0, "skipped": 0, "total": 0, "bytes": 0, "errorHref": ""}
"""Of operations that export nothing."""


class ServiceClient:
    """Talks to one running service. Raises ServiceUnreachable and RequestRefused."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None, *, token: str | None = None) -> None:
        """url: the base, e.g. http://127.0.0.1:8080. token: a bearer token, for a service that asks for one.

        Raises InvalidRequest when the base or the token is none, or the token would go over the network unencrypted.
        """
        base = _parse_base(url)
        token = None if token is None else _parse_token(token)
        if token is not None and base.scheme != "https" and not _is_loopback(base.host):
            raise InvalidRequest("An access token goes over https:// only.", target="--service")
        self._base = str(base).rstrip("/")
        self.shown_url = str(base.copy_with(userinfo=b"")).rstrip("/")
        self._http = httpx.Client(
            timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            trust_env=not _is_loopback(base.host),  # a proxy of the environment cannot reach this machine's own ports
            verify=httpx.create_ssl_context(),  # with the environment's SSL_CERT_FILE, if it names one
            transport=transport,
        )

    def close(self) -> None:
        self._http.close()

    def start(self, body: Mapping[str, Any], idempotency_key: str | None = None) -> OperationReference:
        """Start an export. A request whose answer was lost is sent again, with the same key: it starts only once."""
        key = idempotency_key or uuid.uuid4().hex
        for left in reversed(range(_START_TRIES)):
            try:
                answer = self._send("POST", "/v2/export", _START_SECONDS, json=body, headers={"Idempotency-Key": key})
                break
            except _AnswerLost:
                if not left:
                    raise
                time.sleep(_RETRY_SECONDS)
        return self._read(answer, lambda content: OperationReference(str(content["id"]), str(content["href"])))

    def dry_run(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Count what an export would copy now: `count`, `bytes`, `unmatched`."""
        answer = self._send("POST", "/v2/export", _START_SECONDS, json=body, params={"dryRun": "true"})
        return self._read(answer, lambda content: {name: content[name] for name in ("count", "bytes", "unmatched")})

    def get(self, operation_id: str) -> OperationReport:
        """The operation as it is now."""
        return self._poll(operation_id)[0]

    def page(self, status: str | None, limit: int) -> list[OperationReport]:
        """The newest operations, at most `limit`. status: words of the API, comma separated."""
        found: list[OperationReport] = []
        token: str | None = None
        while True:
            wanted = {"limit": min(limit - len(found), _PAGE_MAX), "status": status, "continuationToken": token}
            params = {name: value for name, value in wanted.items() if value is not None}
            answer = self._send("GET", "/v2/operations", params=params)
            reports, token = self._read(answer, _parse_page)
            found += reports
            if token is None or len(found) >= limit:
                return found

    def cancel(self, operation_id: str) -> OperationReport:
        """Order the operation to stop. Raises RequestRefused (409) when it has ended otherwise."""
        answer = self._send("POST", f"/v2/operations/{quote(operation_id, safe='')}/cancel")
        return self._read(answer, OperationReport.parse)

    def resume(self, operation_id: str, destination: Mapping[str, Any] | None = None) -> OperationReport:
        """Let a failed or canceled operation go on. destination: the same once more, where its secret was erased."""
        path = f"/v2/operations/{quote(operation_id, safe='')}/resume"
        body = {} if destination is None else {"json": {"destination": destination}}
        return self._read(self._send("POST", path, _START_SECONDS, **body), OperationReport.parse)

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """The answer to any other request."""
        return self._read(self._send(method, path, _READ_SECONDS * 2, json=body), dict)

    def watch(
        self, operation_id: str, on_report: Callable[[OperationReport], None], say: Callable[[str], None]
    ) -> OperationReport:
        """Poll, as often as the service asks for, until the operation has ended.

        A service that does not answer is waited for, for `OUTAGE_SECONDS_MAX`; `say` gets a sentence about it.
        """
        away_since: float | None = None
        while True:
            try:
                report, pause_seconds = self._poll(operation_id)
            except ServiceUnreachable as error:
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    say(f"{self.shown_url} does not answer; trying again for {OUTAGE_SECONDS_MAX:.0f} s.")
                if now - away_since >= OUTAGE_SECONDS_MAX:
                    raise ServiceUnreachable(
                        f"{error.message} The operation is not lost: it goes on once the service runs again. "
                        f"Then: dicom-depot operations watch {operation_id}"
                    ) from None
                time.sleep(error.retry_after_seconds)
                continue
            if away_since is not None:
                away_since = None
                say(f"{self.shown_url} answers again.")
            on_report(report)
            if report.is_ended:
                return report
            time.sleep(pause_seconds)

    def _poll(self, operation_id: str) -> tuple[OperationReport, float]:
        answer = self._send("GET", f"/v2/operations/{quote(operation_id, safe='')}")
        return self._read(answer, OperationReport.parse), _retry_after(answer, _PAUSE_SECONDS)

    def _send(self, method: str, path: str, seconds: float = _READ_SECONDS, **request: Any) -> httpx.Response:
        try:
            answer = self._http.request(
                method, self._base + path, timeout=httpx.Timeout(seconds, connect=_CONNECT_SECONDS), **request
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
            raise ServiceUnreachable(
                f"The service at {self.shown_url} cannot be reached ({_reason(error)}). Is `dicom-depot serve` running "
                f"there? --service or {PREFIX}PUBLIC_URL names another address."
            ) from None
        except httpx.RequestError as error:
            raise _AnswerLost(
                f"The service at {self.shown_url} did not answer ({_reason(error)}). Its log may tell why."
            ) from None
        if answer.status_code in _AWAY:
            code, message, _ = _error_of(answer)
            raise ServiceUnreachable(
                f"The service at {self.shown_url} cannot answer now (status {answer.status_code} {code}): {message}",
                retry_after_seconds=_retry_after(answer, _RETRY_SECONDS),
            )
        if answer.status_code >= 400:
            code, message, target = _error_of(answer)
            if answer.status_code == 401:
                message += f" Put an access token for this service into {TOKEN_VARIABLE}."
            raise RequestRefused(answer.status_code, code, message, target)
        return answer

    def _read(self, answer: httpx.Response, parse: Callable[[Any], _T]) -> _T:
        try:
            return parse(answer.json())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RequestRefused(
                502,
                "AnswerNotUnderstood",
                f"{self.shown_url} answered with status {answer.status_code} and something that this command does not "
                "understand. Is it the address of a DICOM Depot service?",
                None,
            ) from None


class _AnswerLost(ServiceUnreachable):
    """The request was sent, and may have been carried out."""


def service_url(given: str | None, settings: Settings) -> str:
    """Where the service is: what was given, the public URL, or the address that `serve` listens on."""
    if given is not None:
        return given
    if settings.public_url is not None:
        return settings.public_url
    if settings.port == 0:
        raise InvalidRequest(f"The service's port is not known ({PREFIX}PORT is 0): give its address with --service.")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104  (it is replaced)
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"


def _parse_base(url: str) -> httpx.URL:
    try:
        urlsplit(url)  # stricter than httpx in what brackets may hold
        parsed = httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise InvalidRequest("The address of the service must look like http://host[:port].", target="--service")
    return parsed


def _parse_token(text: str) -> str:
    token = text.strip()
    if not _TOKEN.fullmatch(token):
        raise InvalidRequest(
            f"{TOKEN_VARIABLE} (or --token) is no access token: it may hold letters, digits and ._~+/- only, on one "
            "line, without `Bearer` before it.",
            target="--token",
        )
    return token


def _parse_page(content: Any) -> tuple[list[OperationReport], str | None]:
    return [OperationReport.parse(state) for state in content["operations"]], content.get("continuationToken")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after(answer: httpx.Response, otherwise: float) -> float:
    text = answer.headers.get("retry-after", "")
    return min(float(text), _PAUSE_SECONDS_MAX) if text.isdecimal() and text.isascii() else otherwise


def _error_of(answer: httpx.Response) -> tuple[str, str, str | None]:
    """Code, message and target of an error's body; something before the service may answer otherwise."""
    try:
        body = answer.json()
        return str(body["code"]), str(body["message"]), body.get("target")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "HttpError", f"The answer had status {answer.status_code} and no explanation.", None


def _reason(error: httpx.RequestError) -> str:
    """What failed. The text of a LocalProtocolError may hold a header, and that the token."""
    is_secret = isinstance(error, httpx.LocalProtocolError)
    return type(error).__name__ if is_secret else str(error) or type(error).__name__
