"""Which error becomes which HTTP status, in one table, and the one shape of an error body."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dicom_depot.domain import errors

_log = logging.getLogger(__name__)

STATUSES: tuple[tuple[type[errors.DepotError], int], ...] = (
    (errors.InvalidRequest, 400),
    (errors.IdentityUnavailable, 400),
    (errors.Unauthenticated, 401),
    (errors.Forbidden, 403),
    (errors.NotFound, 404),
    (errors.NotAcceptable, 406),
    (errors.RequestTimeout, 408),
    (errors.Conflict, 409),
    (errors.PayloadTooLarge, 413),
    (errors.UnsupportedMediaType, 415),
    (errors.IdempotencyKeyReused, 422),
    (errors.TooManyOperations, 429),
    (errors.StorageFull, 503),
    (errors.ServiceUnavailable, 503),
)
"""Looked through from the top; anything else is an error of ours: 500."""

RETRY_AFTER_SECONDS = 5

COMMON_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Content-Security-Policy": "frame-src 'self';",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Api-Supported-Versions": "1, 2",
}
"""What every answer carries."""

_HTTP_CODES = {404: "NotFound", 405: "MethodNotAllowed"}
_OTHER_VERSION = re.compile(r"/v(?![12](?:/|$))\d[^/]{0,40}(?:/|$)", re.IGNORECASE)


def error_response(
    status: int, code: str, message: str, target: str | None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """`{"code", "message", "target"}`: what is wrong, where, and what to do."""
    body = {"code": code, "message": _encodable(message), "target": None if target is None else _encodable(target)}
    return JSONResponse(body, status, dict(headers or {}))


def _encodable(text: str) -> str:
    """A JSON text may hold half of a surrogate pair, and messages name places in it; an answer must be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def status_of(error: errors.DepotError) -> int:
    if isinstance(error, errors.SourceFault) and error.kind is errors.FaultKind.TRANSIENT:
        return 503  # the store is away; a single object that is missing or damaged is an error of ours
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(errors.DepotError, _depot_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected)


async def _depot_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.DepotError)
    status = status_of(error)
    if status == 500:
        return await _unexpected(request, error)
    return error_response(status, error.code, error.message, error.target, _headers(request, status))


def _headers(request: Request, status: int) -> dict[str, str]:
    match status:
        case 401:  # RFC 6750 section 3.1: no error code where no token was sent
            reason = ', error="invalid_token"' if "authorization" in request.headers else ""
            return {"WWW-Authenticate": f'Bearer realm="dicom-depot"{reason}'}
        case 408:
            return {"Connection": "close"}
        case 429 | 503:
            return {"Retry-After": str(RETRY_AFTER_SECONDS)}
        case _:
            return {}


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404 and _OTHER_VERSION.match(request.url.path):
        return error_response(400, "UnsupportedApiVersion", "This version is not supported; use /v1 or /v2.", "version")
    code = _HTTP_CODES.get(error.status_code, "RequestRefused")
    message = {
        404: "There is nothing at this path. Paths begin with /v1 or /v2.",
        405: "This path does not take this method.",
    }.get(error.status_code, str(error.detail))
    return error_response(error.status_code, code, message, None, error.headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    return error_response(400, "InvalidRequest", f"{place}: {first['msg']}.", place)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    # Made outside of the middleware that adds them elsewhere.
    return error_response(
        500, "InternalError", "An error of the service; its log has the details.", None, COMMON_HEADERS
    )
