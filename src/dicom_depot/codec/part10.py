"""Part 10: from the bytes of one instance to the header that the index holds. Reads; never keeps, writes or logs.

pydicom's element reader does the parsing. What real archives taught stands around it:

- Nested data is stepped over without recursion, so that depth costs no stack and size costs no memory.
- Reading ends after the last attribute that the index holds. Only when an identifying one is missing is the rest
  searched too (elements out of order), up to the pixel data.
- Values are decoded here, from pydicom's raw elements: pydicom's own conversion warns, with values in the text.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from pydicom.dataelem import RawDataElement
from pydicom.filereader import data_element_generator

from dicom_depot.codec.inflate import Inflater
from dicom_depot.codec.values import decode_integer, decode_text, encodings_of
from dicom_depot.codec.vr import LONG_VR_CODES, is_vr_code
from dicom_depot.domain.errors import BrokenInstance, DepotError, InvalidIdentifier, NotDicom
from dicom_depot.domain.identifiers import InstanceRef, Uid, parse_uid
from dicom_depot.domain.instance import AttributeValues, InstanceHeader
from dicom_depot.domain.search import ATTRIBUTES, TOP_ATTRIBUTES

INFLATED_BYTES_MAX = 16 << 20
"""How much of a deflated data set is inflated to find its header."""

ELEMENTS_MAX = 250_000
"""How many element headers are looked at; what lies behind them counts as absent. Bounds the time of hostile files."""

VALUE_BYTES_MAX = 8 << 10
"""How much of a value is looked at: more than 1,024 characters of any character set, with their escapes."""

_STUDY, _SERIES, _INSTANCE, _CLASS = 0x0020000D, 0x0020000E, 0x00080018, 0x00080016
_IDENTIFYING = {
    _STUDY: "StudyInstanceUID",
    _SERIES: "SeriesInstanceUID",
    _INSTANCE: "SOPInstanceUID",
    _CLASS: "SOPClassUID",
}
_CHARACTER_SET = 0x00080005
_MEDIA_CLASS, _TRANSFER_SYNTAX = 0x00020002, 0x00020010
_WANTED = [*_IDENTIFYING, *(attribute.tag for attribute in TOP_ATTRIBUTES)]
_LAST_WANTED = max(_WANTED)
_FIRST_PIXEL_TAG = 0x7FE00001

_IMPLICIT_LITTLE = "1.2.840.10008.1.2"
_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_EXPLICIT_BIG = "1.2.840.10008.1.2.2"
_DEFLATED = frozenset({"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})

_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


@dataclass(frozen=True, slots=True)
class Encoding:
    """How data elements are written: with or without VRs, in which byte order (PS3.5 section 10)."""

    is_implicit: bool
    is_little: bool

    @property
    def transfer_syntax_uid(self) -> str:
        if self.is_implicit:
            return _IMPLICIT_LITTLE
        return _EXPLICIT_LITTLE if self.is_little else _EXPLICIT_BIG


@dataclass(frozen=True, slots=True)
class RawValue:
    """One element's value as it stands in the file. `is_cut`: only its beginning was read."""

    value: bytes
    vr: str | None
    is_cut: bool = False


_Elements = Mapping[int, RawValue]


def read_header(stream: BinaryIO, size: int) -> InstanceHeader:
    """Read what the index holds of the instance in `stream`: seekable, at its beginning, of `size` bytes.

    DICOM is recognised by content: the prefix DICM after a preamble of 128 bytes (PS3.10 section 7.1), or, without
    one, a first data element of group 0002 or 0008. Such files name no transfer syntax: implicit VR little endian
    is assumed (PS3.10 section 7.1, PS3.5 section 10.1), unless the first element is encoded otherwise.

    An instance is whole when its four identifying attributes are there and are UIDs by `parse_uid`. Everything else
    may be odd: an optional attribute that is absent, cut off or unreadable is None. Text is decoded by the specific
    character set (PS3.5 section 6.1.2), freed of padding and NULs and cut to 1,024 characters; several values are
    joined by backslashes; person names keep `^` and `=`; integers fit 64 bits.

    Raises NotDicom and BrokenInstance, and what the stream raises of ours. Messages hold no values but malformed UIDs
    (shortened, escaped).
    """
    try:
        return _read_header(stream, size)
    except DepotError:
        raise
    except OSError as error:
        raise BrokenInstance(f"cannot be read: {error.strerror or type(error).__name__}") from None
    except Exception as error:
        raise BrokenInstance(f"cannot be parsed: {type(error).__name__}") from None


def _read_header(stream: BinaryIO, size: int) -> InstanceHeader:
    if not size:
        raise NotDicom("the file is empty")
    head = stream.read(140)
    has_prefix = head[128:132] == b"DICM"
    bare = _bare_encoding(head, size)
    if not has_prefix and bare is None:
        raise NotDicom("no DICM prefix, and no DICOM data element at the beginning")
    try:
        return _read_from(stream, 132 if has_prefix else 0)
    except BrokenInstance:
        if has_prefix and bare is not None:
            # The four letters may stand at offset 128 of a file without preamble, as part of a value.
            return _read_from(stream, 0)
        if bare is not None and bare.is_implicit and not has_prefix and not _has_any(stream, bare):
            raise NotDicom("no DICM prefix, and nothing readable at the beginning") from None
        raise


def _bare_encoding(head: bytes, size: int) -> Encoding | None:
    """The encoding of a data element of group 0002 or 0008 at the beginning, or None when there is none."""
    if len(head) < 8:
        return None
    encoding = encoding_at(head)
    group, length = struct.unpack("<H2xL" if encoding.is_little else ">H2xL", head[:8])
    if group not in (0x0002, 0x0008):
        return None
    if encoding.is_implicit and length > size - 8:
        return None
    return encoding


def encoding_at(head: bytes) -> Encoding:
    """The encoding of the element that starts with `head`: explicit when a VR follows the tag; of the two byte
    orders the one that makes the group number smaller. Implicit VR is always little endian.

    What is found outweighs what the file says of itself: writers that name one encoding and use another are common.
    """
    if len(head) < 6 or not is_vr_code(head[4:6]):
        return Encoding(is_implicit=True, is_little=True)
    little, big = struct.unpack("<H", head[:2]), struct.unpack(">H", head[:2])
    return Encoding(is_implicit=False, is_little=little <= big)


def _has_any(stream: BinaryIO, encoding: Encoding) -> bool:
    stream.seek(0)
    return bool(_collect(stream, encoding, _WANTED, lambda tag: tag > _LAST_WANTED))


def _read_from(stream: BinaryIO, start: int) -> InstanceHeader:
    """Read the header of the instance whose first data element is at `start`."""
    stream.seek(start)
    encoding = _peek_encoding(stream)
    meta = _collect(stream, encoding, [_MEDIA_CLASS, _TRANSFER_SYNTAX], lambda tag: tag >> 16 != 0x0002)
    named_syntax = _uid_or_none(meta, _TRANSFER_SYNTAX)
    if named_syntax in _DEFLATED:
        stream = _inflated(stream)
    encoding = _peek_encoding(stream)

    data_set_start = stream.tell()
    elements = _collect(stream, encoding, _WANTED, lambda tag: tag > _LAST_WANTED)
    if any(tag not in elements for tag in _IDENTIFYING):
        stream.seek(data_set_start)
        elements = _collect(stream, encoding, _WANTED, lambda tag: tag >= _FIRST_PIXEL_TAG)

    if missing := [name for tag, name in _IDENTIFYING.items() if tag not in elements]:
        is_directory = _uid_or_none(meta, _MEDIA_CLASS) == _MEDIA_DIRECTORY
        hint = "; a DICOMDIR lists instances and is not one" if is_directory else ""
        raise BrokenInstance(f"missing attribute: {', '.join(missing)}{hint}")
    return header_of(elements, encoding, named_syntax or encoding.transfer_syntax_uid)


def header_of(elements: Mapping[int, RawValue], encoding: Encoding, transfer_syntax_uid: str) -> InstanceHeader:
    """The header that these elements make: the four identifying ones are there, others may be. Raises BrokenInstance
    for UIDs that are none.
    """
    study, series, instance, sop_class = _identifying_uids(elements)
    return InstanceHeader(
        ref=InstanceRef(study, series, instance),
        sop_class_uid=sop_class,
        transfer_syntax_uid=transfer_syntax_uid,
        attributes=_attributes(elements, encoding),
    )


def _peek_encoding(stream: BinaryIO) -> Encoding:
    """The encoding found at the stream's place, which is kept."""
    place = stream.tell()
    head = stream.read(6)
    stream.seek(place)
    return encoding_at(head)


def _uid_or_none(elements: _Elements, tag: int) -> str | None:
    raw = elements.get(tag)
    if raw is None:
        return None
    try:
        return parse_uid(raw.value.decode("latin-1"))
    except InvalidIdentifier:
        return None


def _inflated(stream: BinaryIO) -> BinaryIO:
    """The beginning of a deflated data set (PS3.5 section A.5), at most INFLATED_BYTES_MAX; a stream that turns out
    not to be deflated is returned as it is.
    """
    start = stream.tell()
    inflater = Inflater(stream.read)
    inflated = io.BytesIO()
    try:
        while inflated.tell() < INFLATED_BYTES_MAX and (block := inflater.next(INFLATED_BYTES_MAX - inflated.tell())):
            inflated.write(block)
    except zlib.error:
        pass  # What came out before the damage may hold the header.
    if not inflated.tell():
        stream.seek(start)
        return stream
    inflated.seek(0)
    return inflated


def _identifying_uids(elements: _Elements) -> list[Uid]:
    """Study, series, SOP instance and SOP class UID, in this order. Raises BrokenInstance naming the bad one."""
    uids: list[Uid] = []
    for tag, name in _IDENTIFYING.items():
        try:
            uids.append(parse_uid(elements[tag].value.decode("latin-1")))
        except InvalidIdentifier as error:
            raise BrokenInstance(f"invalid UID: {name}: {error.message}") from None
    return uids


def _attributes(elements: _Elements, encoding: Encoding) -> AttributeValues:
    character_set = elements.get(_CHARACTER_SET)
    encodings = encodings_of(character_set.value) if character_set else ()
    values: AttributeValues = {attribute.column: None for attribute in ATTRIBUTES}
    for attribute in TOP_ATTRIBUTES:
        raw = elements.get(attribute.tag)
        if raw is None:
            continue
        if attribute.is_integer:
            vr = attribute.vr if raw.vr in (None, "UN") else raw.vr
            values[attribute.column] = decode_integer(raw.value, vr, encoding.is_little)
        else:
            values[attribute.column] = decode_text(raw.value, encodings, is_cut=raw.is_cut)
    return values


def _collect(stream: BinaryIO, encoding: Encoding, wanted: list[int], is_past: Callable[[int], bool]) -> _Elements:
    """Read the `wanted` elements (and the character set) from the stream's place to the first tag that `is_past`,
    or to the end; of elements that stand twice the first counts. The stream is left at that tag's header.

    pydicom's reader is stopped at whatever it would read whole (undefined lengths, long values) or would warn of (the
    character set), and started again behind it.
    """
    elements: dict[int, RawValue] = {}
    remaining = ELEMENTS_MAX
    stopped_at: tuple[int, int, int, str | None] | None = None
    wanted_tags = frozenset(wanted)
    tell = stream.tell

    def must_stop(tag: int, vr: str | None, length: int) -> bool:
        nonlocal remaining, stopped_at
        remaining -= 1
        tag = int(tag)  # pydicom's own tag type compares slowly
        if (
            length == _UNDEFINED
            or is_past(tag)
            or tag == _CHARACTER_SET
            or remaining <= 0
            or (length > VALUE_BYTES_MAX and tag in wanted_tags)
        ):
            stopped_at = (tag, length, tell(), vr)
            return True
        return False

    while remaining > 0:
        stopped_at = None
        try:
            for element in data_element_generator(
                stream, encoding.is_implicit, encoding.is_little, must_stop, specific_tags=wanted
            ):
                value = element.value or b""
                if isinstance(element, RawDataElement) and len(value) == element.length:
                    # A shorter value is cut off by the end of the file.
                    elements.setdefault(int(element.tag), RawValue(value, element.VR))
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError):
            return elements  # The rest is not readable; what came before it counts.
        if stopped_at is None:
            if _at_end(stream):
                return elements
            remaining -= 1
            continue  # A stray delimiter ended pydicom's reading, which stepped over it.
        tag, length, value_start, vr = stopped_at
        if is_past(tag) or remaining <= 0:
            return elements
        stream.seek(value_start)
        if length == _UNDEFINED:
            remaining = _skip_nested(stream, encoding, remaining)
            continue
        if tag == _CHARACTER_SET or tag in wanted_tags:
            value = stream.read(min(length, VALUE_BYTES_MAX))
            if len(value) == min(length, VALUE_BYTES_MAX):
                elements.setdefault(tag, RawValue(value, vr, is_cut=length > VALUE_BYTES_MAX))
        stream.seek(value_start + length)
    return elements


def _at_end(stream: BinaryIO) -> bool:
    """Whether less than one element header is left. The place is kept."""
    place = stream.tell()
    left = len(stream.read(8))
    stream.seek(place)
    return left < 8


def _skip_nested(stream: BinaryIO, encoding: Encoding, remaining: int) -> int:
    """Step over a value of undefined length (PS3.5 sections 7.5 and A.4), whatever its depth, without recursion.

    Only the depth is counted: each item and each element of undefined length opens a level, each delimiter closes
    one. Returns how many elements may still be looked at.
    """
    order = "<" if encoding.is_little else ">"
    unpack_header = struct.Struct(f"{order}HHL").unpack
    unpack_short = struct.Struct(f"{order}H").unpack
    unpack_long = struct.Struct(f"{order}L").unpack
    read, seek = stream.read, stream.seek
    depth = 1
    while depth and remaining > 0:
        remaining -= 1
        header = read(8)
        if len(header) < 8:
            return 0
        group, element, length = unpack_header(header)
        tag = group << 16 | element
        if tag in (_ITEM_END, _SEQUENCE_END):
            depth -= 1
            continue
        if tag != _ITEM and not encoding.is_implicit and is_vr_code(header[4:6]):
            if header[4:6] in LONG_VR_CODES:
                long_length = read(4)
                if len(long_length) < 4:
                    return 0
                (length,) = unpack_long(long_length)
            else:
                (length,) = unpack_short(header[6:8])
        if length == _UNDEFINED:
            depth += 1
        elif length:
            seek(length, io.SEEK_CUR)
    return remaining
