"""The ASGI application: routes under /v1 and /v2, error bodies, headers. Opened services come in from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicom_depot import __version__
from dicom_depot.web.context import WebContext
from dicom_depot.web.errors import COMMON_HEADERS, error_response, install_error_handlers
from dicom_depot.web.routes import export, health, operations

Opener = Callable[[], AbstractAsyncContextManager[WebContext]]


def create_app(open_context: Opener) -> FastAPI:
    """Build the application. `open_context` is entered when the server starts and left when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_context() as opened:
            app.state.context = opened
            yield

    app = FastAPI(
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
    for prefix in ("/v1", "/v2", ""):
        in_document = prefix == "/v2"
        app.include_router(export.router, prefix=prefix, include_in_schema=in_document)
        app.include_router(operations.router, prefix=prefix, include_in_schema=in_document)
        app.add_api_route(
            prefix + "/partitions/{partition}/export",
            _refuse_partition,
            methods=["POST"],
            include_in_schema=False,
        )
    app.add_api_route("/v1/api.json", app.openapi, include_in_schema=False)
    app.include_router(health.router)
    install_error_handlers(app)
    app.add_middleware(_Headers)
    return app


def _operation_name(route: Any) -> str:
    return str(route.name)


async def _refuse_partition(partition: str) -> JSONResponse:
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
                message["headers"] = [*message["headers"], *(each for each in _HEADERS if each[0] not in present)]
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
