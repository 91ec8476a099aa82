"""One audit line for each request that touches data, and a request id for each request.

What a line says is collected while the request is answered: the access check names caller and action, the route adds
what it did. A line names the route's template, never the path: paths can hold UIDs.
"""

from __future__ import annotations

import functools
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from anyio import CancelScope
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicom_depot.domain.access import Action, Caller
from dicom_depot.telemetry import REQUEST_ID

_KEY = "dicom_depot.trail"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_REFUSALS = frozenset({401, 403, 421})


@dataclass(slots=True)
class RequestTrail:
    """What the audit line of one request says beside its frame. `details`: operation id, counts and the like."""

    caller: Caller | None = None
    action: Action | None = None
    details: dict[str, object] = field(default_factory=dict)


def trail_of(scope: Scope) -> RequestTrail:
    """The trail of the request that is being answered."""
    trail: RequestTrail = scope.setdefault(_KEY, RequestTrail())
    return trail


class TrailMiddleware:
    """Gives each request its id, and writes its audit line when it has been answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _accepted(Headers(scope=scope).get("x-request-id"))
        token = REQUEST_ID.set(request_id)
        started_at = time.monotonic()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        trail = trail_of(scope)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if trail.action is not None or status in _REFUSALS:
                with CancelScope(shield=True):  # a client that goes away does not take its line with it
                    await _record(scope, trail, status, time.monotonic() - started_at)
            REQUEST_ID.reset(token)


async def _record(scope: Scope, trail: RequestTrail, status: int, seconds: float) -> None:
    context = getattr(scope["app"].state, "context", None) if "app" in scope else None
    if context is None:
        return
    route: Any = scope.get("route")
    client = scope.get("client")
    frame: dict[str, object] = {
        "caller": None if trail.caller is None else trail.caller.key,
        "address": None if client is None else client[0],
        "method": scope["method"],
        "route": None if route is None or trail.action is None else _template(scope["path"], route.path),
        "action": trail.action,
        "status": status,
        "duration_ms": round(seconds * 1000),
        "outcome": "allowed" if status < 400 else "refused" if status in _REFUSALS else "failed",
    }
    await context.lines.put(functools.partial(context.audit.record, "request", **(trail.details | frame)))


def _template(path: str, template: str) -> str:
    """Routes are included once for each version; their templates do not say which one was asked."""
    version = path[:4].lower()
    return template if template.startswith("/v") or version not in ("/v1/", "/v2/") else version[:3] + template


def _accepted(given: str | None) -> str:
    """The client's request id where it is harmless in a log; else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
