"""Rendered frames and thumbnails: pictures of what is stored (PS3.18 section 10.4.1.1.2, 10.4.1.1.5)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from dicom_depot.codec.media_types import JPEG, PNG, choose_rendered
from dicom_depot.codec.render_parameters import (
    DEFAULT_THUMBNAIL,
    QUALITY_DEFAULT,
    Rendition,
    Viewport,
    parse_quality,
    parse_viewport,
    parse_window,
)
from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.identifiers import InstanceRef, Ref
from dicom_depot.services.rendering import RenderService
from dicom_depot.web.access import requires
from dicom_depot.web.context import context
from dicom_depot.web.models import ErrorBody
from dicom_depot.web.paths import instance_ref, series_ref, study_ref
from dicom_depot.web.waiting import run_retrieving

router = APIRouter(tags=["rendered"])

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The picture.", "content": {JPEG: _BINARY, PNG: _BINARY}},
    **{status: {"model": ErrorBody} for status in (400, 404, 406, 503)},
    "default": {"model": ErrorBody, "description": "Any other error."},
}

ReadCaller = Annotated[Caller, requires(Action.READ)]
Quality = Annotated[str | None, Query(description="Of JPEG: 1 to 100, default 100.")]
Window = Annotated[
    str | None,
    Query(description="center,width,function: of greyscale; LINEAR (default), LINEAR_EXACT or SIGMOID."),
]
RenderedViewport = Annotated[
    str | None,
    Query(
        alias="viewport",
        description="vw,vh,sx,sy,sw,sh: scaled to fit width and height, of this region of the source; negative sizes "
        "of it flip.",
    ),
]
ThumbnailViewport = Annotated[
    str | None, Query(alias="viewport", description="vw,vh: scaled to fit them. Default: at most 128,128.")
]


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}/rendered", response_class=Response, responses=_RESPONSES
)
async def retrieve_rendered_instance(
    request: Request,
    study: str,
    series: str,
    instance: str,
    caller: ReadCaller,
    quality: Quality = None,
    window: Window = None,
    viewport: RenderedViewport = None,
) -> Response:
    """The first frame of an instance as a picture."""
    rendition = _rendition(request)
    return await run_retrieving(_frame, request, instance_ref(study, series, instance), 1, rendition)


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}/frames/{frames}/rendered",
    response_class=Response,
    responses=_RESPONSES,
)
async def retrieve_rendered_frame(
    request: Request,
    study: str,
    series: str,
    instance: str,
    frames: str,
    caller: ReadCaller,
    quality: Quality = None,
    window: Window = None,
    viewport: RenderedViewport = None,
) -> Response:
    """One frame of an instance, by its number from 1, as a picture."""
    ref, number = instance_ref(study, series, instance), _frame_number(frames)
    return await run_retrieving(_frame, request, ref, number, _rendition(request))


@router.get("/studies/{study}/thumbnail", response_class=Response, responses=_RESPONSES)
async def retrieve_study_thumbnail(
    request: Request, study: str, caller: ReadCaller, viewport: ThumbnailViewport = None
) -> Response:
    """A small picture of a study: of its first series that has an image."""
    return await run_retrieving(_thumbnail, request, study_ref(study), _thumbnail_rendition(request))


@router.get("/studies/{study}/series/{series}/thumbnail", response_class=Response, responses=_RESPONSES)
async def retrieve_series_thumbnail(
    request: Request, study: str, series: str, caller: ReadCaller, viewport: ThumbnailViewport = None
) -> Response:
    """A small picture of a series: of its middle instance."""
    return await run_retrieving(_thumbnail, request, series_ref(study, series), _thumbnail_rendition(request))


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}/thumbnail", response_class=Response, responses=_RESPONSES
)
async def retrieve_instance_thumbnail(
    request: Request, study: str, series: str, instance: str, caller: ReadCaller, viewport: ThumbnailViewport = None
) -> Response:
    """A small picture of an instance: of its middle frame."""
    ref = instance_ref(study, series, instance)
    return await run_retrieving(_thumbnail, request, ref, _thumbnail_rendition(request))


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}/frames/{frames}/thumbnail",
    response_class=Response,
    responses=_RESPONSES,
)
async def retrieve_frame_thumbnail(
    request: Request,
    study: str,
    series: str,
    instance: str,
    frames: str,
    caller: ReadCaller,
    viewport: ThumbnailViewport = None,
) -> Response:
    """A small picture of one frame."""
    ref, number = instance_ref(study, series, instance), _frame_number(frames)
    return await run_retrieving(_frame, request, ref, number, _thumbnail_rendition(request))


def _frame(request: Request, ref: InstanceRef, number: int, rendition: Rendition) -> Response:
    service = RenderService(context(request).retrieval)
    return Response(service.frame(ref, number, rendition), media_type=rendition.media_type)


def _thumbnail(request: Request, ref: Ref, rendition: Rendition) -> Response:
    service = RenderService(context(request).retrieval)
    return Response(service.thumbnail(ref, rendition), media_type=rendition.media_type)


def _rendition(request: Request) -> Rendition:
    """What the request wants; parameters that are not known are passed over. Raises InvalidRequest, NotAcceptable."""
    quality, window, viewport = (_single(request, name) for name in ("quality", "window", "viewport"))
    return Rendition(
        choose_rendered(request.headers.getlist("accept")),
        QUALITY_DEFAULT if quality is None else parse_quality(quality),
        None if window is None else parse_window(window),
        None if viewport is None else parse_viewport(viewport),
    )


def _thumbnail_rendition(request: Request) -> Rendition:
    given = _single(request, "viewport")
    viewport: Viewport = DEFAULT_THUMBNAIL if given is None else parse_viewport(given, has_region=False)
    media_type = choose_rendered(request.headers.getlist("accept"), takes_several=True)
    return Rendition(media_type, _THUMBNAIL_QUALITY, viewport=viewport)


_THUMBNAIL_QUALITY = 90


def _single(request: Request, name: str) -> str | None:
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"{name} is given {len(values)} times; give it once.", target=name)
    return values[0] if values else None


def _frame_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        message = "A picture shows one frame; frames are whole numbers from 1: frames/1/rendered."
        raise InvalidRequest(message, target="frames")
    return int(text)
