"""Searching for studies, series and instances (QIDO-RS, PS3.18 section 10.6)."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from starlette.responses import Response

from dicom_depot.codec.media_types import accepts_dicom_json
from dicom_depot.codec.qido import LIMIT_DEFAULT, LIMIT_MAX, SearchResource, parse_search
from dicom_depot.codec.search_results import AnswerSet
from dicom_depot.domain.access import Action, Caller
from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.domain.search import Level
from dicom_depot.services.search import SearchAnswer
from dicom_depot.web.access import requires
from dicom_depot.web.context import base_url, context, is_versioned, version_of
from dicom_depot.web.dicom_json import DICOM_JSON
from dicom_depot.web.models import ErrorBody
from dicom_depot.web.paths import series_ref, study_ref
from dicom_depot.web.waiting import run_retrieving

router = APIRouter(tags=["search"])

_PARAMETERS_MAX = 200

ReadCaller = Annotated[Caller, requires(Action.READ)]
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One data set for each result, newest first.",
        "content": {DICOM_JSON: {"schema": {"type": "array", "items": {"type": "object"}}}},
    },
    204: {"description": "Nothing matches."},
    **{status: {"model": ErrorBody} for status in (400, 406, 503)},
    "default": {"model": ErrorBody, "description": "Any other error."},
}


def _parameter(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


_PARAMETERS: dict[str, Any] = {
    "parameters": [
        _parameter("limit", "Results at most.", type="integer", minimum=1, maximum=LIMIT_MAX, default=LIMIT_DEFAULT),
        _parameter("offset", "Results to leave out.", type="integer", minimum=0, default=0),
        _parameter("fuzzymatching", "Match the words of names by their beginnings.", type="boolean", default=False),
        _parameter(
            "includefield",
            "Attributes to answer too, by keyword or tag, separated by commas; or `all`.",
            type="array",
            items={"type": "string"},
        ),
        _parameter(
            "filters",
            "Attributes and what they must match, each a parameter of its own: `PatientID=123`, `0020000D=1.2,1.3`.",
            type="object",
            additionalProperties={"type": "string"},
        ),
    ]
}
_ROUTE: dict[str, Any] = {"response_class": Response, "responses": _RESPONSES, "openapi_extra": _PARAMETERS}


@router.get("/studies", **_ROUTE)
async def search_studies(request: Request, caller: ReadCaller) -> Response:
    """Search for studies."""
    return await _searched(request, SearchResource(Level.STUDY), caller)


@router.get("/series", **_ROUTE)
async def search_series(request: Request, caller: ReadCaller) -> Response:
    """Search for series of all studies."""
    return await _searched(request, SearchResource(Level.SERIES), caller)


@router.get("/instances", **_ROUTE)
async def search_instances(request: Request, caller: ReadCaller) -> Response:
    """Search for instances of all studies."""
    return await _searched(request, SearchResource(Level.INSTANCE), caller)


@router.get("/studies/{study}/series", **_ROUTE)
async def search_series_of_study(request: Request, study: str, caller: ReadCaller) -> Response:
    """Search for series of a study."""
    return await _searched(request, SearchResource(Level.SERIES, study_ref(study)), caller)


@router.get("/studies/{study}/instances", **_ROUTE)
async def search_instances_of_study(request: Request, study: str, caller: ReadCaller) -> Response:
    """Search for instances of a study."""
    return await _searched(request, SearchResource(Level.INSTANCE, study_ref(study)), caller)


@router.get("/studies/{study}/series/{series}/instances", **_ROUTE)
async def search_instances_of_series(request: Request, study: str, series: str, caller: ReadCaller) -> Response:
    """Search for instances of a series."""
    return await _searched(request, SearchResource(Level.INSTANCE, series_ref(study, series)), caller)


async def _searched(request: Request, resource: SearchResource, caller: Caller) -> Response:
    return await run_retrieving(_search, request, resource, caller)


def _search(request: Request, resource: SearchResource, caller: Caller) -> Response:
    accepts_dicom_json(request.headers.getlist("accept"))
    service = context(request).searches
    extended = service.extended()
    search = parse_search(_parameters(request), resource, extended)
    answer_set: AnswerSet = version_of(request) if is_versioned(request) else "standard"
    root = f"{base_url(request)}/v{version_of(request)}" if is_versioned(request) else base_url(request)
    peer = request.client
    connection = f"{caller.key}\0{peer.host}\0{peer.port}" if peer is not None else caller.key
    answer = service.search(search, answer_set, f"{root}/studies", (connection, caller.key))
    headers = _warnings(request, answer)
    matched = [extended[path[0]] for path in search.matched if path[0] in extended]
    if erroneous := [tag.path for tag in matched if tag.error_count]:
        headers["erroneous-dicom-attributes"] = ",".join(erroneous)
    if not answer.results:
        return Response(status_code=204, headers=headers)
    content = json.dumps(answer.results, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(content, headers={"Content-Type": DICOM_JSON, **headers})


def _parameters(request: Request) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            request.scope["query_string"].decode(),  # clients send UTF-8 as it is, too
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_PARAMETERS_MAX,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("The query is not UTF-8.", target="query") from None
    except ValueError:
        raise InvalidRequest(f"The query has more than {_PARAMETERS_MAX} parameters.", target="query") from None


def _warnings(request: Request, answer: SearchAnswer) -> dict[str, str]:
    """That this page is not all (PS3.18 section 8.3.4.4)."""
    if answer.remaining == 0:
        return {}
    count = "" if answer.remaining is None else f"{answer.remaining} "
    return {"Warning": f"299 {base_url(request)}: There are {count}additional results that can be requested."}
