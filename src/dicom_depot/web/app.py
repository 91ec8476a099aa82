"""The ASGI application: routes under /v1 and /v2, error bodies, headers. Opened services come in from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicom_depot import __version__
from dicom_depot.config import Settings
from dicom_depot.web.access import OPEN, document_sign_in, rules
from dicom_depot.web.context import WebContext
from dicom_depot.web.errors import COMMON_HEADERS, error_response, install_error_handlers
from dicom_depot.web.guards import GuardMiddleware
from dicom_depot.web.models import ErrorBody
from dicom_depot.web.proxies import ProxyMiddleware
from dicom_depot.web.routes import (
    changefeed,
    delete,
    destinations,
    export,
    health,
    identity,
    operations,
    query_tags,
    rendered,
    retrieve,
    search,
    store,
)
from dicom_depot.web.routes.viewer import viewer_router
from dicom_depot.web.trail import TrailMiddleware

_HSTS = (b"strict-transport-security", b"max-age=31536000")

_ROUTERS = (
    store.router,
    search.router,
    retrieve.router,
    rendered.router,
    delete.router,
    changefeed.router,
    query_tags.router,
    export.router,
    operations.router,
    destinations.router,
    identity.router,
)

Opener = Callable[[], AbstractAsyncContextManager[WebContext]]


def create_app(open_context: Opener, settings: Settings | None = None) -> FastAPI:
    """Build the application. `open_context` is entered when the server starts and left when it stops.

    Raises LookupError when a route does not say who may use it.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_context() as opened:
            app.state.context = opened
            yield

    app = _App(
        settings,
        title="DICOM Depot",
        version=__version__,
        summary="A DICOM service whose data can be exported in bulk.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v2/api.json",
        redirect_slashes=False,
        generate_unique_id_function=_operation_name,
    )
    for prefix in ("/v2", "/v1", ""):  # in the order in which they are looked through
        for router in _ROUTERS + ((store.replacing_router,) if prefix == "/v2" else ()):
            app.include_router(router, prefix=prefix, include_in_schema=prefix == "/v2", responses=_REFUSALS)
        app.add_api_route(
            prefix + "/partitions{rest:path}",
            _refuse_partition,
            methods=_METHODS,
            include_in_schema=False,
            dependencies=[OPEN],
        )
    app.add_api_route("/v1/api.json", app.openapi, include_in_schema=False, dependencies=[OPEN])
    app.include_router(health.router, dependencies=[OPEN])
    if settings.viewer_dir is not None:
        app.include_router(viewer_router(settings.viewer_dir))
    install_error_handlers(app)
    app.add_middleware(GuardMiddleware, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=_METHODS,
            allow_headers=[
                *("Accept", "Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "If-Range", "Range"),
                "X-Request-Id",
            ],
            expose_headers=[
                *("Accept-Ranges", "Content-Range", "ETag", "Location", "Retry-After", "Warning", "WWW-Authenticate"),
                "X-Request-Id",
            ],
        )
    for _ in rules(app):
        pass
    return app


class _App(FastAPI):
    """With middleware around everything, the answer to an unexpected error included."""

    def __init__(self, settings: Settings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._settings = settings

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document_sign_in(self, super().openapi())
        return super().openapi()

    def build_middleware_stack(self) -> ASGIApp:
        stack: ASGIApp = TrailMiddleware(_Headers(super().build_middleware_stack()))
        return ProxyMiddleware(stack, self._settings.trusted_proxies)


_REFUSALS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in (401, 403)}


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def _operation_name(route: Any) -> str:
    return str(route.name)


async def _refuse_partition(rest: str) -> JSONResponse:
    message = "This service has no partitions; leave /partitions/<name> out of the path."
    return error_response(400, "PartitionsDisabled", message, "partitionName")


_HEADERS = [(name.lower().encode(), value.encode()) for name, value in COMMON_HEADERS.items()]


class _Headers:
    """Adds the headers that every answer carries."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                wanted = [*_HEADERS, _HSTS] if scope["scheme"] == "https" else _HEADERS
                message["headers"] = [*message["headers"], *(each for each in wanted if each[0] not in present)]
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
