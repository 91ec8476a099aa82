"""Names of query parameters in any letter case, as the service whose API we keep reads them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response


class AnyCaseRoute(APIRoute):
    """A route whose declared parameters are found whatever letter case they come in."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        names = {parameter.alias.lower(): parameter.alias for parameter in self.dependant.query_params}

        async def handle_any_case(request: Request) -> Response:
            given = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
            known = [(names.get(name.lower(), name), value) for name, value in given]
            request.scope["query_string"] = urlencode(known).encode()
            return await handle(request)

        return handle_any_case
