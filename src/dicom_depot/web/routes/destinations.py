"""POST destinations/check: would an export to this destination work?"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from dicom_depot.domain.access import Action, Caller
from dicom_depot.export.destination_check import DestinationCheck, check_destination
from dicom_depot.export.trail import where_to
from dicom_depot.web import bodies
from dicom_depot.web.access import requires
from dicom_depot.web.context import context
from dicom_depot.web.models import (
    CHECK_REQUEST_SCHEMA,
    DestinationCheckResult,
    ErrorBody,
    destination_check_result,
)
from dicom_depot.web.trail import trail_of
from dicom_depot.web.waiting import run_waiting

router = APIRouter(tags=["destinations"])

_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (400, 408, 413, 415, 503)}


@router.post(
    "/destinations/check",
    response_model=DestinationCheckResult,
    responses=_ERRORS,
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": CHECK_REQUEST_SCHEMA}}}
    },
)
async def check(request: Request, caller: Annotated[Caller, requires(Action.EXPORT)]) -> JSONResponse:
    """Try, step by step, what an export to this destination needs."""
    opened = context(request)
    body = await bodies.read_body(request, opened.settings.max_body_bytes)

    def parse_and_check() -> DestinationCheck:
        spec = bodies.parse_destination(bodies.parse_json(body), opened.exports.destinations, ("destination",))
        trail_of(request.scope).details.update(where_to(spec.type, spec.public))
        return check_destination(opened.exports.destinations, spec)

    checked = await run_waiting(parse_and_check)
    return JSONResponse(destination_check_result(checked).to_json() | {"remedy": checked.remedy})
