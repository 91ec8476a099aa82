"""What is refused before any route sees it: headers that are too large, hosts and web pages that do not belong here,
bodies that stop arriving.

Without sign-in, being on this machine is what lets a caller in, and a browser on this machine runs other people's web
pages. Two checks keep those out. A page whose own name was made to lead to our address (DNS rebinding) sends that
name as Host. A page of another origin that posts blindly (cross-site request forgery) says so in Origin or
Sec-Fetch-Site; tokens would stop it, a browser does not add those by itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicom_depot.config import Settings
from dicom_depot.domain.errors import RequestTimeout
from dicom_depot.web.errors import error_response

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
BODY_BYTES_PER_SECOND_MIN = 1024
"""A body must arrive this fast on average, or its sender could hold a connection for ever, a byte at a time."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")


class GuardMiddleware:
    """Refuses by the request's head; watches its body arrive."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._is_anonymous = not settings.auth_issuers
        public = urlsplit(settings.public_url or "")
        self._public_origin = f"{public.scheme}://{public.netloc}".lower() if public.netloc else None
        self._hosts = (
            LOOPBACK_NAMES | _own_names(settings.host) | ({_host_name(public.netloc)} if public.netloc else set())
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        watch = _Watch(receive, self._settings.body_idle_seconds)
        await self._app(scope, watch.receive, _closing_early(scope, watch, send))

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        size += len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
        if size > self._settings.max_header_bytes:
            return error_response(
                431,
                "HeadersTooLarge",
                f"The request's head is larger than {self._settings.max_header_bytes} bytes "
                "(DICOM_DEPOT_MAX_HEADER_BYTES).",
                None,
                {"Connection": "close"},
            )
        headers = Headers(scope=scope)
        if len(headers.getlist("host")) > 1:
            return error_response(400, "InvalidRequest", "The Host header must be given once.", "Host")
        if self._is_anonymous and not self._settings.allow_anonymous and not self._is_our_host(headers):
            return error_response(
                421,
                "HostNotAllowed",
                "Without sign-in the service answers to loopback names only. Ask localhost, or set "
                "DICOM_DEPOT_PUBLIC_URL to the name that clients use.",
                "Host",
            )
        if self._is_anonymous and scope["method"] not in _SAFE_METHODS and not self._is_our_page(scope, headers):
            return error_response(
                403,
                "OriginNotAllowed",
                "Web pages of other origins may not change anything here. Set DICOM_DEPOT_CORS_ORIGINS to allow one.",
                "Origin",
            )
        return None

    def _is_our_host(self, headers: Headers) -> bool:
        return _host_name(headers.get("host", "")) in self._hosts

    def _is_our_page(self, scope: Scope, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        own = f"{scope['scheme']}://{headers.get('host', '')}".lower()
        return origin.lower() in (own, self._public_origin) or origin in self._settings.cors_origins


def _closing_early(scope: Scope, watch: _Watch, send: Send) -> Send:
    """Say so when an answer comes before its request's body was read: the rest cannot be told from a next request, so
    the server closes the connection, and a client that is not told would send its next request into the void.
    """
    headers = Headers(scope=scope)
    if "transfer-encoding" not in headers and headers.get("content-length", "0").strip() == "0":
        return send

    async def send_closing(message: Message) -> None:
        if message["type"] == "http.response.start" and not watch.is_complete:
            present = {name.lower() for name, _ in message["headers"]}
            if b"connection" not in present:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    return send_closing


class _Watch:
    """Receives a body, and gives up on one that stops or trickles."""

    def __init__(self, receive: Receive, idle_seconds: float) -> None:
        self._receive = receive
        self._idle_seconds = idle_seconds
        self._bytes = 0
        self._waited_seconds = 0.0
        self.is_complete = False

    async def receive(self) -> Message:
        if self.is_complete:
            return await self._receive()
        # Only waiting for the client counts, not what the service does with a body between its pieces.
        earned = self._idle_seconds + self._bytes / BODY_BYTES_PER_SECOND_MIN
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(min(self._idle_seconds, earned - self._waited_seconds)):
                message = await self._receive()
        except TimeoutError:
            self.is_complete = True
            raise RequestTimeout(
                "The body stopped arriving, or arrives too slowly (DICOM_DEPOT_BODY_IDLE_SECONDS).", target="body"
            ) from None
        self._waited_seconds += time.monotonic() - began_at
        self._bytes += len(message.get("body", b""))
        self.is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message


def _own_names(host: str) -> set[str]:
    """How Host names the address that the service listens on, where it is a loopback address; or its name, which was
    checked at the start.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return {host.lower()}
    if not address.is_loopback:
        return set()
    return {f"[{address}]" if address.version == 6 else str(address)}


def _host_name(host: str) -> str | None:
    """The Host header's name in lower case, without its port; None when it is not well-formed."""
    found = _HOST.fullmatch(host)
    return found["name"].lower() if found else None
