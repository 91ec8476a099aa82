"""Storing instances: POST studies (STOW-RS, PS3.18 section 10.5), and PUT, which replaces what is there."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from dicom_depot.codec.checks import Check
from dicom_depot.codec.media_types import accepts_dicom_json
from dicom_depot.domain.access import Action, Caller
from dicom_depot.services.store import StoreRules, stored_refs
from dicom_depot.web.access import requires
from dicom_depot.web.context import base_url, context, version_of
from dicom_depot.web.dicom_json import DICOM_JSON, DicomJsonResponse
from dicom_depot.web.models import ErrorBody
from dicom_depot.web.paths import path_uid
from dicom_depot.web.store_answer import answer_of, status_of
from dicom_depot.web.store_body import read_instances
from dicom_depot.web.trail import trail_of

router = APIRouter(tags=["store"])
replacing_router = APIRouter(tags=["store"])
"""Version 2 only: the service whose API we keep has no PUT."""

_OUTCOMES: dict[str, Any] = {"content": {DICOM_JSON: {"schema": {"type": "object"}}}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "All instances are stored.", **_OUTCOMES},
    202: {"description": "Some are stored, or stored with warnings.", **_OUTCOMES},
    204: {"description": "The request held no instance."},
    409: {"description": "None is stored.", **_OUTCOMES},
    **{status: {"model": ErrorBody} for status in (400, 406, 408, 413, 415, 503)},
    "default": {"model": ErrorBody, "description": "Any other error."},
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/related": {"schema": {"type": "string", "format": "binary"}},
            "application/dicom": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_arguments: dict[str, Any] = {"response_class": Response, "responses": _RESPONSES, "openapi_extra": _BODY}


@router.post("/studies", **_arguments)
async def store_instances(request: Request, caller: Annotated[Caller, requires(Action.WRITE)]) -> Response:
    """Store instances of any studies. Each has an outcome of its own."""
    return await _store(request, None, may_replace=False)


@router.post("/studies/{study}", **_arguments)
async def store_instances_of_study(
    request: Request, study: str, caller: Annotated[Caller, requires(Action.WRITE)]
) -> Response:
    """Store instances that all belong to one study."""
    return await _store(request, study, may_replace=False)


@replacing_router.put("/studies", **_arguments)
async def replace_instances(request: Request, caller: Annotated[Caller, requires(Action.WRITE)]) -> Response:
    """Store instances; one that is stored already is replaced."""
    return await _store(request, None, may_replace=True)


@replacing_router.put("/studies/{study}", **_arguments)
async def replace_instances_of_study(
    request: Request, study: str, caller: Annotated[Caller, requires(Action.WRITE)]
) -> Response:
    """Store instances that all belong to one study; one that is stored already is replaced."""
    return await _store(request, study, may_replace=True)


async def _store(request: Request, study: str | None, *, may_replace: bool) -> Response:
    accepts_dicom_json(request.headers.getlist("accept"))
    version = version_of(request)
    study_uid = None if study is None else path_uid(study, "study")
    rules = StoreRules(Check.ALL if version == 2 else Check.INDEXED, study_uid, may_replace)
    outcomes = await read_instances(request, context(request).stores, rules)
    stored = len(stored_refs(outcomes))
    trail_of(request.scope).details |= {"stored_count": stored, "failed_count": len(outcomes) - stored}
    status = status_of(outcomes, version)
    if status == 204:
        return Response(status_code=204)
    base = base_url(request)
    headers = {}
    if any(outcome.has_many_values for outcome in outcomes):
        host = base.partition("://")[2]
        headers["Warning"] = f'299 {host}: "An attribute that is indexed by one value has several; see the metadata."'
    answer = answer_of(outcomes, version, f"{base}/v{version}/studies", study_uid)
    return DicomJsonResponse(answer, status, headers)
