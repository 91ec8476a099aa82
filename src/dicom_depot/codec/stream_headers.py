"""What JPEG, JPEG-LS and JPEG 2000 code streams say of themselves, read before a C library that trusts them does."""

from __future__ import annotations

import struct
from typing import NamedTuple

from dicom_depot.domain.errors import NotTranscodable


class StreamHeader(NamedTuple):
    columns: int
    rows: int
    components: int
    precision: int
    component_ids: bytes = b""
    is_jfif: bool = False
    is_adobe_ybr: bool = False
    essence: bytes = b""
    """The stream without its application segments and comments."""


def jpeg_header(stream: bytes) -> StreamHeader:
    """What stands before the first scan of a JPEG or JPEG-LS stream (ISO/IEC 10918-1 section B.2, 14495-1 annex C).

    Raises ValueError, struct.error or IndexError unless marker follows marker: gdcm ends the process when libjpeg
    warns of anything there, of bytes between segments as of an unknown JFIF version.
    """
    if stream[:2] != b"\xff\xd8":
        raise ValueError
    header, kept = StreamHeader(0, 0, 0, 0), [b"\xff\xd8"]
    at, is_jfif, is_adobe_ybr = 2, False, False
    while True:
        marker, length = struct.unpack_from(">HH", stream, at)
        if marker == 0xFFFF:  # a fill byte
            at += 1
            continue
        if marker == 0xFFDA:
            return header._replace(is_jfif=is_jfif, is_adobe_ybr=is_adobe_ybr, essence=b"".join([*kept, stream[at:]]))
        if length < 2:
            raise ValueError
        segment = stream[at + 4 : at + 2 + length]
        if marker in _FRAME_MARKERS:
            precision, rows, columns, components = struct.unpack_from(">BHHB", segment)
            header = StreamHeader(columns, rows, components, precision, segment[6 : 6 + 3 * components : 3])
        is_jfif = is_jfif or (marker == 0xFFE0 and segment.startswith(b"JFIF"))
        is_adobe_ybr = is_adobe_ybr or (marker == 0xFFEE and segment[:5] == b"Adobe" and segment[11:12] == b"\1")
        if marker in _FRAME_MARKERS or marker in _TABLE_MARKERS:
            if marker == 0xFFDB and not _is_quantization(segment):
                raise ValueError
            kept.append(stream[at : at + 2 + length])
        elif not 0xFFE0 <= marker <= 0xFFEF and marker != 0xFFFE:
            raise ValueError
        at += 2 + length


def _is_quantization(segment: bytes) -> bool:
    """Whether whole tables of 64 bytes or words fill the segment: libjpeg would read beyond it."""
    at = 0
    while at < len(segment):
        at += 129 if segment[at] >> 4 else 65
    return at == len(segment)


_FRAME_MARKERS = frozenset({*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC})
_TABLE_MARKERS = frozenset({0xFFC4, 0xFFDB, 0xFFDD, 0xFFF8})
"""Huffman and quantization tables, restart intervals, JPEG-LS parameters."""


def jpeg_2000_header(stream: bytes) -> StreamHeader:
    """The image and tile size of a JPEG 2000 stream, be it in a JP2 file (ISO/IEC 15444-1 section A.5.1)."""
    at = stream.index(b"\xff\x4f\xff\x51") + 4
    right, lower, left, upper, _, _, _, _, components = struct.unpack_from(">8LH", stream, at + 4)
    sizes = {stream[place : place + 3] for place in range(at + 38, at + 38 + 3 * components, 3)}
    if len(sizes) != 1 or not next(iter(sizes)).endswith(b"\x01\x01"):
        raise NotTranscodable("the components of its code stream differ in size or precision")
    return StreamHeader(right - left, lower - upper, components, (next(iter(sizes))[0] & 0x7F) + 1)
