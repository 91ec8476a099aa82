"""A blob endpoint in this process that fails on demand: the Azure Blob REST API as far as an export needs it.

It keeps what it is given in memory and lets a test say which request fails and how. No signatures are
checked, no lists are answered, and nothing here knows the product; for a real server see azurite.py.
"""

import base64
import contextlib
import fnmatch
import hashlib
import itertools
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: close() sends RST instead of FIN
WHOLE_BODY = 1 << 62


@dataclass(frozen=True, slots=True)
class Respond:
    """An error answer as Azure writes it. `after_commit`: the work is done all the same, a late failure."""

    status: int
    code: str = "ServerBusy"
    headers: Mapping[str, str] = field(default_factory=dict)
    after_commit: bool = False


@dataclass(frozen=True, slots=True)
class Reset:
    """RST after that much of the body was read. `after_commit`: all of it is read and its work is done."""

    after_body_bytes: int = 0
    after_commit: bool = False


@dataclass(frozen=True, slots=True)
class Delay:
    """The true answer, later."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hang:
    """No answer at all; the connection ends after `seconds_max` or when the endpoint stops."""

    seconds_max: float = 60.0
    after_commit: bool = False


Action = Respond | Reset | Delay | Hang


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request as a rule sees it. `number` counts, from 1, those that fit the rule's method and blob."""

    method: str
    container: str
    blob: str  # "" for requests about the container itself
    query_keys: frozenset[str]
    number: int
    seconds: float  # since the endpoint started


@dataclass(slots=True)
class Rule:
    """Do `action` for requests that fit. `blob` is a shell pattern; `times` bounds how often it acts."""

    action: Action
    method: str | None = None
    blob: str | None = None
    when: Callable[[Attempt], bool] | None = None
    times: int | None = None
    enabled: bool = True
    seen_count: int = 0
    acted_count: int = 0


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """`status` is None when no answer was sent. Of the query only keys are kept: it holds a signature."""

    method: str
    path: str
    query_keys: tuple[str, ...]
    status: int | None
    time: float  # seconds since the endpoint started


@dataclass(frozen=True, slots=True)
class StoredObject:
    """`put_count` counts every commit under this name, also those before a delete."""

    content: bytes
    content_type: str
    content_md5_header: str | None
    etag: str
    put_count: int
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    container: str
    blob: str
    query: dict[str, str]
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""


def _error(status: int, code: str, headers: Mapping[str, str] | None = None) -> _Answer:
    content = (
        f'\ufeff<?xml version="1.0" encoding="utf-8"?><Error><Code>{escape(code)}</Code>'
        f"<Message>Injected or refused by the test endpoint.</Message></Error>"
    ).encode()
    return _Answer(status, {"Content-Type": "application/xml", "x-ms-error-code": code, **(headers or {})}, content)


class FaultEndpoint:
    """`with FaultEndpoint() as endpoint:` listens on a free port of 127.0.0.1. All methods are thread-safe.

    `objects` is keyed by "container/blob"; any account and container exists.
    """

    def __init__(self, https: tuple[Path, Path] | None = None) -> None:
        """https: certificate and key, both PEM files, to listen with TLS."""
        self.objects: dict[str, StoredObject] = {}
        self.requests: list[RequestRecord] = []
        self._blocks: dict[str, dict[str, bytes]] = {}
        self._commit_counts: Counter[str] = Counter()
        self._etag_numbers = itertools.count(1)
        self._rules: list[Rule] = []
        self._outage: Action | None = None
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._started_at = time.monotonic()
        self._server = _Server(self, https)
        self._scheme = "http" if https is None else "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuses new connections, cuts the open ones and wakes what hangs."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_connections()
        self._thread.join(timeout=5)

    @property
    def account_url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}/account"

    def container_url(self, container: str, sas: str | None = "sv=x&sig=secret") -> str:
        url = f"{self.account_url}/{container}"
        return url if sas is None else f"{url}?{sas}"

    def read_tree(self, container: str, prefix: str = "") -> dict[str, bytes]:
        """Every blob of the container whose name starts with `prefix`, by its full name."""
        with self._lock:
            stored = {name.partition("/"): kept.content for name, kept in self.objects.items()}
        return {
            blob: content for (of, _, blob), content in stored.items() if of == container and blob.startswith(prefix)
        }

    # Faults

    def add_rule(self, rule: Rule) -> Rule:
        """Rules are asked in the order they were added; the first that fits acts. `rule.enabled` switches."""
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear_rules(self) -> None:
        with self._lock:
            self._rules.clear()

    def set_outage(self, on: bool, action: Action | None = None) -> None:
        """While on, every request meets `action` (503 ServerBusy unless told), before any rule is asked."""
        with self._lock:
            self._outage = (action or Respond(503)) if on else None

    @contextlib.contextmanager
    def outage(self, action: Action | None = None) -> Iterator[None]:
        self.set_outage(True, action)
        try:
            yield
        finally:
            self.set_outage(False)

    def _action_for(self, request: _Request) -> Action | None:
        with self._lock:
            if self._outage is not None:
                return self._outage
            for rule in self._rules:
                if not rule.enabled or rule.method not in (None, request.method):
                    continue
                if rule.blob is not None and not fnmatch.fnmatchcase(request.blob, rule.blob):
                    continue
                rule.seen_count += 1
                if rule.times is not None and rule.acted_count >= rule.times:
                    continue
                keys = frozenset(request.query)
                seconds = self._seconds()
                attempt = Attempt(request.method, request.container, request.blob, keys, rule.seen_count, seconds)
                if rule.when is None or rule.when(attempt):
                    rule.acted_count += 1
                    return rule.action
        return None

    def _seconds(self) -> float:
        return time.monotonic() - self._started_at

    def _record(self, request: _Request, status: int | None) -> None:
        keys = tuple(request.query)
        with self._lock:
            self.requests.append(RequestRecord(request.method, request.path, keys, status, self._seconds()))

    # The service

    def _serve(self, request: _Request, body: bytes) -> _Answer:
        with self._lock:
            if request.query.get("comp") == "batch":
                return self._delete_batch(body)
            if request.query.get("restype") == "container" and "comp" not in request.query:
                status = {"PUT": 201, "DELETE": 202}.get(request.method, 200)
                return _Answer(status, {"ETag": '"0x1"', "Last-Modified": formatdate(usegmt=True)})
            if not request.blob:
                return _error(400, "InvalidUri")
            name = f"{request.container}/{request.blob}"
            match request.method, request.query.get("comp"):
                case "PUT", None:
                    if request.headers.get("x-ms-blob-type") != "BlockBlob":
                        return _error(400, "InvalidHeaderValue")
                    return self._commit(request, name, body)
                case "PUT", "block":
                    self._blocks.setdefault(name, {})[request.query.get("blockid", "")] = body
                    return _Answer(201)
                case "PUT", "blocklist":
                    return self._commit_blocks(request, name, body)
                case "GET" | "HEAD", None:
                    return self._read(request, name)
                case "DELETE", None:
                    if name not in self.objects:
                        return _error(404, "BlobNotFound")
                    if refusal := self._unmet_condition(request, name):
                        return refusal
                    del self.objects[name]
                    return _Answer(202)
        return _error(501, "NotImplemented")

    def _delete_batch(self, body: bytes) -> _Answer:
        """How obstore deletes, even a single blob: each part of the body is a DELETE request of its own."""
        parts: list[str] = []
        for number, path in enumerate(re.findall(rb"^DELETE (\S+) HTTP/1.1", body, re.MULTILINE)):
            # Clients name the account in a sub-request or not.
            target = unquote(urlsplit(path.decode()).path).lstrip("/")
            name = target if target in self.objects else target.partition("/")[2]
            outcome = "202 Accepted" if self.objects.pop(name, None) else "404 Not Found"
            parts.append(
                f"--batchresponse\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
                f"HTTP/1.1 {outcome}\r\nContent-Length: 0\r\n\r\n"
            )
        content = "".join([*parts, "--batchresponse--"]).encode()
        return _Answer(202, {"Content-Type": "multipart/mixed; boundary=batchresponse"}, content)

    def _unmet_condition(self, request: _Request, name: str) -> _Answer | None:
        stored = self.objects.get(name)
        if (wanted := request.headers.get("If-Match")) and (stored is None or wanted not in ("*", stored.etag)):
            return _error(412, "ConditionNotMet")
        if stored is not None and (unwanted := request.headers.get("If-None-Match")):
            if unwanted == "*":
                return _error(409, "BlobAlreadyExists")
            if unwanted == stored.etag:
                return _error(412, "ConditionNotMet")
        return None

    def _commit_blocks(self, request: _Request, name: str, body: bytes) -> _Answer:
        staged = self._blocks.get(name, {})
        ids = re.findall(r"<(?:Latest|Uncommitted)>([^<]*)</", body.decode())
        if any(block_id not in staged for block_id in ids):
            return _error(400, "InvalidBlockList")
        return self._commit(request, name, b"".join(staged[block_id] for block_id in ids))

    def _commit(self, request: _Request, name: str, content: bytes) -> _Answer:
        if refusal := self._unmet_condition(request, name):
            return refusal
        headers = request.headers
        whole_blob = "comp" not in request.query
        md5 = headers.get("x-ms-blob-content-md5") or (headers.get("Content-MD5") if whole_blob else None)
        actual_md5 = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        if whole_blob and md5 not in (None, actual_md5):
            return _error(400, "Md5Mismatch")
        own_type = headers.get("x-ms-blob-content-type")
        content_type = own_type or (headers.get("Content-Type") if whole_blob else None)
        metadata = {key.lower()[10:]: headers[key] for key in headers if key.lower().startswith("x-ms-meta-")}
        self._commit_counts[name] += 1
        self._blocks.pop(name, None)
        self.objects[name] = StoredObject(
            content,
            content_type or "application/octet-stream",
            md5,
            f'"0x{next(self._etag_numbers):X}"',
            self._commit_counts[name],
            metadata,
        )
        return _Answer(
            201,
            {
                "ETag": self.objects[name].etag,
                "Last-Modified": formatdate(usegmt=True),
                "Content-MD5": actual_md5,
            },
        )

    def _read(self, request: _Request, name: str) -> _Answer:
        stored = self.objects.get(name)
        if stored is None:
            return _error(404, "BlobNotFound")
        headers = {
            "ETag": stored.etag,
            "Last-Modified": formatdate(usegmt=True),
            "Content-Type": stored.content_type,
            "x-ms-blob-type": "BlockBlob",
            **({"Content-MD5": stored.content_md5_header} if stored.content_md5_header else {}),
            **{f"x-ms-meta-{key}": value for key, value in stored.metadata.items()},
        }
        total = len(stored.content)
        asked = re.fullmatch(
            r"bytes=(\d+)-(\d*)", request.headers.get("x-ms-range") or request.headers.get("Range") or ""
        )
        if asked is None:
            return _Answer(200, headers, stored.content)
        first = int(asked[1])
        if first >= total:
            return _error(416, "InvalidRange")
        last = min(int(asked[2] or total), total - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        return _Answer(206, headers, stored.content[first : last + 1])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a handler may hang on purpose
    request_queue_size = 128

    def __init__(self, endpoint: FaultEndpoint, https: tuple[Path, Path] | None) -> None:
        self.endpoint = endpoint
        self._tls: ssl.SSLContext | None = None
        if https is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*https)
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._tls is not None:  # the handshake comes with the first read, in the connection's own thread
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == RESET_ON_CLOSE:
            request.close()  # a shutdown first would send FIN, and the client would see a clean end
        else:
            super().shutdown_request(request)

    def cut_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what fault tests are about: no traceback on stderr."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one segment
    server: _Server

    def handle_expect_100(self) -> bool:
        proceed = super().handle_expect_100()
        self.wfile.flush()
        return proceed

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class names it)
        """Nothing: the base class would print the request line with the signature in it."""

    def _answer_request(self) -> None:
        url = urlsplit(self.path)
        _, _, container, blob = [*unquote(url.path).split("/", 3), "", "", ""][:4]
        headers = cast("Mapping[str, str]", self.headers)  # what it is but for its declared base class
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        request = _Request(self.command, unquote(url.path), container, blob, query, headers)
        endpoint = self.server.endpoint
        action = endpoint._action_for(request)
        if isinstance(action, Reset) and not action.after_commit:
            self._read_body(action.after_body_bytes)
            self._cut(request, reset=True)
            return
        body = self._read_body(WHOLE_BODY)
        if isinstance(action, Delay):
            endpoint._stopped.wait(action.seconds)
        if action is None or isinstance(action, Delay) or action.after_commit:
            answer = endpoint._serve(request, body)
        match action:
            case None | Delay():
                self._send(request, answer)
            case Respond():
                self._send(request, _error(action.status, action.code, action.headers))
            case Hang():
                self._cut(request, reset=False)  # recorded now: the client may give up and look at the log
                endpoint._stopped.wait(action.seconds_max)
            case Reset():
                self._cut(request, reset=True)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _answer_request  # noqa: N815  (the base class's)

    def _read_body(self, bytes_max: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            wanted = min(int(self.headers.get("Content-Length") or 0), bytes_max)
            body = self.rfile.read(wanted)
            if len(body) < wanted:
                raise ConnectionAbortedError("the client left within a body, which must not be kept")
            return body
        parts: list[bytes] = []
        while sum(map(len, parts)) < bytes_max:
            size = int(self.rfile.readline().split(b";")[0], 16)
            parts.append(self.rfile.read(size))
            if not self.rfile.readline():
                raise ConnectionAbortedError("the client left within a body, which must not be kept")
            # That line was the end of the chunk, or the empty trailer after the last one.
            if size == 0:
                break
        return b"".join(parts)

    def _cut(self, request: _Request, *, reset: bool) -> None:
        self.server.endpoint._record(request, None)
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.close_connection = True

    def _send(self, request: _Request, answer: _Answer) -> None:
        # Recorded first, so that a client that has its answer also finds it in the log.
        self.server.endpoint._record(request, answer.status)
        self.send_response(answer.status)
        self.send_header("x-ms-request-id", "00000000-0000-0000-0000-000000000000")
        self.send_header("x-ms-version", "2021-08-06")
        self.send_header("Content-Length", str(len(answer.content)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)
