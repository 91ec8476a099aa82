"""From the body of a store request to its instances, as it arrives (PS3.18 section 10.5.1)."""

from __future__ import annotations

from collections.abc import Mapping

from anyio import CancelScope
from starlette.requests import ClientDisconnect, Request

from dicom_depot.codec.media_types import parse_media_type
from dicom_depot.codec.multipart import MultipartReader, PartBegin, PartData, PartEnd, boundary_of
from dicom_depot.domain.errors import InvalidRequest, UnsupportedMediaType
from dicom_depot.services.store import StoreOutcome, StoreRules, StoreService, StoreSession
from dicom_depot.web.waiting import run_storing, store_place, uncancelled

_DICOM = "application/dicom"
_BLOCK_BYTES = 1 << 20
"""What is gathered before it is worth a turn on a thread."""
_ENCODINGS = frozenset({"binary", "8bit", "7bit"})


class _Taker:
    """Gives a body's bytes to a session, as its content type says. The session begins with the first of them, so that
    a small body needs a single turn on a thread.
    """

    def __init__(self, stores: StoreService, rules: StoreRules, reader: MultipartReader | None) -> None:
        self._stores = stores
        self._rules = rules
        self._reader = reader
        self._session: StoreSession | None = None

    def take(self, block: bytes) -> StoreSession:
        if self._session is None:
            self._session = self._stores.begin(self._rules)
            if self._reader is None:
                self._session.begin_instance()
        if self._reader is None:
            if block:
                self._session.write(block)
            return self._session
        for event in self._reader.feed(block):
            match event:
                case PartBegin(headers):
                    _check_part(headers)
                    self._session.begin_instance()
                case PartData(data):
                    self._session.write(bytes(data))
                case PartEnd():
                    self._session.end_instance()
        return self._session

    def finish(self, block: bytes) -> StoreSession:
        session = self.take(block)
        if self._reader is None:
            session.end_instance()
        else:
            self._reader.close()
        return session

    def abandon(self) -> None:
        if self._session is not None:
            self._session.abandon()


async def read_instances(request: Request, stores: StoreService, rules: StoreRules) -> list[StoreOutcome]:
    """Store what the body holds; one outcome for each instance, durable on return.

    Nothing of a request that raises is stored: UnsupportedMediaType, MalformedMultipart, PayloadTooLarge, StorageFull,
    SourceFault, ServiceUnavailable (which alone may leave some stored).
    """
    reader = _reader_for(request)
    async with store_place():
        taker = _Taker(stores, rules, reader)
        try:
            return await _read(request, stores, taker)
        except BaseException:
            with CancelScope(shield=True):
                await run_storing(taker.abandon)
            raise


async def _read(request: Request, stores: StoreService, taker: _Taker) -> list[StoreOutcome]:
    held: list[bytes] = []
    size = 0
    is_large = False
    try:
        async for block in request.stream():
            held.append(block)
            size += len(block)
            if size >= _BLOCK_BYTES:
                is_large = True
                await run_storing(taker.take, b"".join(held))
                held, size = [], 0
    except ClientDisconnect:
        raise InvalidRequest("The client went away before the body was complete.", target="body") from None
    rest = b"".join(held)
    if not is_large:  # the thread that commits does all of it
        return await uncancelled(stores.commits.submit(lambda: taker.finish(rest)))
    session = await run_storing(taker.finish, rest)
    return await uncancelled(stores.commits.submit(lambda: session))


def _reader_for(request: Request) -> MultipartReader | None:
    """None for a body that is one instance."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("The body must be sent uncompressed.", target="Content-Encoding")
    given = request.headers.get("content-type", "")
    try:
        media_type = parse_media_type(given)
    except InvalidRequest:
        raise _unsupported() from None
    if media_type.name == _DICOM:
        return None
    if media_type.name != "multipart/related" or "boundary" not in media_type.parameters:
        raise _unsupported()
    if media_type.parameters.get("type", _DICOM).lower() != _DICOM:
        raise _unsupported()
    if "start" in media_type.parameters:
        raise InvalidRequest("The parameter `start` is not supported; leave it out.", target="Content-Type")
    return MultipartReader(boundary_of(media_type.parameters))


def _check_part(headers: Mapping[str, str]) -> None:
    given = headers.get("content-type")
    try:
        if given is not None and parse_media_type(given).name != _DICOM:
            raise UnsupportedMediaType(
                "Every part must be application/dicom; nothing of the request was stored.", target="Content-Type"
            )
    except InvalidRequest:
        raise UnsupportedMediaType("A part's Content-Type cannot be read.", target="Content-Type") from None
    if headers.get("content-transfer-encoding", "binary").lower() not in _ENCODINGS:
        raise UnsupportedMediaType("Parts must be sent as binary.", target="Content-Transfer-Encoding")


def _unsupported() -> UnsupportedMediaType:
    return UnsupportedMediaType(
        "Instances are stored as Content-Type: application/dicom (one), or "
        'multipart/related; type="application/dicom"; boundary=... (many).',
        target="Content-Type",
    )
