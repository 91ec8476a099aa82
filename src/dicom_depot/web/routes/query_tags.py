"""Extended query tags: attributes that an operator makes searchable."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from dicom_depot.codec.query_tags import tag_of_path
from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import ReindexRunning
from dicom_depot.domain.query_tags import QueryTag
from dicom_depot.web import bodies
from dicom_depot.web.access import requires
from dicom_depot.web.any_case import AnyCaseRoute
from dicom_depot.web.context import base_url, context, version_of
from dicom_depot.web.errors import error_response
from dicom_depot.web.models import (
    QUERY_STATUS_SCHEMA,
    QUERY_TAGS_SCHEMA,
    ErrorBody,
    OperationReference,
    QueryTagEntry,
    QueryTagErrorEntry,
    operation_reference,
    query_tag_entry,
    query_tag_error,
)

router = APIRouter(tags=["extended query tags"], route_class=AnyCaseRoute)

_BODY_BYTES_MAX = 1 << 20
_ERRORS: dict[int | str, dict[str, Any]] = {
    **{status: {"model": ErrorBody} for status in (400, 503)},
    "default": {"model": ErrorBody, "description": "Any other error."},
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody}, **_ERRORS}
_WRITING: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (408, 413, 415)}

ReadCaller = Annotated[Caller, requires(Action.READ)]
Limit = Annotated[int, Query(ge=1, le=200)]
Offset = Annotated[int, Query(ge=0, le=2**31 - 1)]
ManageCaller = Annotated[Caller, requires(Action.MANAGE)]


@router.post(
    "/extendedquerytags",
    status_code=202,
    response_model=OperationReference,
    responses={409: {"model": ErrorBody, "description": "One is there already, or another operation adds some."}}
    | _WRITING
    | _ERRORS,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": QUERY_TAGS_SCHEMA}}}},
)
async def add_query_tags(request: Request, caller: ManageCaller) -> JSONResponse:
    """Make attributes searchable, also in what is stored already: an operation indexes it."""
    body = await bodies.read_body(request, _BODY_BYTES_MAX)
    wanted = bodies.parse_query_tags(bodies.parse_json(body))
    operations_url = f"{base_url(request)}/v{version_of(request)}/operations"
    try:
        operation_id = await run_in_threadpool(context(request).tags.add, wanted, caller)
    except ReindexRunning as error:
        headers = {"Location": f"{operations_url}/{error.operation_id}"}
        return error_response(409, error.code, error.message, error.target, headers)
    href = f"{operations_url}/{operation_id}"
    return JSONResponse(operation_reference(operation_id, href).to_json(), 202, {"Location": href, "Retry-After": "1"})


@router.get(
    "/extendedquerytags", response_model=list[QueryTagEntry], response_model_exclude_none=True, responses=_ERRORS
)
async def list_query_tags(request: Request, caller: ReadCaller, limit: Limit = 100, offset: Offset = 0) -> JSONResponse:
    """The extended query tags, in the order in which they were added."""
    tags = await run_in_threadpool(context(request).tags.tags.all)
    return JSONResponse([_entry(request, tag).to_json() for tag in tags[offset : offset + limit]])


@router.get(
    "/extendedquerytags/{tag_path}",
    response_model=QueryTagEntry,
    response_model_exclude_none=True,
    responses=_NOT_FOUND,
)
async def get_query_tag(request: Request, tag_path: str, caller: ReadCaller) -> JSONResponse:
    """An extended query tag, by keyword or tag."""
    tag = await run_in_threadpool(context(request).tags.get, _path(tag_path))
    return JSONResponse(_entry(request, tag).to_json())


@router.patch(
    "/extendedquerytags/{tag_path}",
    response_model=QueryTagEntry,
    response_model_exclude_none=True,
    responses=_WRITING | _NOT_FOUND,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": QUERY_STATUS_SCHEMA}}}},
)
async def update_query_tag(request: Request, tag_path: str, caller: ManageCaller) -> JSONResponse:
    """Let searches name an extended query tag, or not."""
    path = _path(tag_path)
    body = await bodies.read_body(request, _BODY_BYTES_MAX)
    is_enabled = bodies.parse_query_status(bodies.parse_json(body))
    tag = await run_in_threadpool(context(request).tags.tags.enable, path, is_enabled=is_enabled)
    return JSONResponse(_entry(request, tag).to_json())


@router.delete("/extendedquerytags/{tag_path}", status_code=204, response_class=Response, responses=_NOT_FOUND)
async def delete_query_tag(request: Request, tag_path: str, caller: ManageCaller) -> Response:
    """Remove an extended query tag; the instances stay as they are."""
    await run_in_threadpool(context(request).tags.tags.remove, _path(tag_path))
    return Response(status_code=204)


@router.get("/extendedquerytags/{tag_path}/errors", response_model=list[QueryTagErrorEntry], responses=_NOT_FOUND)
async def list_query_tag_errors(
    request: Request, tag_path: str, caller: ReadCaller, limit: Limit = 100, offset: Offset = 0
) -> JSONResponse:
    """The instances whose value could not be indexed."""
    errors = await run_in_threadpool(context(request).tags.tags.errors, _path(tag_path), limit, offset)
    return JSONResponse([query_tag_error(error).to_json() for error in errors])


def _path(text: str) -> str:
    return f"{tag_of_path(text):08X}"


def _entry(request: Request, tag: QueryTag) -> QueryTagEntry:
    return query_tag_entry(tag, f"{base_url(request)}/v{version_of(request)}")
