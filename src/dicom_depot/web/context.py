"""What a route needs beside its parameters: the open service, and the address under which the client reached it."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from fastapi import Request

from dicom_depot.config import Settings
from dicom_depot.domain.operation import WireVersion
from dicom_depot.export.resume import ResumeService
from dicom_depot.export.service import ExportService
from dicom_depot.ports import AuditTrail, BlobStore, ChangeFeed, InstanceIndex, ManagedIdentity, TokenVerifier
from dicom_depot.services.query_tags import QueryTagService
from dicom_depot.services.retrieve import RetrieveService
from dicom_depot.services.search import SearchService
from dicom_depot.services.store import StoreService
from dicom_depot.web.waiting import AuditQueue

_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>\d{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class KeyTurns:
    """Requests with the same Idempotency-Key take turns in this process.

    The store decides which of them starts the operation. Taking turns spares the others their proof of writability,
    which leaves an empty log behind where they may not delete it.
    """

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, key: str) -> asyncio.Lock:
        """The lock of a key; it lives as long as somebody holds or awaits it."""
        return self._locks.setdefault(key, asyncio.Lock())


@dataclass(frozen=True, slots=True)
class WebContext:
    """The parts of the open service that routes may use."""

    settings: Settings
    exports: ExportService
    resumes: ResumeService
    index: InstanceIndex
    store: BlobStore
    verifier: TokenVerifier | None
    """None where no sign-in is configured."""
    audit: AuditTrail
    identity: ManagedIdentity
    stores: StoreService
    retrieval: RetrieveService
    searches: SearchService
    tags: QueryTagService
    changes: ChangeFeed
    turns: KeyTurns = field(default_factory=KeyTurns)
    lines: AuditQueue = field(default_factory=AuditQueue)


def context(request: Request) -> WebContext:
    opened: WebContext = request.app.state.context
    return opened


def version_of(request: Request) -> WireVersion:
    """The API version in the path; a path without one speaks version 1."""
    return 2 if request.scope["path"][:4].lower() == "/v2/" else 1


def is_versioned(request: Request) -> bool:
    """Whether the path names a version of the API: without one, the standard's own rules go first."""
    return request.scope["path"][:4].lower() in ("/v1/", "/v2/")


def base_url(request: Request) -> str:
    """Scheme and authority for links, without a trailing slash.

    A configured public URL wins. Otherwise the Host header as it came, completed by the port that the request came
    to: some clients leave the port out, and a link made from such a header alone leads nowhere.
    """
    public = context(request).settings.public_url
    if public is not None:
        return public
    scheme = request.scope["scheme"]
    server_name, server_port = request.scope.get("server") or ("127.0.0.1", None)
    found = _HOST.fullmatch(request.headers.get("host", ""))
    name = found["name"] if found else f"[{server_name}]" if ":" in server_name else server_name
    port = int(found["port"]) if found and found["port"] else server_port
    if port is None or port == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{name}"
    return f"{scheme}://{name}:{port}"
