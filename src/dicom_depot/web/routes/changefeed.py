"""The change feed: what was stored, replaced and deleted, in order."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from dicom_depot.codec.dicom_json import unpack_json
from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.ports import Change
from dicom_depot.web.access import requires
from dicom_depot.web.any_case import AnyCaseRoute
from dicom_depot.web.context import base_url, context, version_of
from dicom_depot.web.models import ChangeEntry, ErrorBody

router = APIRouter(tags=["change feed"], route_class=AnyCaseRoute)

_PARTITION = "Microsoft.Default"
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **{status: {"model": ErrorBody} for status in (400, 503)},
    "default": {"model": ErrorBody, "description": "Any other error."},
}
_LIMITS = {1: (10, 100), 2: (100, 200)}
"""By version of the API: how many entries without `limit`, and at most."""

ReadCaller = Annotated[Caller, requires(Action.READ)]
IncludeMetadata = Annotated[
    bool, Query(alias="includeMetadata", description="Whether entries of live instances hold their attributes.")
]


@router.get("/changefeed", response_model=list[ChangeEntry], response_model_exclude_none=True, responses=_RESPONSES)
async def list_changes(
    request: Request,
    caller: ReadCaller,
    offset: Annotated[
        int,
        Query(ge=0, le=2**62, description="Entries with this number and lower are left out; with a time: how many."),
    ] = 0,
    limit: Annotated[int | None, Query(ge=1, le=200, description="Default 100 (version 1: 10, at most 100).")] = None,
    start_time: Annotated[
        str | None, Query(alias="startTime", description="Version 2: entries from this time on, with its time zone.")
    ] = None,
    end_time: Annotated[
        str | None, Query(alias="endTime", description="Version 2: entries before this time, with its time zone.")
    ] = None,
    include_metadata: IncludeMetadata = True,
) -> Response:
    """Changes in the order in which they happened."""
    version = version_of(request)
    default, highest = _LIMITS[version]
    if limit is not None and limit > highest:
        raise InvalidRequest(f"limit: at most {highest} in version {version} of the API.", target="limit")
    since = _moment(start_time, "startTime") if version == 2 else None
    before = _moment(end_time, "endTime") if version == 2 else None
    if since is not None and before is not None and since >= before:
        raise InvalidRequest("startTime must be earlier than endTime.", target="startTime")
    entries = await run_in_threadpool(
        context(request).changes.changes, offset, limit or default, since=since, before=before
    )
    return await run_in_threadpool(_answer, request, entries, include_metadata=include_metadata)


@router.get(
    "/changefeed/latest",
    response_model=ChangeEntry,
    response_model_exclude_none=True,
    responses={204: {"description": "Nothing was ever stored."}, **_RESPONSES},
)
async def latest_change(request: Request, caller: ReadCaller, include_metadata: IncludeMetadata = True) -> Response:
    """The last change."""
    entry = await run_in_threadpool(context(request).changes.latest_change)
    if entry is None:
        return Response(status_code=204)
    return await run_in_threadpool(_answer, request, entry, include_metadata=include_metadata)


def _answer(request: Request, found: list[Change] | Change, *, include_metadata: bool) -> Response:
    entries = found if isinstance(found, list) else [found]
    ids = [entry.instance_id for entry in entries if entry.instance_id is not None]
    known = context(request).retrieval.catalog.metadata(ids) if ids and include_metadata else {}
    studies_url = f"{base_url(request)}/v{version_of(request)}/studies"
    texts = []
    for entry in entries:
        ref = entry.ref
        text = json.dumps(
            {
                "sequence": entry.sequence,
                "partitionName": _PARTITION,
                "studyInstanceUid": ref.study_uid,
                "seriesInstanceUid": ref.series_uid,
                "sopInstanceUid": ref.sop_instance_uid,
                "action": entry.action,
                "timestamp": entry.occurred_at.astimezone(UTC).isoformat(timespec="microseconds"),
                "state": entry.state,
            }
        ).encode()
        metadata = None if entry.instance_id is None else known.get(entry.instance_id)
        if metadata is not None:
            url = f"{studies_url}/{ref.study_uid}/series/{ref.series_uid}/instances/{ref.sop_instance_uid}"
            text = text[:-1] + b', "metadata": ' + unpack_json(metadata.dicom_json, url) + b"}"
        texts.append(text)
    content = b"[" + b",".join(texts) + b"]" if isinstance(found, list) else texts[0]
    return Response(content, media_type="application/json")


def _moment(text: str | None, name: str) -> datetime | None:
    """A moment with a time zone. Raises InvalidRequest."""
    if text is None:
        return None
    try:
        # A plus sign that was not escaped arrives as a space.
        moment = datetime.fromisoformat(text.strip().replace(" ", "+") if "T" in text else text)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(
        f"{name} must be a time with its zone, as 2026-01-31T08:00:00Z or 2026-01-31T08:00:00%2B01:00.", target=name
    )
