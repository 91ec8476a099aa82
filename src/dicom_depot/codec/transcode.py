"""Transcode: whole instances and single frames in another transfer syntax, without loss. Bytes in, bytes out.

An element's value is never decoded. Where source and target encode alike, elements are copied as they stand; else
their headers are written anew, around the same value bytes (swapped for big endian), so that odd and invalid values
come out as they came in. Nested data is walked without recursion and gets undefined lengths when it is written anew.

What changes, besides the encoding: Transfer Syntax UID, the pixel data, Photometric Interpretation and Planar
Configuration where they describe it, the extended offset table (removed), group lengths (retired: removed, PS3.5
section 7.2), missing parts of the file meta information (added). Lossy Image Compression and its history stay.

Native to native copies the pixel cells, so that overlays in unused bits, single bits and floats survive. Encapsulated
to encapsulated goes through native. `codec.pixels` knows the code streams.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID

from dicom_depot.codec import pixels
from dicom_depot.codec.pixels import Cells, Image
from dicom_depot.codec.values import decode_integer
from dicom_depot.domain.errors import NotFound, NotTranscodable

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
_EXPLICIT_BIG = "1.2.840.10008.1.2.2"
_NATIVE = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED, _EXPLICIT_BIG})

OFFERED = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED}) | pixels.ENCODED
"""The transfer syntaxes that an instance can be transcoded to."""

BYTES_MAX = 2 << 30
"""How much one instance may be, inflated and with its pixels decoded."""

ELEMENTS_MAX = 1_000_000
"""How many element headers are looked at. Bounds the time and memory of hostile files."""

_TRANSFER_SYNTAX = 0x00020010
_FRAMES, _PHOTOMETRIC, _PLANAR, _ALLOCATED = 0x00280008, 0x00280004, 0x00280006, 0x00280100
_SIGNED = 0x00280103
_PIXEL_DATA = 0x7FE00010
_FLOATS = (0x7FE00008, 0x7FE00009)
_OFFSETS = 0x7FE00001
_OFFSET_TABLES = frozenset({0x7FE00001, 0x7FE00002, 0x7FE00003})
_LENGTH_TO_END = 0x00080001

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_FIRST_GROUPS = (b"\2\0", b"\x08\0", b"\0\2", b"\0\x08")
"""In both byte orders: the groups that a file, or a data set without file meta information, begins with."""
_WORDS = {
    **dict.fromkeys([b"AT", b"OW", b"SS", b"US"], 2),
    **dict.fromkeys([b"FL", b"OF", b"OL", b"SL", b"UL"], 4),
    **dict.fromkeys([b"FD", b"OD", b"OV", b"SV", b"UV"], 8),
}
"""How many bytes of a value of these VRs are swapped together (PS3.5 section 7.3)."""


class FrameNotFound(NotFound):
    """The instance does not have the frame."""


_Changes = dict[int, Sequence[bytes]]
"""Elements to be written in place of, or among, a file's, in pieces; removed ones have none."""


def transcode(content: bytes, target: str, *, bytes_max: int = BYTES_MAX) -> bytes:
    """The Part 10 file `content` in the transfer syntax `target`; unchanged when it is in it already.

    A file without preamble or file meta information gets them; what stands behind the pixel data and is no element is
    left out. Raises NotTranscodable, nothing else: for a target that is not OFFERED, a source without a decoder
    (video, private syntaxes), a target that cannot hold the pixels or needs some where there are none, broken data
    sets, and what would be more than `bytes_max`.
    """
    try:
        return _transcode(content, target, bytes_max)
    except NotTranscodable:
        raise
    except Exception:
        raise NotTranscodable("its pixel data or data set is broken") from None


def frames(content: bytes, numbers: Sequence[int], target: str, *, bytes_max: int = BYTES_MAX) -> list[bytes]:
    """The frames with these numbers, from 1, as they would stand in the instance transcoded to `target`: pixel cells,
    little endian, or one code stream without padding. Only these are decoded.

    Single bits begin at a byte's start. Raises FrameNotFound and, as `transcode` does, NotTranscodable.
    """
    try:
        return _frames(content, numbers, target, bytes_max)
    except (NotTranscodable, FrameNotFound):
        raise
    except Exception:
        raise NotTranscodable("its pixel data or data set is broken") from None


def _transcode(content: bytes, target: str, bytes_max: int) -> bytes:
    _check_target(target)
    head = _read_head(content, bytes_max)
    encoding = _IMPLICIT if target == IMPLICIT_LITTLE else _EXPLICIT
    if head.syntax == target and head.encoding == encoding:
        return content
    file = _read(head)
    changes: _Changes = {}
    if file.syntax not in _NATIVE or target in pixels.ENCODED:
        changes = _changed_pixels(file, target, encoding, bytes_max)
    data_set = _written(file, encoding, changes)
    if target == DEFLATED:
        data_set = _deflated(data_set)
    return b"".join([head.preamble, b"DICM", _meta(file, target), *data_set])


def _deflated(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The data set deflated, and padded to even length (PS3.5 section A.5)."""
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    length = 0
    for piece in itertools.chain(map(deflater.compress, pieces), map(deflater.flush, [zlib.Z_FINISH])):
        length += len(piece)
        yield piece
    yield b"\0" * (length % 2)


def _check_target(target: str) -> None:
    if target not in OFFERED:
        raise NotTranscodable("the transfer syntax is not one that instances are transcoded to")


# --- reading ----------------------------------------------------------------------------------------------------------


class _Encoding(NamedTuple):
    is_implicit: bool
    is_little: bool


_IMPLICIT, _EXPLICIT, _BIG = _Encoding(True, True), _Encoding(False, True), _Encoding(False, False)


class _Element(NamedTuple):
    """Where an element stands in its data set. `end` is behind a value of undefined length's delimiter."""

    tag: int
    vr: bytes | None
    start: int
    value_start: int
    end: int
    is_undefined: bool
    is_cut: bool = False
    """Its length leads beyond the end. Only of the pixel data, when the pixels are whole all the same."""


_CUT = "its data set ends within an element"


class _Head(NamedTuple):
    """What stands before the data set, and how that is encoded."""

    preamble: bytes
    meta: dict[int, bytes]
    """The elements of group 0002, whole, in explicit VR little endian."""
    syntax: str
    """The transfer syntax that the file names, or, when it names none, the one that it uses."""
    encoding: _Encoding
    data: bytes
    """What holds the data set from `start` on: the file, or what was inflated."""
    start: int


class _File:
    """A data set's elements, outermost ones only. Of those that stand twice the first counts."""

    def __init__(self, head: _Head, elements: list[_Element]) -> None:
        self.head = head
        self.data, self.encoding, self.syntax = head.data, head.encoding, head.syntax
        self.elements = elements
        self._first = {element.tag: element for element in reversed(elements)}

    def find(self, tag: int) -> _Element | None:
        return self._first.get(tag)

    @property
    def pixel_data(self) -> _Element | None:
        """The pixel data, be it of integers or floats: there is one kind of the three (PS3.3 section C.7.6.3)."""
        return next((element for tag in (_PIXEL_DATA, *_FLOATS) if (element := self.find(tag))), None)

    def value(self, tag: int) -> bytes | None:
        element = self.find(tag)
        return None if element is None else self.data[element.value_start : element.end]

    def integer(self, tag: int) -> int | None:
        element = self.find(tag)
        if element is None:
            return None
        vr = "IS" if tag == _FRAMES else "US"
        return decode_integer(self.data[element.value_start : element.end], vr, self.encoding.is_little)


def _read(head: _Head) -> _File:
    if head.syntax not in _NATIVE and head.syntax not in pixels.DECODED:
        raise NotTranscodable("no decoder for the transfer syntax that it is stored in")
    file = _File(head, list(_elements(head.data, head.start, head.encoding)))
    pixel_data = file.pixel_data
    if pixel_data is not None and pixel_data.is_undefined == (head.syntax in _NATIVE):
        raise NotTranscodable("its pixel data is not encapsulated as its transfer syntax says")
    if pixel_data is not None and pixel_data.is_cut:
        image = _image(file)
        if (pixel_data.end - pixel_data.value_start) * 8 < image.frame_bits * image.frames:
            raise NotTranscodable(_CUT)
    return file


def _read_head(content: bytes, bytes_max: int) -> _Head:
    has_prefix = content[128:132] == b"DICM"
    if has_prefix and content[132:134] not in _FIRST_GROUPS and content[:2] in _FIRST_GROUPS:
        has_prefix = False  # The four letters are part of a value (see codec.part10).
    at = 132 if has_prefix else 0
    preamble = content[:128] if has_prefix else bytes(128)
    meta: dict[int, bytes] = {}
    syntax = None
    for element in _elements(content, at, _encoding_at(content, at), is_meta=True):
        value = content[element.value_start : element.end]
        if element.tag & 0xFFFF:
            meta[element.tag] = _header(element.tag, _vr_of(element, False), len(value), _EXPLICIT) + value
        if element.tag == _TRANSFER_SYNTAX:
            syntax = value.decode("latin-1").strip(" \0")
        at = element.end
    if syntax == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        content, at = inflater.decompress(content[at:], bytes_max), 0
        if not inflater.eof:
            raise NotTranscodable("its deflated data set is broken, or larger than the limit")
    encoding = _encoding_at(content, at)
    if syntax is None:
        syntax = {_IMPLICIT: IMPLICIT_LITTLE, _EXPLICIT: EXPLICIT_LITTLE, _BIG: _EXPLICIT_BIG}[encoding]
    return _Head(preamble, meta, syntax, encoding, content, at)


def _encoding_at(data: bytes, at: int) -> _Encoding:
    """The encoding of the element at this place; what is found outweighs what the file says (see codec.part10)."""
    if not _is_vr(data[at + 4 : at + 6]):
        return _IMPLICIT
    little, big = struct.unpack_from("<H", data, at), struct.unpack_from(">H", data, at)
    return _EXPLICIT if little <= big else _BIG


def _is_vr(text: bytes) -> bool:
    return len(text) == 2 and text.isalpha() and text.isupper()


def _read_header(data: bytes, at: int, encoding: _Encoding) -> tuple[int, bytes | None, int, int]:
    """Tag, VR, length and the value's place. An element without a VR is read as implicit wherever it stands."""
    order = "<" if encoding.is_little else ">"
    if at + 8 > len(data):
        raise NotTranscodable(_CUT)
    group, number, length = struct.unpack_from(f"{order}HHL", data, at)
    tag, vr, value_start = group << 16 | number, None, at + 8
    if not encoding.is_implicit and group != 0xFFFE and _is_vr(data[at + 4 : at + 6]):
        vr = data[at + 4 : at + 6]
        if vr in _LONG_VRS:
            if at + 12 > len(data):
                raise NotTranscodable(_CUT)
            (length,) = struct.unpack_from(f"{order}L", data, at + 8)
            value_start = at + 12
        else:
            (length,) = struct.unpack_from(f"{order}H", data, at + 6)
    return tag, vr, length, value_start


def _elements(data: bytes, at: int, encoding: _Encoding, *, is_meta: bool = False) -> Iterator[_Element]:
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
        has_pixels = has_pixels or element.tag == _PIXEL_DATA
        if element.tag not in (_ITEM_END, _SEQUENCE_END):
            yield element


def _element_at(data: bytes, at: int, encoding: _Encoding, remaining: int) -> tuple[_Element, int]:
    tag, vr, length, value_start = _read_header(data, at, encoding)
    if length == _UNDEFINED:
        end, remaining = _skip_nested(data, value_start, encoding, remaining)
    else:
        end = value_start + length
    is_cut = end > len(data)
    if is_cut and tag != _PIXEL_DATA:
        raise NotTranscodable(_CUT)
    return _Element(tag, vr, at, value_start, min(end, len(data)), length == _UNDEFINED, is_cut), remaining


def _skip_nested(data: bytes, at: int, encoding: _Encoding, remaining: int) -> tuple[int, int]:
    """The place behind a value of undefined length: only its depth is counted, so that depth costs no stack."""
    depth = 1
    while depth and remaining > 0:
        remaining -= 1
        tag, _, length, at = _read_header(data, at, encoding)
        if tag in (_ITEM_END, _SEQUENCE_END):
            depth -= 1
        elif length == _UNDEFINED:
            depth += 1
        else:
            at += length
    return at, remaining


# --- writing ----------------------------------------------------------------------------------------------------------


def _header(tag: int, vr: bytes, length: int, encoding: _Encoding) -> bytes:
    if encoding.is_implicit or tag >> 16 == 0xFFFE:
        return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, length)
    if vr not in _LONG_VRS and length > 0xFFFF:
        vr = b"UN"  # PS3.5 section 6.2.2
    if vr in _LONG_VRS:
        return struct.pack("<HH2s2xL", tag >> 16, tag & 0xFFFF, vr, length)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, length)


def _vr_of(element: _Element, is_signed: bool) -> bytes:
    """The VR of the file; in implicit VR the dictionary's, and UN for what is in none (PS3.5 section 6.2.2). Where
    the dictionary leaves the choice, words are OW, as they are in implicit VR, and integers have the pixels' sign.
    """
    tag = element.tag
    if element.vr is not None:
        return element.vr
    if tag >> 16 & 1:
        return b"LO" if 0x10 <= tag & 0xFFFF <= 0xFF else b"UN"
    try:
        known = dictionary_VR(tag)
    except KeyError:
        return b"UN"
    if "OW" in known:
        return b"OW"
    if "SS" in known and "US" in known:
        return b"SS" if is_signed else b"US"
    return known[:2].encode()


def _written(file: _File, encoding: _Encoding, changes: _Changes) -> Iterator[bytes]:
    """The data set in its new encoding, with `changes`."""
    left = dict(sorted(changes.items()))
    is_signed = file.integer(_SIGNED) == 1
    allocated = file.integer(_ALLOCATED) or 0
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


def _rewritten(file: _File, element: _Element, encoding: _Encoding, is_signed: bool, allocated: int) -> Iterator[bytes]:
    vr = _vr_of(element, is_signed)
    if element.tag == _PIXEL_DATA and not element.is_undefined:
        value = _little_pixels(file, element, allocated)
        if element.vr is None and 0 < allocated <= 8:
            vr = b"OB"
        yield _header(element.tag, vr, len(value), encoding) + value
    elif _is_sequence(file.data, element, vr):
        yield from _nested(file.data, element, file.encoding, encoding, is_signed)
    else:
        yield from _plain(file.data, element, vr, file.encoding, encoding)


def _swapped(value: bytes, size: int) -> bytes:
    whole = len(value) // size * size
    return np.frombuffer(value[:whole], f">u{size}").astype(f"<u{size}").tobytes() + value[whole:]


def _little_pixels(file: _File, element: _Element, allocated: int) -> bytes:
    """Native pixel data in little endian. Cells of 8 bits or less are swapped in pairs when they stand in words."""
    value = file.data[element.value_start : element.end]
    if file.encoding.is_little:
        return value
    size = allocated // 8 if allocated in (16, 32, 64) else 2 if _vr_of(element, False) == b"OW" else 1
    return _swapped(value, size)


class _Level(NamedTuple):
    end: int | None
    limit: int
    """The end, or, where it is undefined, the end of what holds this level."""
    is_sequence: bool
    source: _Encoding


def _nested(data: bytes, element: _Element, source: _Encoding, encoding: _Encoding, is_signed: bool) -> Iterator[bytes]:
    """A sequence in another encoding, every length in it undefined. A stack of levels stands for recursion."""
    at = element.value_start
    yield _header(element.tag, b"SQ", _UNDEFINED, encoding)
    end = None if element.is_undefined else element.end
    levels = [_Level(end, element.end, True, _inner(element, source))]
    while levels:
        end, limit, is_sequence, source = levels[-1]
        closing = _header(_SEQUENCE_END if is_sequence else _ITEM_END, b"", 0, encoding)
        if end is not None and at >= end:
            levels.pop()
            yield closing
            continue
        start = at
        tag, vr, length, at = _read_header(data, start, source)
        stop = None if length == _UNDEFINED else at + length
        if max(at, stop or 0) > limit:
            raise NotTranscodable(_BROKEN_SEQUENCE)
        child = _Element(tag, vr, start, at, stop or limit, stop is None)
        if tag in (_ITEM_END, _SEQUENCE_END):
            if end is None:
                levels.pop()
                yield closing
        elif is_sequence and tag == _ITEM:
            yield _header(_ITEM, b"", _UNDEFINED, encoding)
            levels.append(_Level(stop, child.end, False, source))
        elif is_sequence or tag >> 16 == 0xFFFE or (tag == _PIXEL_DATA and stop is None):
            raise NotTranscodable(_BROKEN_SEQUENCE)
        elif _is_sequence(data, child, child_vr := _vr_of(child, is_signed)):
            yield _header(tag, b"SQ", _UNDEFINED, encoding)
            levels.append(_Level(stop, child.end, True, _inner(child, source)))
        else:
            at = child.end
            if tag & 0xFFFF:
                yield from _plain(data, child, child_vr, source, encoding)


_BROKEN_SEQUENCE = "a sequence in it is broken, or holds encapsulated pixel data"


def _is_sequence(data: bytes, element: _Element, vr: bytes) -> bool:
    """Whether there are items. In implicit VR the dictionary may know as SQ what was something else once."""
    if element.is_undefined or vr != b"SQ":
        return element.is_undefined
    beginning = data[element.value_start : min(element.end, element.value_start + 4)]
    return element.vr is not None or beginning in (b"", b"\xfe\xff\0\xe0")


def _plain(data: bytes, element: _Element, vr: bytes, source: _Encoding, encoding: _Encoding) -> Iterator[bytes]:
    value = data[element.value_start : element.end]
    if vr == b"SQ":
        vr = b"UN"
    size = _WORDS.get(vr, 1)
    if not source.is_little and size > 1:
        value = _swapped(value, size)
    yield _header(element.tag, vr, len(value), encoding) + value


def _inner(element: _Element, source: _Encoding) -> _Encoding:
    """Unknown values of undefined length hold implicit VR little endian (PS3.5 section 6.2.2)."""
    return _IMPLICIT if element.vr == b"UN" else source


def _meta(file: _File, target: str) -> bytes:
    """File meta information (PS3.10 section 7.1): what there is, the new syntax, and what must not be missing."""
    meta = {**file.head.meta, _TRANSFER_SYNTAX: _uid(_TRANSFER_SYNTAX, target.encode())}
    meta.setdefault(0x00020001, _header(0x00020001, b"OB", 2, _EXPLICIT) + b"\0\1")
    for tag, source in ((0x00020002, 0x00080016), (0x00020003, 0x00080018)):
        if tag not in meta and (value := file.value(source)) is not None:
            meta[tag] = _uid(tag, value)
    meta.setdefault(0x00020012, _uid(0x00020012, PYDICOM_IMPLEMENTATION_UID.encode()))
    elements = b"".join(meta[tag] for tag in sorted(meta))
    return _header(0x00020000, b"UL", 4, _EXPLICIT) + struct.pack("<L", len(elements)) + elements


def _uid(tag: int, value: bytes) -> bytes:
    padded = value + b"\0" * (len(value) % 2)
    return _header(tag, b"UI", len(padded), _EXPLICIT) + padded


# --- pixels -----------------------------------------------------------------------------------------------------------


class _Source:
    """The pixel data of a file: frames by index, from 0, decoded when they are asked for."""

    def __init__(self, file: _File, bytes_max: int) -> None:
        element = file.pixel_data
        if element is None:
            raise NotTranscodable("it has no pixel data")
        self.stored = self.image = _image(file)
        self.is_float = element.tag in _FLOATS
        self.syntax = file.syntax
        self.is_native = file.syntax in _NATIVE
        if self.image.frame_cells * self.image.frames == 0:
            raise NotTranscodable("its pixel data has no pixels")
        if self.image.decoded_bytes > bytes_max:
            raise NotTranscodable("its pixels, decoded, are larger than the limit")
        if self.is_native:
            self._value = _little_pixels(file, element, self.image.bits_allocated)
            return
        table = file.value(_OFFSETS) or b""
        extended = struct.unpack(f"<{len(table) // 8}Q", table[: len(table) // 8 * 8])
        if self.image.frames > element.end - element.value_start:
            raise NotTranscodable("the fragments of the pixel data are not as many frames as it should have")
        value = file.data[element.value_start : element.end - 8]
        self._streams = pixels.split_frames(value, self.image, extended)
        self.image = pixels.colour_of(self._streams[0], file.syntax, self.image)

    def stream(self, index: int) -> bytes:
        return self._streams[index]

    def check_encodable(self, target: str) -> None:
        if self.is_float:
            raise NotTranscodable("its pixels are floating point numbers, which only native syntaxes hold")
        pixels.check_encodable(self.image.decoded, target)

    def native(self, index: int) -> bytes:
        return pixels.native_frame(self._value, index, self.image)

    def cells(self, index: int) -> Cells:
        if self.is_native:
            return pixels.native_cells(self.native(index), self.image)
        return pixels.decode(self._streams[index], self.syntax, self.image)


def _image(file: _File) -> Image:
    rows, columns, allocated = (file.integer(tag) for tag in (0x00280010, 0x00280011, _ALLOCATED))
    if rows is None or columns is None or allocated is None:
        raise NotTranscodable("its pixels are not described: rows, columns or bits allocated are missing")
    stored = file.integer(0x00280101) or allocated  # Floats have none.
    high_bit = file.integer(0x00280102)
    return Image(
        rows=rows,
        columns=columns,
        samples=file.integer(0x00280002) or 1,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high_bit is None else high_bit,
        is_signed=file.integer(_SIGNED) == 1,
        photometric=(file.value(_PHOTOMETRIC) or b"").decode("latin-1").strip(" \0"),
        planar=file.integer(_PLANAR) or 0,
        frames=max(1, file.integer(_FRAMES) or 1),
    )


_ENCAPSULATED = b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff"
"""How encapsulated pixel data begins: an icon's, where it stands in a sequence."""


def _changed_pixels(file: _File, target: str, encoding: _Encoding, bytes_max: int) -> _Changes:
    """The elements that hold and describe the pixels in `target`."""
    pixel_data = file.pixel_data
    if pixel_data is None and target not in pixels.ENCODED:
        return {}
    if (
        file.syntax not in _NATIVE
        and b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" in file.data[: pixel_data and pixel_data.start]
    ):
        raise NotTranscodable(_BROKEN_SEQUENCE)
    source = _Source(file, bytes_max)
    if source.image.decoded_bytes * source.image.frames > bytes_max:
        raise NotTranscodable("its pixels, decoded, are larger than the limit")
    if source.is_native:
        source.native(source.image.frames - 1)  # The last one: before any is encoded, all are known to be there.
    image, indexes = source.image.decoded, range(source.image.frames)
    changes: _Changes = {tag: () for tag in _OFFSET_TABLES if file.find(tag) is not None}
    if target in pixels.ENCODED:
        source.check_encodable(target)
        value = pixels.encapsulated([pixels.encode(source.cells(index), target, image) for index in indexes])
        image = image.encoded_in(target)
        end = _header(_SEQUENCE_END, b"", 0, encoding)
        changes[_PIXEL_DATA] = [_header(_PIXEL_DATA, b"OB", _UNDEFINED, encoding), *value, end]
    else:
        value = pixels.native_value(map(source.cells, indexes), image)
        length = sum(map(len, value))
        vr = b"OW" if image.bits_allocated > 8 else b"OB"
        changes[_PIXEL_DATA] = [_header(_PIXEL_DATA, vr, length, encoding), *value]
    if image.photometric != source.stored.photometric:
        text = image.photometric.encode()
        text += b" " * (len(text) % 2)
        changes[_PHOTOMETRIC] = [_header(_PHOTOMETRIC, b"CS", len(text), encoding), text]
    if image.samples > 1:
        changes[_PLANAR] = [_header(_PLANAR, b"US", 2, encoding), struct.pack("<H", image.planar)]
    return changes


def _frames(content: bytes, numbers: Sequence[int], target: str, bytes_max: int) -> list[bytes]:
    _check_target(target)
    file = _read(_read_head(content, bytes_max))
    if file.pixel_data is None:
        raise FrameNotFound("the instance has no pixel data, and no frames")
    source = _Source(file, bytes_max)
    for number in numbers:
        if not 1 <= number <= source.image.frames:
            raise FrameNotFound(f"there is no frame {number}; the instance has {source.image.frames}")
    if source.image.decoded_bytes * len(numbers) > bytes_max:
        raise NotTranscodable("the frames, decoded, are larger than the limit")
    indexes = [number - 1 for number in numbers]
    if file.syntax == target and not source.is_native:
        return [source.stream(index) for index in indexes]
    image = source.image.decoded
    if target in pixels.ENCODED:
        source.check_encodable(target)
        return [pixels.encode(source.cells(index), target, image) for index in indexes]
    if source.is_native:
        return [source.native(index) for index in indexes]
    alone = replace(image, frames=1)
    length = -(-image.frame_bits // 8)
    return [b"".join(pixels.native_value([source.cells(index)], alone))[:length] for index in indexes]
