"""Deleting studies, series and instances. Their bytes go later, when no export needs them any more."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import NotFound
from dicom_depot.domain.identifiers import Ref
from dicom_depot.web.access import requires
from dicom_depot.web.context import context
from dicom_depot.web.models import ErrorBody
from dicom_depot.web.paths import instance_ref, series_ref, study_ref
from dicom_depot.web.trail import trail_of

router = APIRouter(tags=["delete"])

_RESPONSES: dict[int | str, dict[str, Any]] = {
    **{status: {"model": ErrorBody} for status in (400, 404, 503)},
    "default": {"model": ErrorBody, "description": "Any other error."},
}
_arguments: dict[str, Any] = {"status_code": 204, "response_class": Response, "responses": _RESPONSES}

DeleteCaller = Annotated[Caller, requires(Action.DELETE)]


@router.delete("/studies/{study}", **_arguments)
async def delete_study(request: Request, study: str, caller: DeleteCaller) -> Response:
    """Delete all instances of a study."""
    return await run_in_threadpool(_delete, request, study_ref(study), "study")


@router.delete("/studies/{study}/series/{series}", **_arguments)
async def delete_series(request: Request, study: str, series: str, caller: DeleteCaller) -> Response:
    """Delete all instances of a series."""
    return await run_in_threadpool(_delete, request, series_ref(study, series), "series")


@router.delete("/studies/{study}/series/{series}/instances/{instance}", **_arguments)
async def delete_instance(request: Request, study: str, series: str, instance: str, caller: DeleteCaller) -> Response:
    """Delete one instance."""
    return await run_in_threadpool(_delete, request, instance_ref(study, series, instance), "instance")


def _delete(request: Request, ref: Ref, level: str) -> Response:
    count = context(request).index.delete(ref)
    if not count:
        raise NotFound(f"There is no {level} {ref}.", target=level)
    trail_of(request.scope).details["deleted_count"] = count
    return Response(status_code=204)
