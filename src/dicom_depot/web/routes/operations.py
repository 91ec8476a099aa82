"""Operations: look up, list, cancel, resume."""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import InvalidRequest, NotFound
from dicom_depot.domain.operation import (
    Operation,
    OperationId,
    OperationStatus,
    WireVersion,
    parse_operation_id,
    wire_status,
)
from dicom_depot.web import bodies
from dicom_depot.web.access import requires
from dicom_depot.web.context import base_url, context, version_of
from dicom_depot.web.models import (
    RESUME_REQUEST_SCHEMA,
    ErrorBody,
    OperationPage,
    OperationState,
    operation_state,
)
from dicom_depot.web.trail import trail_of
from dicom_depot.web.waiting import run_waiting

# The default also keeps FastAPI from documenting a 422 with a body of its own, which this service never sends.
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody},
    "default": {"model": ErrorBody, "description": "Any other error."},
}

router = APIRouter(tags=["operations"], responses=_ERRORS)

_YOUNG_SECONDS = 60


@router.get(
    "/operations/{operation_id}",
    response_model=OperationState,
    response_model_exclude_none=True,
    responses={202: {"model": OperationState, "description": "Not ended yet."}, 404: {"model": ErrorBody}},
)
def get_operation(
    request: Request, operation_id: str, caller: Annotated[Caller, requires(Action.READ)]
) -> JSONResponse:
    """The state of an operation: 202 until it has ended, then 200."""
    operation = context(request).exports.get(_id(request, operation_id), caller)
    return _answer(request, operation, 200 if operation.status.is_terminal else 202)


@router.post(
    "/operations/{operation_id}/cancel",
    status_code=202,
    response_model=OperationState,
    response_model_exclude_none=True,
    responses={
        200: {"model": OperationState, "description": "It was canceled already."},
        404: {"model": ErrorBody},
        409: {"model": ErrorBody},
    },
)
def cancel_operation(
    request: Request, operation_id: str, caller: Annotated[Caller, requires(Action.EXPORT)]
) -> JSONResponse:
    """Stop an operation. What it copied stays; its counts say how much that is."""
    operation = context(request).exports.cancel(_id(request, operation_id), caller)
    return _answer(request, operation, 200 if operation.status is OperationStatus.CANCELED else 202)


@router.post(
    "/operations/{operation_id}/resume",
    status_code=202,
    response_model=OperationState,
    response_model_exclude_none=True,
    responses={status: {"model": ErrorBody} for status in (400, 404, 408, 409, 413, 415, 429, 503)},
    openapi_extra={
        "requestBody": {"required": False, "content": {"application/json": {"schema": RESUME_REQUEST_SCHEMA}}}
    },
)
async def resume_operation(
    request: Request, operation_id: str, caller: Annotated[Caller, requires(Action.EXPORT)]
) -> JSONResponse:
    """Let a failed or canceled operation go on where it stopped: same id, folder, counts and log."""
    opened = context(request)
    id_ = _id(request, operation_id)
    body = await bodies.read_optional_body(request, opened.settings.max_body_bytes)
    given = await run_in_threadpool(bodies.parse_resume, body, opened.exports.destinations)
    operation = await run_waiting(opened.resumes.resume, id_, given, caller)
    return _answer(request, operation, 202)


@router.get(
    "/operations",
    response_model=OperationPage,
    response_model_exclude_none=True,
    responses={400: {"model": ErrorBody}},
)
def list_operations(
    request: Request,
    caller: Annotated[Caller, requires(Action.READ)],
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    continuation_token: Annotated[str | None, Query(alias="continuationToken")] = None,
    status: Annotated[str | None, Query(description="Status words, comma separated.")] = None,
) -> JSONResponse:
    """Operations, newest first."""
    version = version_of(request)
    before = None if continuation_token is None else _parse_token(continuation_token)
    statuses = None if status is None else _parse_statuses(status, version)
    found = context(request).exports.page(limit + 1, before, statuses, caller)
    page, root = found[:limit], _root(request)
    return JSONResponse(
        OperationPage(
            operations=[operation_state(operation, version, root) for operation in page],
            continuation_token=_token(page[-1]) if len(found) > limit else None,
        ).to_json()
    )


def _answer(request: Request, operation: Operation, status: int) -> JSONResponse:
    version, root = version_of(request), _root(request)
    headers = {}
    if status == 202:
        age = (datetime.now(UTC) - operation.created_at).total_seconds()
        headers = {
            "Location": f"{root}/operations/{operation.id}",
            "Retry-After": "1" if age < _YOUNG_SECONDS else "5",
        }
    return JSONResponse(operation_state(operation, version, root).to_json(), status, headers)


def _root(request: Request) -> str:
    return f"{base_url(request)}/v{version_of(request)}"


def _id(request: Request, text: str) -> OperationId:
    operation_id = parse_operation_id(text)
    if operation_id is None:
        raise NotFound("There is no such operation: its id must be a GUID.", target="operationId")
    trail_of(request.scope).details["operation_id"] = operation_id
    return operation_id


def _parse_statuses(text: str, version: WireVersion) -> frozenset[OperationStatus]:
    by_word: dict[str, set[OperationStatus]] = {}
    for status in OperationStatus:
        by_word.setdefault(wire_status(status, version).lower(), set()).add(status)
    chosen: set[OperationStatus] = set()
    for word in text.split(","):
        found = by_word.get(word.strip().lower())
        if found is None:
            known = ", ".join(dict.fromkeys(wire_status(status, version) for status in OperationStatus))
            raise InvalidRequest(f"'status' must be one or more of: {known}.", target="status")
        chosen |= found
    return frozenset(chosen)


def _token(operation: Operation) -> str:
    text = f"{operation.created_at.isoformat()} {operation.id}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def _parse_token(token: str) -> tuple[datetime, str]:
    try:
        moment, _, operation_id = base64.b64decode(token, b"-_", validate=True).decode("ascii").partition(" ")
        created_at = datetime.fromisoformat(moment)
        if created_at.tzinfo is None or parse_operation_id(operation_id) is None:
            raise ValueError
        return created_at.astimezone(UTC), operation_id
    except (ValueError, OverflowError, binascii.Error):
        raise InvalidRequest(
            "'continuationToken' is not one that this service gave out; leave it out to begin again.",
            target="continuationToken",
        ) from None
