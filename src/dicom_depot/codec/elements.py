"""Where the data elements of an instance stand, so that it can be written anew. Bytes in, places out.

`codec.part10` looks for a few attributes and copes with the rest; here all elements are found, and what is not
understood is refused. No value is decoded but integers that describe pixels. Nested data is stepped over without
recursion.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from dicom_depot.codec.part10 import Encoding, encoding_at
from dicom_depot.codec.values import decode_integer
from dicom_depot.codec.vr import LONG_VR_CODES, is_vr_code, vr_of
from dicom_depot.domain.errors import NotTranscodable

ELEMENTS_MAX = 1_000_000
"""How many element headers are looked at. Bounds the time and memory of hostile files."""

DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT = Encoding(is_implicit=True, is_little=True)
EXPLICIT = Encoding(is_implicit=False, is_little=True)

UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
TRANSFER_SYNTAX = 0x00020010
NUMBER_OF_FRAMES, BITS_ALLOCATED, PIXEL_REPRESENTATION = 0x00280008, 0x00280100, 0x00280103
PIXEL_DATA = 0x7FE00010
FLOATS = (0x7FE00008, 0x7FE00009)
"""Float Pixel Data, Double Float Pixel Data."""

CUT = "its data set ends within an element"
_FIRST_GROUPS = (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08")
"""In both byte orders: the groups that a file, or a data set without file meta information, begins with."""


class Element(NamedTuple):
    """Where an element stands in its data set. `end` is behind a value of undefined length's delimiter."""

    tag: int
    vr: bytes | None
    start: int
    value_start: int
    end: int
    is_undefined: bool
    is_cut: bool = False
    """Its length leads beyond the end. Only of the pixel data, when the pixels are whole all the same."""


class Head(NamedTuple):
    """What stands before the data set, and how that is encoded."""

    preamble: bytes
    meta: dict[int, bytes]
    """The elements of group 0002, whole, in explicit VR little endian."""
    syntax: str
    """The transfer syntax that the file names, or, when it names none, the one that it uses."""
    encoding: Encoding
    data: bytes
    """What holds the data set from `start` on: the file, or what was inflated."""
    start: int


class File:
    """A data set's elements, outermost ones only. Of those that stand twice the first counts."""

    def __init__(self, head: Head, elements: list[Element]) -> None:
        self.head = head
        self.data, self.encoding, self.syntax = head.data, head.encoding, head.syntax
        self.elements = elements
        self._first = {element.tag: element for element in reversed(elements)}

    def find(self, tag: int) -> Element | None:
        return self._first.get(tag)

    @property
    def pixel_data(self) -> Element | None:
        """The pixel data, be it of integers or floats: there is one kind of the three (PS3.3 section C.7.6.3)."""
        return next((element for tag in (PIXEL_DATA, *FLOATS) if (element := self.find(tag))), None)

    def value(self, tag: int) -> bytes | None:
        element = self.find(tag)
        return None if element is None else self.data[element.value_start : element.end]

    def integer(self, tag: int) -> int | None:
        element = self.find(tag)
        if element is None:
            return None
        vr = "IS" if tag == NUMBER_OF_FRAMES else "US"
        return decode_integer(self.data[element.value_start : element.end], vr, self.encoding.is_little)


def read_head(content: bytes, bytes_max: int) -> Head:
    has_prefix = content[128:132] == b"DICM"
    if has_prefix and content[132:134] not in _FIRST_GROUPS and content[:2] in _FIRST_GROUPS:
        has_prefix = False  # The four letters are part of a value (see codec.part10).
    at = 132 if has_prefix else 0
    preamble = content[:128] if has_prefix else bytes(128)
    meta: dict[int, bytes] = {}
    syntax = None
    for element in read_elements(content, at, encoding_at(content[at : at + 6]), is_meta=True):
        value = content[element.value_start : element.end]
        if element.tag & 0xFFFF:
            vr = explicit_vr(element, is_signed=False)
            meta[element.tag] = element_header(element.tag, vr, len(value), EXPLICIT) + value
        if element.tag == TRANSFER_SYNTAX:
            syntax = value.decode("latin-1").strip(" \0")
        at = element.end
    if syntax == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        content, at = inflater.decompress(content[at:], bytes_max), 0
        if not inflater.eof:
            raise NotTranscodable("its deflated data set is broken, or larger than the limit")
    encoding = encoding_at(content[at : at + 6])
    if syntax is None:
        syntax = encoding.transfer_syntax_uid
    return Head(preamble, meta, syntax, encoding, content, at)


def read_element_header(data: bytes, at: int, encoding: Encoding) -> tuple[int, bytes | None, int, int]:
    """Tag, VR, length and the value's place. An element without a VR is read as implicit wherever it stands."""
    order = "<" if encoding.is_little else ">"
    if at + 8 > len(data):
        raise NotTranscodable(CUT)
    group, number, length = struct.unpack_from(f"{order}HHL", data, at)
    tag, vr, value_start = group << 16 | number, None, at + 8
    if not encoding.is_implicit and group != 0xFFFE and is_vr_code(data[at + 4 : at + 6]):
        vr = data[at + 4 : at + 6]
        if vr in LONG_VR_CODES:
            if at + 12 > len(data):
                raise NotTranscodable(CUT)
            (length,) = struct.unpack_from(f"{order}L", data, at + 8)
            value_start = at + 12
        else:
            (length,) = struct.unpack_from(f"{order}H", data, at + 6)
    return tag, vr, length, value_start


def read_elements(data: bytes, at: int, encoding: Encoding, *, is_meta: bool = False) -> Iterator[Element]:
    """The elements of the outermost data set, or of its file meta information only; less than an element header at
    the end is left out.
    """
    remaining, has_pixels = ELEMENTS_MAX, False
    while at + 8 <= len(data):
        if is_meta and struct.unpack_from("<H", data, at) != (0x0002,):
            return
        try:
            element, remaining = _element_at(data, at, encoding, remaining - 1)
        except NotTranscodable:
            if has_pixels:
                return  # What follows the pixel data, and is no element, is no part of the instance.
            raise
        if remaining <= 0:
            raise NotTranscodable("its data set has too many elements")
        at = element.end
        has_pixels = has_pixels or element.tag == PIXEL_DATA
        if element.tag not in (ITEM_END, SEQUENCE_END):
            yield element


def _element_at(data: bytes, at: int, encoding: Encoding, remaining: int) -> tuple[Element, int]:
    tag, vr, length, value_start = read_element_header(data, at, encoding)
    if length == UNDEFINED:
        end, remaining = _skip_nested(data, value_start, encoding, remaining)
    else:
        end = value_start + length
    is_cut = end > len(data)
    if is_cut and tag != PIXEL_DATA:
        raise NotTranscodable(CUT)
    return Element(tag, vr, at, value_start, min(end, len(data)), length == UNDEFINED, is_cut), remaining


def _skip_nested(data: bytes, at: int, encoding: Encoding, remaining: int) -> tuple[int, int]:
    """The place behind a value of undefined length: only its depth is counted, so that depth costs no stack."""
    depth = 1
    while depth and remaining > 0:
        remaining -= 1
        tag, _, length, at = read_element_header(data, at, encoding)
        if tag in (ITEM_END, SEQUENCE_END):
            depth -= 1
        elif length == UNDEFINED:
            depth += 1
        else:
            at += length
    return at, remaining


def explicit_vr(element: Element, *, is_signed: bool) -> bytes:
    """The VR of the file; in implicit VR the dictionary's (see `vr_of`), integers having the pixels' sign."""
    if element.vr is not None:
        return element.vr
    return vr_of(element.tag, None, is_signed).encode()


def element_header(tag: int, vr: bytes, length: int, encoding: Encoding) -> bytes:
    if encoding.is_implicit or tag >> 16 == 0xFFFE:
        return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, length)
    if vr not in LONG_VR_CODES and length > 0xFFFF:
        vr = b"UN"  # PS3.5 section 6.2.2
    if vr in LONG_VR_CODES:
        return struct.pack("<HH2s2xL", tag >> 16, tag & 0xFFFF, vr, length)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, length)
