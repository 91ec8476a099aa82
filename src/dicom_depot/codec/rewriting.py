"""A data set in another encoding, its values the same bytes (swapped for big endian), and its file meta information.

Nested data is walked without recursion, and gets undefined lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID

from dicom_depot.codec.elements import (
    BITS_ALLOCATED,
    EXPLICIT,
    IMPLICIT,
    ITEM,
    ITEM_END,
    PIXEL_DATA,
    PIXEL_REPRESENTATION,
    SEQUENCE_END,
    TRANSFER_SYNTAX,
    UNDEFINED,
    Element,
    File,
    element_header,
    explicit_vr,
    read_element_header,
)
from dicom_depot.codec.part10 import Encoding
from dicom_depot.codec.vr import WORD_BYTES
from dicom_depot.domain.errors import NotTranscodable

_WORD_BYTES = {vr.encode(): size for vr, size in WORD_BYTES.items()}

Changes = dict[int, Sequence[bytes]]
"""Elements to be written in place of, or among, a file's, in pieces; removed ones have none."""

BROKEN_SEQUENCE = "a sequence in it is broken, or holds encapsulated pixel data"
_LENGTH_TO_END = 0x00080001


def written(file: File, encoding: Encoding, changes: Changes) -> Iterator[bytes]:
    """The data set in its new encoding, with `changes`."""
    left = dict(sorted(changes.items()))
    is_signed = file.integer(PIXEL_REPRESENTATION) == 1
    allocated = file.integer(BITS_ALLOCATED) or 0
    for element in file.elements:
        while left and (tag := next(iter(left))) < element.tag:
            yield from left.pop(tag)
        if element.tag in changes:
            yield from left.pop(element.tag, ())
        elif not element.tag & 0xFFFF or element.tag == _LENGTH_TO_END:
            continue
        elif file.encoding == encoding and not element.is_cut and (encoding.is_implicit or element.vr is not None):
            yield file.data[element.start : element.end]
        else:
            yield from _rewritten(file, element, encoding, is_signed, allocated)
    for pieces in left.values():
        yield from pieces


def _rewritten(file: File, element: Element, encoding: Encoding, is_signed: bool, allocated: int) -> Iterator[bytes]:
    vr = explicit_vr(element, is_signed=is_signed)
    if element.tag == PIXEL_DATA and not element.is_undefined:
        value = little_pixels(file, element, allocated)
        if element.vr is None and 0 < allocated <= 8:
            vr = b"OB"
        yield element_header(element.tag, vr, len(value), encoding) + value
    elif _is_sequence(file.data, element, vr):
        yield from _nested(file.data, element, file.encoding, encoding, is_signed)
    else:
        yield from _plain(file.data, element, vr, file.encoding, encoding)


def _swapped(value: bytes, size: int) -> bytes:
    whole = len(value) // size * size
    return np.frombuffer(value[:whole], f">u{size}").astype(f"<u{size}").tobytes() + value[whole:]


def little_pixels(file: File, element: Element, allocated: int) -> bytes:
    """Native pixel data in little endian. Cells of 8 bits or less are swapped in pairs when they stand in words."""
    value = file.data[element.value_start : element.end]
    if file.encoding.is_little:
        return value
    size = allocated // 8 if allocated in (16, 32, 64) else 2 if explicit_vr(element, is_signed=False) == b"OW" else 1
    return _swapped(value, size)


class _Level(NamedTuple):
    end: int | None
    limit: int
    """The end, or, where it is undefined, the end of what holds this level."""
    is_sequence: bool
    source: Encoding


def _nested(data: bytes, element: Element, source: Encoding, encoding: Encoding, is_signed: bool) -> Iterator[bytes]:
    """A sequence in another encoding, every length in it undefined. A stack of levels stands for recursion."""
    at = element.value_start
    yield element_header(element.tag, b"SQ", UNDEFINED, encoding)
    end = None if element.is_undefined else element.end
    levels = [_Level(end, element.end, True, _inner(element, source))]
    while levels:
        end, limit, is_sequence, source = levels[-1]
        closing = element_header(SEQUENCE_END if is_sequence else ITEM_END, b"", 0, encoding)
        if end is not None and at >= end:
            levels.pop()
            yield closing
            continue
        start = at
        tag, vr, length, at = read_element_header(data, start, source)
        stop = None if length == UNDEFINED else at + length
        if max(at, stop or 0) > limit:
            raise NotTranscodable(BROKEN_SEQUENCE)
        child = Element(tag, vr, start, at, stop or limit, stop is None)
        if tag in (ITEM_END, SEQUENCE_END):
            if end is None:
                levels.pop()
                yield closing
        elif is_sequence and tag == ITEM:
            yield element_header(ITEM, b"", UNDEFINED, encoding)
            levels.append(_Level(stop, child.end, False, source))
        elif is_sequence or tag >> 16 == 0xFFFE or (tag == PIXEL_DATA and stop is None):
            raise NotTranscodable(BROKEN_SEQUENCE)
        elif _is_sequence(data, child, child_vr := explicit_vr(child, is_signed=is_signed)):
            yield element_header(tag, b"SQ", UNDEFINED, encoding)
            levels.append(_Level(stop, child.end, True, _inner(child, source)))
        else:
            at = child.end
            if tag & 0xFFFF:
                yield from _plain(data, child, child_vr, source, encoding)


def _is_sequence(data: bytes, element: Element, vr: bytes) -> bool:
    """Whether there are items. In implicit VR the dictionary may know as SQ what was something else once."""
    if element.is_undefined or vr != b"SQ":
        return element.is_undefined
    beginning = data[element.value_start : min(element.end, element.value_start + 4)]
    return element.vr is not None or beginning in (b"", b"\xfe\xff\0\xe0")


def _plain(data: bytes, element: Element, vr: bytes, source: Encoding, encoding: Encoding) -> Iterator[bytes]:
    value = data[element.value_start : element.end]
    if vr == b"SQ":
        vr = b"UN"
    size = _WORD_BYTES.get(vr, 1)
    if not source.is_little and size > 1:
        value = _swapped(value, size)
    yield element_header(element.tag, vr, len(value), encoding) + value


def _inner(element: Element, source: Encoding) -> Encoding:
    """Unknown values of undefined length hold implicit VR little endian (PS3.5 section 6.2.2)."""
    return IMPLICIT if element.vr == b"UN" else source


def file_meta(file: File, target: str) -> bytes:
    """File meta information (PS3.10 section 7.1): what there is, the new syntax, and what must not be missing."""
    meta = {**file.head.meta, TRANSFER_SYNTAX: _uid(TRANSFER_SYNTAX, target.encode())}
    meta.setdefault(0x00020001, element_header(0x00020001, b"OB", 2, EXPLICIT) + b"\0\1")
    for tag, source in ((0x00020002, 0x00080016), (0x00020003, 0x00080018)):
        if tag not in meta and (value := file.value(source)) is not None:
            meta[tag] = _uid(tag, value)
    meta.setdefault(0x00020012, _uid(0x00020012, PYDICOM_IMPLEMENTATION_UID.encode()))
    elements = b"".join(meta[tag] for tag in sorted(meta))
    return element_header(0x00020000, b"UL", 4, EXPLICIT) + struct.pack("<L", len(elements)) + elements


def _uid(tag: int, value: bytes) -> bytes:
    padded = value + b"\0" * (len(value) % 2)
    return element_header(tag, b"UI", len(padded), EXPLICIT) + padded
