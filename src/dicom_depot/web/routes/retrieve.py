"""Retrieving instances, metadata, frames and bulk data (WADO-RS, PS3.18 section 10.4)."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from dicom_depot.codec.layout import ByteRange
from dicom_depot.codec.media_types import (
    EXPLICIT_LITTLE_ENDIAN,
    RetrieveChoice,
    accepts_dicom_json,
    choose_frames,
    choose_instance,
    choose_instances,
    frame_media_type,
)
from dicom_depot.codec.transcode import OFFERED
from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.identifiers import InstanceRef, Ref
from dicom_depot.ports import StoredInstance
from dicom_depot.services.metadata import InstanceUrl
from dicom_depot.services.retrieve import Part
from dicom_depot.web.access import requires
from dicom_depot.web.context import base_url, context, version_of
from dicom_depot.web.dicom_json import DICOM_JSON
from dicom_depot.web.errors import error_response
from dicom_depot.web.models import ErrorBody
from dicom_depot.web.multipart_answer import multipart_answer, single_answer
from dicom_depot.web.paths import frame_numbers, instance_ref, series_ref, study_ref
from dicom_depot.web.waiting import iterate_retrieving, run_retrieving

router = APIRouter(tags=["retrieve"])

_DICOM = "application/dicom"
_OCTETS = "application/octet-stream"
_Responses = dict[int | str, dict[str, Any]]
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_ERRORS: _Responses = {
    **{status: {"model": ErrorBody} for status in (400, 404, 406, 503)},
    "default": {"model": ErrorBody, "description": "Any other error."},
}
_MANY: _Responses = {200: {"description": "The instances.", "content": {"multipart/related": _BINARY}}}
_ONE: _Responses = {
    200: {"description": "The instance.", "content": {_DICOM: _BINARY, "multipart/related": _BINARY}},
    206: {"description": "A range of its bytes.", "content": {_DICOM: _BINARY}},
    416: {"model": ErrorBody},
}
_FRAMES: _Responses = {
    200: {
        "description": "The frames, or the value.",
        "content": {_OCTETS: _BINARY, "multipart/related": _BINARY},
    }
}
_METADATA: _Responses = {
    200: {
        "description": "One data set for each instance.",
        "content": {DICOM_JSON: {"schema": {"type": "array", "items": {"type": "object"}}}},
    },
    304: {"description": "It is what the caller has."},
}
_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,18})-(?P<last>[0-9]{0,18})", re.ASCII)

ReadCaller = Annotated[Caller, requires(Action.READ)]


@router.get("/studies/{study}", response_class=Response, responses={**_MANY, **_ERRORS})
async def retrieve_study(request: Request, study: str, caller: ReadCaller) -> Response:
    """All instances of a study."""
    return await run_retrieving(_instances, request, study_ref(study))


@router.get("/studies/{study}/series/{series}", response_class=Response, responses={**_MANY, **_ERRORS})
async def retrieve_series(request: Request, study: str, series: str, caller: ReadCaller) -> Response:
    """All instances of a series."""
    return await run_retrieving(_instances, request, series_ref(study, series))


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}", response_class=Response, responses={**_ONE, **_ERRORS}
)
async def retrieve_instance(request: Request, study: str, series: str, instance: str, caller: ReadCaller) -> Response:
    """One instance; as it is stored also in ranges of bytes."""
    return await run_retrieving(_instance, request, instance_ref(study, series, instance))


@router.get("/studies/{study}/metadata", response_class=Response, responses={**_METADATA, **_ERRORS})
async def retrieve_study_metadata(request: Request, study: str, caller: ReadCaller) -> Response:
    """The attributes of all instances of a study, without bulk data."""
    return await run_retrieving(_metadata, request, study_ref(study))


@router.get("/studies/{study}/series/{series}/metadata", response_class=Response, responses={**_METADATA, **_ERRORS})
async def retrieve_series_metadata(request: Request, study: str, series: str, caller: ReadCaller) -> Response:
    """The attributes of all instances of a series, without bulk data."""
    return await run_retrieving(_metadata, request, series_ref(study, series))


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}/metadata",
    response_class=Response,
    responses={**_METADATA, **_ERRORS},
)
async def retrieve_instance_metadata(
    request: Request, study: str, series: str, instance: str, caller: ReadCaller
) -> Response:
    """The attributes of one instance, without bulk data."""
    return await run_retrieving(_metadata, request, instance_ref(study, series, instance))


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}/frames/{frames}",
    response_class=Response,
    responses={**_FRAMES, **_ERRORS},
)
async def retrieve_frames(
    request: Request, study: str, series: str, instance: str, frames: str, caller: ReadCaller
) -> Response:
    """Frames of an instance, by their numbers from 1, separated by commas."""
    ref, numbers = instance_ref(study, series, instance), frame_numbers(frames)
    choice = choose_frames(request.headers.getlist("accept"), OFFERED)
    if not choice.is_multipart and len(numbers) > 1:
        raise InvalidRequest("A single part holds one frame; accept multipart/related for more.", target="frames")
    return await run_retrieving(_frames, request, ref, numbers, choice)


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}/bulkdata/{path:path}",
    response_class=Response,
    responses={**_FRAMES, **_ERRORS},
)
async def retrieve_bulk_data(
    request: Request, study: str, series: str, instance: str, path: str, caller: ReadCaller
) -> Response:
    """A value that metadata gives a BulkDataURI for."""
    ref = instance_ref(study, series, instance)
    choice = choose_frames(request.headers.getlist("accept"), OFFERED)
    return await run_retrieving(_bulk_data, request, ref, path.upper(), choice)


def _instances(request: Request, ref: Ref) -> Response:
    retrieval = context(request).retrieval
    choice = choose_instances(request.headers.getlist("accept"), OFFERED)
    retrieval.version_of(ref)
    target = choice.transfer_syntax_uid
    if target is not None:
        retrieval.require_transcodable(ref, target)
    return multipart_answer(_DICOM, (retrieval.part(instance, target) for instance in retrieval.instances(ref)))


def _instance(request: Request, ref: InstanceRef) -> Response:
    retrieval = context(request).retrieval
    choice = choose_instance(request.headers.getlist("accept"), OFFERED)
    instance = retrieval.instance(ref)
    target = choice.transfer_syntax_uid
    is_as_stored = target in (None, instance.transfer_syntax_uid)
    if choice.is_multipart:
        return multipart_answer(_DICOM, iter([retrieval.part(instance, target)]))
    if not is_as_stored:
        return single_answer(_DICOM, retrieval.part(instance, target))
    etag = f'"{instance.sequence}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes"}
    if _has(request, "if-none-match", etag):
        return Response(status_code=304, headers=headers)
    wanted = _range(request, instance, etag)
    if wanted is None:
        return single_answer(_DICOM, retrieval.part(instance, None), headers=headers)
    if not wanted.length:
        return error_response(
            416,
            "RangeNotSatisfiable",
            f"The instance has {instance.size} bytes.",
            "Range",
            {"Content-Range": f"bytes */{instance.size}"},
        )
    headers["Content-Range"] = f"bytes {wanted.offset}-{wanted.offset + wanted.length - 1}/{instance.size}"
    part = Part(instance.transfer_syntax_uid, wanted.length, retrieval.range(instance, wanted))
    return single_answer(_DICOM, part, status=206, headers=headers)


def _metadata(request: Request, ref: Ref) -> Response:
    accepts_dicom_json(request.headers.getlist("accept"))
    retrieval = context(request).retrieval
    last_sequence, count = retrieval.version_of(ref)
    # Without quotes, as the service whose API we keep; a client that adds them is understood.
    etag = str(last_sequence) if isinstance(ref, InstanceRef) else f"{last_sequence}-{count}"
    if _has(request, "if-none-match", etag):
        return Response(status_code=304, headers={"ETag": etag})
    url = InstanceUrl(f"{base_url(request)}/v{version_of(request)}/studies")
    blocks = retrieval.metadata.json_array(retrieval.instances(ref), url)
    begun = list(itertools.islice(blocks, 1))
    return StreamingResponse(
        iterate_retrieving(itertools.chain(begun, blocks)), headers={"Content-Type": DICOM_JSON, "ETag": etag}
    )


def _frames(request: Request, ref: InstanceRef, numbers: list[int], choice: RetrieveChoice) -> Response:
    retrieval = context(request).retrieval
    target = choice.transfer_syntax_uid
    parts = retrieval.frames(retrieval.instance(ref), numbers, target)
    return _values(parts, choice)


def _bulk_data(request: Request, ref: InstanceRef, path: str, choice: RetrieveChoice) -> Response:
    retrieval = context(request).retrieval
    parts = retrieval.bulk_data(retrieval.instance(ref), path, choice.transfer_syntax_uid)
    target = choice.transfer_syntax_uid
    if target is not None and any(
        frame_media_type(each.transfer_syntax_uid) != frame_media_type(target) for each in parts
    ):  # a value that is no image must not be called one
        choice = choose_frames(request.headers.getlist("accept"), (EXPLICIT_LITTLE_ENDIAN,))
    if not choice.is_multipart and len(parts) != 1:
        raise InvalidRequest("A single part holds one frame; accept multipart/related for more.", target="bulkdata")
    return _values(parts, choice)


def _values(parts: list[Part], choice: RetrieveChoice) -> Response:
    target = choice.transfer_syntax_uid
    media_type = _OCTETS if target is None else frame_media_type(target)
    return multipart_answer(media_type, iter(parts)) if choice.is_multipart else single_answer(media_type, parts[0])


def _range(request: Request, instance: StoredInstance, etag: str) -> ByteRange | None:
    """The bytes asked for (RFC 9110 section 14); None: all, also where the header is not understood.

    Of length 0 where there are no such bytes.
    """
    found = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if found is None or (not found["first"] and not found["last"]):
        return None
    if request.headers.get("if-range", etag) != etag:
        return None
    size = instance.size
    if not found["first"]:
        length = min(int(found["last"]), size)
        return ByteRange(size - length, length)
    first = int(found["first"])
    last = min(int(found["last"]), size - 1) if found["last"] else size - 1
    if found["last"] and int(found["last"]) < first:
        return None
    return ByteRange(first, max(0, last - first + 1))


def _has(request: Request, header: str, etag: str) -> bool:
    """Whether one of the entity tags in the header is `etag`, quoted or not, weak or not."""
    given = ",".join(request.headers.getlist(header))
    tags = {tag.strip().removeprefix("W/").strip('"').lower() for tag in given.split(",")}
    return bool(given) and (etag.strip('"').lower() in tags or "*" in tags)
