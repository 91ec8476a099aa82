"""POST export: start an export, or count what it would copy."""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.export import ExportSpecification
from dicom_depot.export.trail import what_of, where_to
from dicom_depot.web import bodies
from dicom_depot.web.access import requires
from dicom_depot.web.context import WebContext, base_url, context, version_of
from dicom_depot.web.models import (
    EXPORT_REQUEST_SCHEMA,
    DryRunResult,
    ErrorBody,
    OperationReference,
    dry_run_result,
    operation_reference,
)
from dicom_depot.web.trail import trail_of
from dicom_depot.web.waiting import run_waiting

router = APIRouter(tags=["export"])

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 408, 413, 415, 422, 429, 503)
}
_ERRORS["default"] = {"model": ErrorBody, "description": "Any other error."}


@router.post(
    "/export",
    status_code=202,
    response_model=OperationReference,
    responses={200: {"model": DryRunResult, "description": "The dry run's result."}, **_ERRORS},
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": EXPORT_REQUEST_SCHEMA}}}
    },
)
async def start_export(
    request: Request,
    caller: Annotated[Caller, requires(Action.EXPORT)],
    dry_run: Annotated[bool, Query(alias="dryRun", description="Only count; start and write nothing.")] = False,
    idempotency_key: Annotated[
        str | None, Header(description="The same key with the same body names the same operation.")
    ] = None,
) -> JSONResponse:
    """Start an export: copy instances as .dcm files to a destination."""
    opened = context(request)
    _refuse_other_spellings(request)
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise InvalidRequest(
            "Idempotency-Key must have 1 to 255 printable ASCII characters without spaces.",
            target="Idempotency-Key",
        )
    body = await bodies.read_body(request, opened.settings.max_body_bytes)
    specification = await run_in_threadpool(_specification, opened, body)
    trail = trail_of(request.scope).details
    trail |= where_to(specification.destination.type, specification.destination.public)
    trail |= what_of(specification.source)
    if dry_run:
        trail["dry_run"] = True
        return await run_in_threadpool(_count, opened, specification)
    turn = None if idempotency_key is None else opened.turns.of(f"{caller.key}\0{idempotency_key}")
    async with turn or contextlib.nullcontext():
        operation = await run_waiting(opened.exports.start, specification, idempotency_key, caller)
    trail["operation_id"] = operation.id
    href = f"{base_url(request)}/v{version_of(request)}/operations/{operation.id}"
    headers = {"Location": href, "Retry-After": "1"}
    return JSONResponse(operation_reference(operation.id, href).to_json(), 202, headers)


def _refuse_other_spellings(request: Request) -> None:
    """A dry run that is not understood would be an export."""
    if len(request.query_params.getlist("dryRun")) > 1:
        raise InvalidRequest("The parameter dryRun must be given once; nothing was started.", target="dryRun")
    for name in request.query_params:
        if name != "dryRun" and name.lower().replace("_", "").replace("-", "") == "dryrun":
            raise InvalidRequest("The parameter is spelt dryRun; nothing was started.", target="dryRun")


def _count(opened: WebContext, specification: ExportSpecification) -> JSONResponse:
    """The dry run's answer; it may list very many identifiers."""
    return JSONResponse(dry_run_result(opened.exports.dry_run(specification)).to_json())


def _specification(opened: WebContext, body: bytes) -> ExportSpecification:
    content = bodies.parse_json(body)
    source = bodies.parse_source(content, opened.settings.max_identifiers, opened.searches.extended)
    return ExportSpecification(source, bodies.parse_destination(content, opened.exports.destinations))
