"""GET and PUT identity: the service's managed identity, and the switch that lets exports use it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import IdentityDisabled, IdentityUnavailable
from dicom_depot.ports import ManagedIdentity
from dicom_depot.web import bodies
from dicom_depot.web.access import requires
from dicom_depot.web.context import context
from dicom_depot.web.models import IDENTITY_REQUEST_SCHEMA, ErrorBody, IdentityState, identity_state
from dicom_depot.web.trail import trail_of
from dicom_depot.web.waiting import run_waiting

router = APIRouter(tags=["identity"])

_BODY_BYTES_MAX = 4096
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (400, 408, 413, 415, 503)}


@router.get("/identity", response_model=IdentityState, response_model_exclude_none=True)
async def get_identity(request: Request, caller: Annotated[Caller, requires(Action.MANAGE)]) -> JSONResponse:
    """Whether exports may use the managed identity; and, where they may, whose it is or why no token can be had."""
    return JSONResponse((await run_waiting(_state, context(request).identity)).to_json())


@router.put(
    "/identity",
    response_model=IdentityState,
    response_model_exclude_none=True,
    responses=_ERRORS,
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": IDENTITY_REQUEST_SCHEMA}}}
    },
)
async def set_identity(request: Request, caller: Annotated[Caller, requires(Action.MANAGE)]) -> JSONResponse:
    """Switch the managed identity on or off. It stays off where the host gives no token."""
    identity = context(request).identity
    status = bodies.parse_status(bodies.parse_json(await bodies.read_body(request, _BODY_BYTES_MAX)))
    trail_of(request.scope).details["switched"] = status
    await run_waiting(identity.set_enabled, on=status == "On")
    return JSONResponse((await run_waiting(_state, identity)).to_json())


def _state(identity: ManagedIdentity) -> IdentityState:
    if not identity.is_enabled():
        return IdentityState(status="Off")
    try:
        return identity_state(identity.describe())
    except IdentityDisabled:  # switched off meanwhile
        return IdentityState(status="Off")
    except IdentityUnavailable as error:
        return IdentityState(status="On", error=ErrorBody(code=error.code, message=error.message, target=None))
