"""Which route asks which action of its caller, and who the caller is.

Every route states its rule: `requires(Action.X)`, or OPEN where everybody may ask. `rules` lists them, and the
application does not start with a route that has none. The check is the route's first dependency, so that a caller who
may not ask learns nothing else: 401, then 403, then 415 and 400.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import iter_route_contexts
from starlette.concurrency import run_in_threadpool

from dicom_depot.domain.access import ANONYMOUS, Action, Caller
from dicom_depot.domain.errors import Unauthenticated
from dicom_depot.web.context import context
from dicom_depot.web.trail import trail_of

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_BEARER = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}


@dataclass(frozen=True, slots=True)
class Requirement:
    """The rule that a caller must be granted an action."""

    action: Action

    async def check(self, request: Request) -> Caller:
        """The caller of a request. Raises Unauthenticated, Forbidden, ServiceUnavailable."""
        trail = trail_of(request.scope)
        trail.action = self.action
        caller = await _caller_of(request)
        trail.caller = caller
        caller.require(self.action)
        return caller


_REQUIREMENTS = {action: Requirement(action) for action in Action}


def requires(action: Action) -> Any:
    """The rule of a route, written as one of its parameters.

    >>> caller: Annotated[Caller, requires(Action.READ)]
    """
    return Depends(_REQUIREMENTS[action].check)


def _no_check() -> None:
    """The rule of routes that are open to everybody."""


OPEN = Depends(_no_check)
"""For a route's `dependencies`: everybody may ask, and the answer says nothing of the data."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One method of one route. `action` is None where it is open."""

    method: str
    path: str
    action: Action | None


def rules(app: FastAPI) -> Iterator[Rule]:
    """The rule of every route. Raises LookupError for one that has none, or more than one."""
    for route in iter_route_contexts(app.routes):
        methods, path = sorted((route.methods or set()) - {"HEAD"}), route.path or ""
        if path == app.openapi_url:
            actions: list[Action | None] = [None]
        else:
            dependant = getattr(route, "dependant", None)
            calls = [dependency.call for dependency in dependant.dependencies] if dependant is not None else []
            actions = [
                call.__self__.action for call in calls if isinstance(getattr(call, "__self__", None), Requirement)
            ]
            actions += [None for call in calls if call is _no_check]
        if len(actions) != 1:
            raise LookupError(f"{', '.join(methods)} {path} must have one rule: requires(Action...) or OPEN.")
        yield from (Rule(method, path, actions[0]) for method in methods)


def document_sign_in(app: FastAPI, document: dict[str, Any]) -> None:
    """Say in the OpenAPI document which routes want a bearer token. (FastAPI would by a dependency, which every request
    would then pay for.)
    """
    document.setdefault("components", {})["securitySchemes"] = {"bearer": _BEARER}
    for rule in rules(app):
        path = re.sub(r":\w+}", "}", rule.path)
        operation = document["paths"].get(path, {}).get(rule.method.lower())
        if operation is not None and rule.action is not None:
            operation["security"] = [{"bearer": []}]


async def _caller_of(request: Request) -> Caller:
    verifier = context(request).verifier
    if verifier is None:
        return ANONYMOUS
    values = request.headers.getlist("authorization")
    if not values:
        raise Unauthenticated("Sign in: send an access token as `Authorization: Bearer <token>`.")
    scheme, _, token = values[0].partition(" ")
    token = token.strip()
    if len(values) > 1 or scheme.lower() != "bearer" or not _TOKEN.fullmatch(token):
        raise Unauthenticated(
            "The Authorization header must be given once, as `Bearer <token>`.", target="Authorization"
        )
    return await run_in_threadpool(verifier.verify, token)
