"""Sends bodies as multipart/related, or one alone, in blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from starlette.responses import Response, StreamingResponse

from dicom_depot.codec.multipart import closing, new_boundary, part_head
from dicom_depot.services.retrieve import Part
from dicom_depot.web.waiting import iterate_retrieving

_SMALL_BYTES = 1 << 20


def multipart_answer(media_type: str, parts: Iterable[Part]) -> Response:
    """200 with all parts, each `media_type` in a transfer syntax of its own.

    The first part is made before the answer begins, so that what is wrong with it can still be said; an error behind
    it ends the connection, which the client notices by the missing closing boundary.
    """
    boundary = new_boundary()
    rest = iter(parts)
    first = list(itertools.islice(rest, 1))
    blocks = _blocks(boundary, media_type, itertools.chain(first, rest))
    begun = list(itertools.islice(blocks, 2))
    content_type = f'multipart/related; type="{media_type}"; boundary={boundary}'
    return StreamingResponse(
        iterate_retrieving(itertools.chain(begun, blocks)), 200, media_type=None, headers={"Content-Type": content_type}
    )


def single_answer(
    media_type: str, part: Part, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """One part alone. Errors at its beginning are raised before anything is sent."""
    all_headers = {"Content-Type": _content_type(media_type, part)} | dict(headers or {})
    begun = list(itertools.islice(part.blocks, 1))
    if part.size is not None:
        all_headers["Content-Length"] = str(part.size)
        if part.size <= _SMALL_BYTES:
            return Response(b"".join(itertools.chain(begun, part.blocks)), status, all_headers)
    return StreamingResponse(iterate_retrieving(itertools.chain(begun, part.blocks)), status, all_headers)


def _content_type(media_type: str, part: Part) -> str:
    return f"{media_type}; transfer-syntax={part.transfer_syntax_uid}"


def _blocks(boundary: str, media_type: str, parts: Iterable[Part]) -> Iterator[bytes]:
    """Small parts are sent together with what surrounds them."""
    held: list[bytes] = []
    size = 0
    for number, part in enumerate(parts):
        held.append(part_head(boundary, {"Content-Type": _content_type(media_type, part)}, is_first=not number))
        for block in part.blocks:
            held.append(block)
            size += len(block)
            if size >= _SMALL_BYTES:
                yield b"".join(held)
                held, size = [], 0
    held.append(closing(boundary))
    yield b"".join(held)
